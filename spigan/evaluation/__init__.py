"""Measure the quality of images: distances between feature distributions, precision and recall, and speed.

`evaluate` measures a model. An `Evaluator` compares images with a reference, based on the features of a `FeatureNet`
(features.py, resnet56.py). metrics.py has the formulas, and cache.py keeps the features of the reference on disk.
"""
