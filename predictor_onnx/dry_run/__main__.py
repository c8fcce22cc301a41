"""Runs a program: ``python3 -m predictor_onnx.dry_run [--steps 2] [--within 60] [--report PATH] -- python3 train.py``.

One line of JSON is written (``Finding``): to ``--report``, which is a path or the number of a descriptor, else to the
standard output. What the program itself prints goes to the standard error.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import signal
import sys
from pathlib import Path

from predictor_onnx.dry_run.command import NotPythonError, program_of
from predictor_onnx.dry_run.finding import Ending, Finding


def main(words: list[str] | None = None) -> int:
    """Answer with 0 once a finding was written, whatever it is."""
    parser = argparse.ArgumentParser(prog="dry_run", description="Run a program for a few steps without a GPU.")
    parser.add_argument("--steps", type=int, default=2, help="optimizer steps to see (default: 2)")
    parser.add_argument("--within", type=int, default=0, help="seconds until it is given up (default: never)")
    parser.add_argument("--report", default="1", help="path or descriptor that the finding is written to (default: 1)")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="the program's own command line")
    asked = parser.parse_args(words)
    command = asked.command[1:] if asked.command[:1] == ["--"] else asked.command
    into = os.dup(int(asked.report)) if asked.report.isdigit() else -1
    with contextlib.suppress(OSError):
        os.dup2(2, 1)
    report = asked.report

    def told(finding: Finding) -> None:
        line = finding.to_json() + "\n"
        if into >= 0:
            os.write(into, line.encode())
        else:
            Path(report).write_text(line)

    try:
        program = program_of(command)
    except NotPythonError as error:
        told(Finding(Ending.FAILED, str(error)))
        return 0
    if importlib.util.find_spec("torch") is None:
        told(Finding(Ending.FAILED, "the image has no torch"))
        return 0
    if asked.within:
        signal.signal(signal.SIGALRM, signal.default_int_handler)
        signal.alarm(asked.within)
    try:
        from predictor_onnx.dry_run.running import dry_run
    except ImportError as error:
        told(Finding(Ending.FAILED, f"the image's torch cannot be watched; a dry run needs 2.13 ({error})"))
        return 0
    dry_run(program, asked.steps, told)
    sys.stdout.flush()
    # Threads and exit handlers of the program have nothing more to say.
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main())
