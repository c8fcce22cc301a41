"""Occupies its card until it is ended, as a long training run would, without the work."""

import signal

print("holds its card", flush=True)
signal.pause()
