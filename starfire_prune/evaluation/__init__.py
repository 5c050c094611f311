"""Accuracy of a run or a file, clean and under attack."""
