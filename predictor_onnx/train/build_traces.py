"""Trace every measured configuration: ``python -m predictor_onnx.train.build_traces --data DIR``.

With ``--survey N`` instead, N configurations that nobody has measured (`predictor_onnx.train.survey`).
Needs the extra ``trace`` (torch, timm, torchvision). What could not be traced is named; what the file has already is
kept unless ``--anew``. It takes about an hour of two processors.
"""

from __future__ import annotations

import argparse
import queue
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

from predictor_onnx.configuration import Configuration
from predictor_onnx.traced_step import TracedStep
from predictor_onnx.tracer import CannotTraceError, Tracer
from predictor_onnx.train import dataset, survey, traces

#: The largest networks take two minutes of an idle processor.
_MOST_S: Final = 900.0
_SAVED_EVERY: Final = 100


def wanted(rows: Iterable[dataset.Row]) -> list[list[Configuration]]:
    """What is to be traced: a network each, with its batches."""
    found: dict[tuple[str, str], dict[int, Configuration]] = defaultdict(dict)
    for row in rows:
        source, name, batch = row.key
        found[source, name][batch] = row.configuration
    return [list(group.values()) for group in found.values()]


def build(
    groups: list[list[Configuration]],
    known: dict[traces.Key, TracedStep],
    path: Path,
    workers: int,
    key_of: Callable[[Configuration], traces.Key] = dataset.key_of,
) -> None:
    """Trace each group and keep what came of it by its key; the file is written as the work goes on."""
    tracers: queue.SimpleQueue[Tracer] = queue.SimpleQueue()
    for _ in range(workers):
        tracers.put(Tracer())

    def one(group: list[Configuration]) -> tuple[list[Configuration], list[TracedStep] | str]:
        tracer = tracers.get()
        try:
            return group, tracer.trace(group, _MOST_S)
        except CannotTraceError as error:
            return group, str(error)
        finally:
            tracers.put(tracer)

    failed = 0
    with ThreadPoolExecutor(workers) as threads:
        for number, (group, made) in enumerate(threads.map(one, groups), 1):
            if isinstance(made, str):
                failed += 1
                sys.stderr.write(f"\r\x1b[K{group[0].model[:60]}: {made}\n")
            else:
                known.update((key_of(asked), step) for asked, step in zip(group, made, strict=True))
            sys.stderr.write(
                f"\r\x1b[K{_bar(number, len(groups))} {number} of {len(groups)} networks, {failed} not traced"
            )
            if number % _SAVED_EVERY == 0:
                traces.write(known, path)
    sys.stderr.write("\n")
    traces.write(known, path)
    for _ in range(workers):
        tracers.get().close()


def _bar(done: int, of: int, width: int = 30) -> str:
    full = width * done // max(of, 1)
    return "[" + "#" * full + "." * (width - full) + "]"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m predictor_onnx.train.build_traces", description=__doc__)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--data", type=Path, help="folder with the measured rows")
    which.add_argument("--survey", type=int, metavar="N", help="how many that nobody has measured")
    parser.add_argument("--output", type=Path, help="the file that is written, where it is not the package's")
    parser.add_argument("--anew", action="store_true", help="trace also what the file has already")
    parser.add_argument("--workers", type=int, default=2, help="how many are traced at once")
    arguments = parser.parse_args()
    if arguments.survey is None:
        path, key_of = arguments.output or traces.PATH, dataset.key_of
        rows, _ = dataset.read(arguments.data)
        groups = wanted(rows)
    else:
        path, key_of = arguments.output or traces.SURVEYED, survey.key_of
        groups = survey.wanted(arguments.survey)
    known = {} if arguments.anew else traces.read(path)
    missing = [group for group in groups if any(key_of(one) not in known for one in group)]
    build(missing, known, path, arguments.workers, key_of)


if __name__ == "__main__":
    main()
