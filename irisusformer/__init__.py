"""IrisUsformer: iris segmentation with a transformer that says where it is unsure (arXiv:2110.10334)."""
