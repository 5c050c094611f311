"""The package on every family of models, and on random networks."""
