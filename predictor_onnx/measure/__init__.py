"""Measures configurations on a GPU, each in a process of its own, into a dated data file."""
