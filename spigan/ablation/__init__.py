"""A study of several training runs: the grid, the runs, the report."""
