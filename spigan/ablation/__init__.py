"""Ablation studies: grid files (`grid`), training of the arms (`study`), and tables and curves (`report`)."""
