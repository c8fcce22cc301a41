"""Measure configurations on this machine's GPU: ``python -m predictor_onnx.measure --output FILE.jsonl``.

Needs an NVIDIA GPU and the extra ``measure`` (torch, timm, transformers). No setting of the GPU is changed. Each
configuration runs in a process of its own; the file grows by a row at a time and can be continued with ``--resume``.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Final

from predictor_onnx import catalog
from predictor_onnx.configuration import Configuration
from predictor_onnx.errors import PredictorError
from predictor_onnx.measure import data_file
from predictor_onnx.measure.plan import ListRefusedError, Planned, plan, read_list
from predictor_onnx.measure.process import Machine, NothingToMeasureOnError, ProcessWorker, Worker
from predictor_onnx.measure.protocol import Settings
from predictor_onnx.measure.rows import Ending, MeasuredRow, Outcome

_NO_GPU: Final = (
    "nothing was measured: {why}. This needs an NVIDIA GPU that no other work is on, its driver, and a torch built for "
    "CUDA (pip install 'puhui[measure]')."
)
_USUAL_CARD_MIB: Final = 40_960.0
#: A configuration that is given less says little.
_LEAST_S: Final = 15.0


def measure_all(
    planned: Iterable[Planned], done: set[Configuration], worker: Worker, machine: Machine,
    append: Callable[[MeasuredRow], None], until: float, most_s: float, clock: Callable[[], float] = time.monotonic,
) -> int:  # fmt: skip
    """Measure what is planned and not done, one after the other, until the time is up.

    Args:
        planned: in the order to measure in.
        done: what has a row already.
        worker: what measures.
        machine: what ``worker`` said it measures on.
        append: takes each row.
        until: when to stop, on ``clock``; what is ended for that leaves no row, so that it is measured on resuming.
        most_s: seconds for one configuration.
        clock: tells seconds.

    Returns:
        How many rows were appended.
    """
    made = 0
    for one in planned:
        if one.configuration in done:
            continue
        left = until - clock()
        if left < min(_LEAST_S, most_s):
            break
        outcome = worker.measure(one.configuration, machine, min(most_s, left))
        if outcome.ending is Ending.TIMED_OUT and left < most_s:
            break
        append(MeasuredRow(one.family, one.configuration, outcome))
        done.add(one.configuration)
        made += 1
        _say(f"{made:5} {_short(one.configuration)}: {_result(outcome)}")
    return made


def _short(asked: Configuration) -> str:
    how = [asked.precision.value, asked.optimizer or "no optimizer", "training" if asked.training else "inference"]
    how += [name for name in ("channels_last", "checkpointing") if getattr(asked, name)]
    how += [asked.attention] if asked.attention else []
    how += [f"accumulation {asked.accumulation}"] if asked.accumulation > 1 else []
    shape = "x".join(str(side) for side in asked.shape)
    return f"{asked.source} {asked.model:.60} batch {asked.batch} of {shape}, {', '.join(how)}"


def _result(outcome: Outcome) -> str:
    if outcome.reading is None:
        return f"{outcome.ending.value} {outcome.detail:.80}".rstrip()
    return f"{outcome.reading.device_mib:.0f} MiB, {outcome.reading.step_ms:.2f} ms"


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m predictor_onnx.measure", description=__doc__)
    parser.add_argument("--output", type=Path, help="file of rows (.jsonl); default: measured-DATE-CARD.jsonl here")
    parser.add_argument("--resume", action="store_true", help="continue --output, leaving out what it has")
    parser.add_argument(
        "--list", type=Path, help="configurations, one JSON object per line, instead of the built-in plan"
    )
    parser.add_argument("--limit-minutes", type=float, default=60.0, help="time for all of them")
    parser.add_argument("--limit-seconds-each", type=float, default=180.0, help="time for one of them")
    parser.add_argument("--seed", type=int, default=20, help="of the built-in plan")
    parser.add_argument("--card-mib", type=float, help="memory that the built-in plan counts on; default: the card's")
    parser.add_argument("--cudnn-benchmark", action="store_true", help="let cuDNN try its algorithms out")
    parser.add_argument("--expandable-segments", action="store_true", help="let segments of torch's allocator grow")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and what it is expected to take; no GPU")
    return parser


def _planned(arguments: argparse.Namespace, card_mib: float) -> list[Planned]:
    if arguments.list is not None:
        return read_list(arguments.list.read_text().splitlines())
    return plan(catalog.load(), arguments.card_mib or card_mib, arguments.seed)


def _print_plan(planned: Sequence[Planned], limit_s: float) -> None:
    spent, shown, families = 0.0, 0, set()
    for one in planned:
        if spent + one.expected_s > limit_s:
            break
        spent += one.expected_s
        shown += 1
        families.add(one.family)
        sys.stdout.write(f"{spent / 60:7.1f} min  {one.family:<20} {_short(one.configuration)}\n")
    sys.stdout.write(
        f"{shown} of {len(planned)} configurations, {len(families)} families, about {spent / 60:.0f} minutes "
        "(expected, not measured)\n"
    )


def _measure(arguments: argparse.Namespace, worker: Worker) -> int:
    machine = worker.probe()
    header = machine.header
    planned = _planned(arguments, header.total_mib)
    until = time.monotonic() + 60 * arguments.limit_minutes
    card = f"{header.card} {header.mig_profile}".strip().replace(" ", "-").lower()
    path = arguments.output or Path(f"measured-{header.date[:10]}-{card}.jsonl")

    def run(file: data_file.DataFile, done: set[Configuration]) -> int:
        return measure_all(planned, done, worker, machine, file.append, until, arguments.limit_seconds_each)

    if arguments.resume:
        with data_file.resume(path, header) as (file, rows):
            made = run(file, {row.configuration for row in rows})
    else:
        with data_file.begin(path, header) as file:
            made = run(file, set())
    _say(f"{made} rows in {path}")
    return 0


def main(words: Sequence[str] | None = None, command: Sequence[str] | None = None) -> int:
    """Command line.

    Args:
        words: its words; those of this process by default.
        command: what starts the measuring process, where it is not the package's own.

    Returns:
        0; 1 when the file or the list is refused; 2 when there is nothing to measure on; 130 after Ctrl-C.
    """
    arguments = _parser().parse_args(words)
    settings = Settings(arguments.cudnn_benchmark, arguments.expandable_segments)
    try:
        if arguments.dry_run:
            _print_plan(_planned(arguments, _USUAL_CARD_MIB), 60 * arguments.limit_minutes)
            return 0
        return _measure(arguments, ProcessWorker(settings, command) if command else ProcessWorker(settings))
    except NothingToMeasureOnError as error:
        _say(_NO_GPU.format(why=error))
        return 2
    except (PredictorError, ListRefusedError, OSError) as error:
        _say(str(error))
        return 1
    except KeyboardInterrupt:
        _say("stopped; what was measured is in the file, --resume continues it")
        return 130


if __name__ == "__main__":
    sys.exit(main())
