"""Sources of images, with one module for each kind. `base` defines the interface, and `find` chooses the source."""
