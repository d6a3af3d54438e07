"""How good images are: distances between feature distributions, precision and recall, speed.

`evaluate` measures a model. An `Evaluator` compares images with a reference by the features of a `FeatureNet`
(features.py, resnet56.py); metrics.py holds the formulas, cache.py keeps the reference's features on disk.
"""
