"""What is computed in its own type whatever autocast says."""

import torch
from torch import Tensor


def own_type(x: Tensor) -> torch.autocast:
    """A context in which autocast leaves the types of what is computed on the device of x alone."""
    return torch.autocast("cuda" if x.is_cuda else "cpu", enabled=False)
