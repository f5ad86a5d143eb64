"""Perturbation Inactivation (PIN): a purifying defence for face recognition, with attacks and evaluation."""
