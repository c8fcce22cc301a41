"""Trace every measured configuration: ``python -m predictor_onnx.train.build_traces --data DIR``.

Needs the extra ``trace`` (torch, timm, torchvision). What could not be traced is named; what the file has already is
kept unless ``--anew``. It takes about an hour of two processors.
"""

from __future__ import annotations

import argparse
import queue
import sys
from collections import defaultdict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

from predictor_onnx.configuration import Configuration
from predictor_onnx.traced_step import TracedStep
from predictor_onnx.tracer import CannotTraceError, Tracer
from predictor_onnx.train import dataset, traces

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


def build(groups: list[list[Configuration]], known: dict[traces.Key, TracedStep], path: Path, workers: int) -> None:
    """Trace each group and keep what came of it; the file is written as the work goes on."""
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
                known.update((dataset.key_of(asked), step) for asked, step in zip(group, made, strict=True))
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
    parser.add_argument("--data", type=Path, required=True, help="folder with the measured rows")
    parser.add_argument("--output", type=Path, default=traces.PATH, help="the file that is written")
    parser.add_argument("--anew", action="store_true", help="trace also what the file has already")
    parser.add_argument("--workers", type=int, default=2, help="how many are traced at once")
    arguments = parser.parse_args()
    known = {} if arguments.anew else traces.read(arguments.output)
    rows, _ = dataset.read(arguments.data)
    groups = [group for group in wanted(rows) if any(dataset.key_of(one) not in known for one in group)]
    build(groups, known, arguments.output, arguments.workers)


if __name__ == "__main__":
    main()
