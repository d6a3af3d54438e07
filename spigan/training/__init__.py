"""Training: Algorithm 1, its updates, state and statistics, and the run folder."""
