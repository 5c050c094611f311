"""Structured sparse training of convolutional networks."""
