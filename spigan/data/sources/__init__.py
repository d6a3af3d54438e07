"""Where images come from: one module per kind of source. `base` defines the interface, `find` chooses the source."""
