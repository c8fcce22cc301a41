"""A run in the session: looks whether the session's shell lives, and uses the card for some seconds.

The card here is emulated: a process that holds its device nodes open is on it, and its share of a CPU is the card's
utilization. Code for a real card does the same by computing.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 1.0
card = Path(os.environ["PUHUI_CAPS"])
held = [os.open(node, os.O_RDONLY) for node in sorted(card.iterdir())]
note = Path("../shell.json")
said: dict[str, object] = {"slice_uuid": os.environ.get("CUDA_VISIBLE_DEVICES", ""), "nodes": len(held)}
if note.exists():
    shell = json.loads(note.read_text())
    fields = Path(f"/proc/{shell['pid']}/stat").read_text().rpartition(")")[2].split()
    said |= {"shell_pid": shell["pid"], "shell_begun": shell["begun"], "shell_lives": int(fields[19]) == shell["begun"]}
    counter = Path("../runs.txt")
    with counter.open("a") as file:
        file.write(f"{said['slice_uuid']}\n")
    said["runs_noted"] = len(counter.read_text().splitlines())
until = time.monotonic() + seconds
while time.monotonic() < until:
    sum(number * number for number in range(10_000))
print(json.dumps(said), flush=True)
