"""How good images are: distances between feature distributions, precision and recall, time. See `evaluate.py`."""
