"""Training runs: `starfire_prune.training.train.train` trains a recipe."""
