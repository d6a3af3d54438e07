"""Training: Algorithm 1 of the paper, and the run folder that it fills.

- algorithm1.py: one iteration, line by line as the paper prints it.
- updates.py: what an iteration does to the networks: gradients, optimiser steps, penalties, averaged weights, ADA's p.
- losses.py and augment/: the losses, and what the discriminator sees instead of the plain images.
- state.py: everything that training depends on, which is what a checkpoint holds.
- trainer.py: builds or resumes a run, and loops over iterations.
- statistics.py, divergence.py and measure.py: what a run records, how it finds that it fails, and its metrics.
- checkpoint.py, snapshots.py and run_folder.py: the files of a run.
- signals.py: how Ctrl-C and SIGTERM end a run without losing its state.
- processes.py and launcher.py: training in several processes.
"""
