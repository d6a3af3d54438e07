"""Training: Algorithm 1, its losses, augmentation, checkpoints and the run folder."""
