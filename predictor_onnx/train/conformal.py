"""Quantiles of residuals for a group that was never seen."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt


def group_quantile(residual: npt.NDArray[np.float64], groups: Sequence[str], level: float) -> float:
    """The quantile in which every group weighs the same, however many rows it has.

    With K groups the level is raised by (K + 1) / K, because the next group is one of K + 1 that could be the worst
    (Dunn, Wasserman and Ramdas, "Distribution-free prediction sets for two-layer hierarchical models", JASA 2023,
    their pooled estimate). Where that would reach 1 no finite answer has the guarantee, and the plain quantile is
    given: an average over groups like these, no promise for the next one.
    """
    count = Counter(groups)
    weight = np.array([1 / count[group] for group in groups])
    raised = level * (len(count) + 1) / len(count)
    order = np.argsort(residual, kind="stable")
    share = np.cumsum(weight[order]) / weight.sum()
    place = int(np.searchsorted(share, raised if raised < 1 else level))
    return float(residual[order][min(place, len(order) - 1)])
