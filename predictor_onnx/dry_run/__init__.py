"""Runs somebody's own program for two steps on tensors without data, and tells what its device would have held."""
