"""Training of segmentation networks with Lightning."""
