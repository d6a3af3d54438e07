"""Training: Algorithm 1 with its updates, state and statistics, and the run folder."""
