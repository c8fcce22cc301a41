"""GPU-hours that a day of sessions needs, with and without reclaim: a simulation, no time of this machine is in it.

Without reclaim a session has its share from its start to its end. With it, from a run instruction until the share has
been unused for the threshold; then its slice is kept warm for its tenant for a minute, unless somebody needs the room.
Who comes, and what is assumed of them, says `bench.idle_day`; who decides, `bench.idle_simulation`.

    python -m bench.idle_replay --data FOLDER [--seed 1] [--json]
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from bench.idle_day import Session, arrivals_of, busiest_day, sessions_of, slower
from bench.idle_fleet import geometry
from bench.idle_simulation import Outcome, Rules, simulate
from bench.report import Figure, Report, quantile
from controlplane.fleet import Geometry

__all__ = ["DATA", "replay"]

DATA = Path("../shared/data/placement")
CARD, WHOLE = "H100-80GB-SXM5", "7g.80gb"
TRACE = "ee9e8c"
"""The virtual cluster whose busiest day comes most evenly over the hours."""
OTHERS = ("ed69ec", "0e4a51", "6214e9")
THRESHOLDS_S = (60.0, 300.0, 900.0)
USUAL_S = 300.0
"""A centre's default for sessions."""
PAUSES = (0.5, 2.0)
NEVER = math.inf


def replay(data: Path, seed: int) -> tuple[list[Figure], list[str]]:
    """Returns what the replay found, and what must be said beside it.

    Args:
        data: folder with the traces. Where they are missing there are no figures, and a note that says so.
        seed: of what is drawn.
    """
    missing = [name for name in (TRACE, *OTHERS) if not _file(data, name).is_file()]
    if missing:
        return [], [f"The replay of a day of sessions was left out: {data} has no trace {', '.join(missing)}."]
    kind = geometry(CARD)
    sessions = _day(data, TRACE, seed)
    figures = _main(sessions, kind)
    for factor in PAUSES:
        other = slower(sessions, factor)
        figures += _pair(f"replay_pauses_x{factor:g}", other, kind)
    for name in OTHERS:
        figures += _pair(f"replay_{name}", _day(data, name, seed), kind)
    return figures, [
        "The replay is a simulation. Arrivals and models: the busiest day of a virtual cluster of Philly-derived "
        f"traces ({TRACE}; the others beside it); a session's first run instruction comes with it. Runs and pauses are "
        "not in the trace: they are drawn through the quantiles that NotebookOS (ASPLOS 2026, doi "
        "10.1145/3760250.3762230) tells of Adobe's notebooks, as a published summary has them: runs 2 min (median) and "
        "5 min (75 %), from run to run at least 4 min and 5 min (median), a wide rest so that reserved GPUs are idle "
        "most of the time (81 % there; replay_unused_share says what came out here). That a session lasts 2 to 8 h, "
        "and how much memory a model needs, are assumptions; a job of several GPUs is a session with a whole card.",
        f"Cards are {CARD}, eight to a node. A share counts as a GPU-hour by its memory slices, of "
        f"{kind.memory_slices}; warm slices are not counted, since they are evicted for whoever needs the room. "
        "Reclaiming, cutting and moving take no time in it, and every share can be taken once its run is over, so the "
        "savings are the most that there can be: a notebook kernel that keeps its card open needs a checkpoint.",
    ]


def _main(sessions: Sequence[Session], kind: Geometry) -> list[Figure]:
    without = simulate(sessions, kind, Rules(NEVER))
    figures = [
        Figure("replay_sessions", len(sessions), "count"),
        Figure("replay_runs", sum(len(one.runs) for one in sessions), "count"),
        Figure("replay_used_gpu_hours", _hours(without.busy_slice_s, kind), "GPU-h"),
        Figure("replay_unused_share", 1 - without.busy_slice_s / without.held_slice_s, "ratio"),
        *_needed("replay_without", without, kind),
    ]
    fleet = -(-without.gpus // 2)
    queued = simulate(sessions, kind, Rules(NEVER), fleet)
    waits = [Figure("replay_fixed_fleet", fleet, "GPUs"), *_waits("replay_fixed_without", queued)]
    for threshold_s in THRESHOLDS_S:
        name = f"after_{threshold_s:.0f}s"
        outcome = simulate(sessions, kind, Rules(threshold_s))
        figures += _needed(f"replay_{name}", outcome, kind)
        figures += [
            Figure(f"replay_{name}_saved_share", 1 - outcome.held_slice_s / without.held_slice_s, "ratio"),
            Figure(f"replay_{name}_kept", outcome.shares["kept"], "runs"),
            Figure(f"replay_{name}_warm", outcome.shares["warm"], "runs"),
            Figure(f"replay_{name}_cut", outcome.shares["cut"], "runs"),
            Figure(f"replay_{name}_moved", outcome.shares["moved"], "runs"),
        ]
        waits += _waits(f"replay_fixed_{name}", simulate(sessions, kind, Rules(threshold_s), fleet))
    return figures + waits


def _pair(name: str, sessions: Sequence[Session], kind: Geometry) -> list[Figure]:
    without, after = simulate(sessions, kind, Rules(NEVER)), simulate(sessions, kind, Rules(USUAL_S))
    return [
        *_needed(f"{name}_without", without, kind),
        *_needed(f"{name}_after_{USUAL_S:.0f}s", after, kind),
        Figure(f"{name}_after_{USUAL_S:.0f}s_saved_share", 1 - after.held_slice_s / without.held_slice_s, "ratio"),
    ]


def _needed(name: str, outcome: Outcome, kind: Geometry) -> list[Figure]:
    return [
        Figure(f"{name}_held_gpu_hours", _hours(outcome.held_slice_s, kind), "GPU-h"),
        Figure(f"{name}_powered_gpu_hours", outcome.held_gpu_s / 3600, "GPU-h"),
        Figure(f"{name}_peak_gpus", outcome.gpus, "GPUs"),
    ]


def _waits(name: str, outcome: Outcome) -> list[Figure]:
    return [
        Figure(f"{name}_wait_mean_s", statistics.fmean(outcome.waits_s), "s"),
        Figure(f"{name}_wait_p99_s", quantile(outcome.waits_s, 0.99), "s"),
    ]


def _hours(slice_s: float, kind: Geometry) -> float:
    return slice_s / kind.memory_slices / 3600


def _day(data: Path, name: str, seed: int) -> list[Session]:
    return sessions_of(busiest_day(arrivals_of(_file(data, name))), name, WHOLE, seed)


def _file(data: Path, name: str) -> Path:
    return data / f"{name}.trace.gz"


def main() -> None:
    """Replays and reports."""
    parser = argparse.ArgumentParser(description="GPU-hours that a day of sessions needs, with and without reclaim.")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--data", type=Path, default=DATA, help="folder with the traces")
    parser.add_argument("--seed", type=int, default=1, help="of what is drawn")
    options = parser.parse_args()
    figures, notes = replay(options.data, options.seed)
    Report(bench="idle_replay", figures=figures, aims=[], notes=notes).show(options.json)


if __name__ == "__main__":
    main()
