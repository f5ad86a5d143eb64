"""FaceSwapper: one-shot progressive face swapping with disentangled identity and attributes."""
