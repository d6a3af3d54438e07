"""Ablation studies: grid files (grid), training the arms (study), tables and curves (report)."""
