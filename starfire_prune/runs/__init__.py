"""The folder of a run: its recipe, metrics, checkpoints and weights."""
