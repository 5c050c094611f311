"""Training runs: `train` takes a recipe through its epochs."""
