"""Occupies its card until it is ended, as a long training run would, without the work."""

import os
import signal
from pathlib import Path

# On an emulated card, whoever holds its device nodes open is on it.
held = [os.open(node, os.O_RDONLY) for node in sorted(Path(os.environ["PUHUI_CAPS"]).iterdir())]
print("holds its card", flush=True)
signal.pause()
