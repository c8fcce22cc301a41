"""Runs a program on the card that is not there."""

from __future__ import annotations

import os
import runpy
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn.modules.module import register_module_parameter_registration_hook

from predictor_onnx.dry_run import cuda_calls, downloads, loop, stand_ins, surroundings
from predictor_onnx.dry_run.card import CardRecorder
from predictor_onnx.dry_run.command import Program
from predictor_onnx.dry_run.finding import Finding
from predictor_onnx.dry_run.moves import Moves, told, weightless
from predictor_onnx.dry_run.steps import Steps, StopRun
from predictor_onnx.trace.watch import watched

_MOST_SENTENCE = 240


def dry_run(program: Program, steps: int, report: Callable[[Finding], None]) -> None:
    """Run a program until it has made some optimizer steps. This process is of no other use afterwards.

    Args:
        program: what to run; its files are found from the working directory.
        steps: optimizer steps to see.
        report: is given what was found, before the program is ended.
    """
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    surroundings.neutralise()
    stand_ins.install(downloads.changes())
    downloads.change_loaded()
    recorder = CardRecorder()
    seen = Steps(recorder, steps, report)
    failure = ""
    with watched(recorder) as (_, fakes):
        moves = Moves(recorder)
        handle = register_module_parameter_registration_hook(weightless(fakes, recorder))
        cuda_calls.install(recorder)
        loop.install(recorder)
        with told(recorder, moves), moves, seen.counted():
            try:
                _run(program)
            except StopRun:
                pass
            except SystemExit as end:
                failure = "" if end.code in (None, 0) else f"the program ended with {end.code!r}"
            except KeyboardInterrupt:
                failure = "it took too long"
            except BaseException as error:  # noqa: BLE001 - other people's programs; whatever it is, it is told
                traceback.print_exception(error)
                failure = _sentence(error)
            seen.ended(failure)
        handle.remove()


def _run(program: Program) -> None:
    sys.argv = [program.path or program.module, *program.arguments]
    if program.module:
        sys.path.insert(0, str(Path.cwd()))
        runpy.run_module(program.module, run_name="__main__", alter_sys=True)
    else:
        sys.path.insert(0, str(Path(program.path).resolve().parent))
        runpy.run_path(program.path, run_name="__main__")


def _sentence(error: BaseException) -> str:
    """What went wrong and where in the program, in a line."""
    own = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if "site-packages" not in frame.filename and "predictor_onnx" not in frame.filename
        and not frame.filename.startswith("<frozen")
    ]  # fmt: skip
    where = f"{os.path.basename(own[-1].filename)}, line {own[-1].lineno}: " if own else ""  # noqa: PTH119
    what = str(error).strip().partition("\n")[0]
    return f"{where}{type(error).__name__}: {what}"[:_MOST_SENTENCE]
