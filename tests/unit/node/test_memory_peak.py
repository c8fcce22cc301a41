"""The most device memory that a container was seen to use."""

from __future__ import annotations

from nodedaemon.memory_peak import MemoryPeak, seen
from puhui.v1.node_service_pb2 import UtilizationSample, UtilizationSource


def sample(mib: int | None, processes: int = 1, uuid: str = "MIG-1") -> UtilizationSample:
    source = UtilizationSource.UTILIZATION_SOURCE_PROCESSES
    return UtilizationSample(uuid=uuid, source=source, memory_used_mib=mib, processes=processes)


def test_the_peak_only_grows_and_each_look_counts() -> None:
    peak = MemoryPeak()
    for mib in (700, 9000, 800):
        peak = seen(peak, [sample(mib)])
    assert peak == MemoryPeak(9000, 3)


def test_cards_of_one_container_add_up_and_samples_of_one_card_do_not() -> None:
    assert seen(MemoryPeak(), [sample(700), sample(300, 0, "MIG-2")]) == MemoryPeak(1000, 1)
    assert seen(MemoryPeak(), [sample(700), sample(900)]) == MemoryPeak(900, 1)


def test_what_cannot_be_read_is_not_zero_and_changes_nothing() -> None:
    before = MemoryPeak(500, 2)
    assert seen(before, [sample(None)]) is before
    assert seen(before, [sample(700), sample(None, uuid="MIG-2")]) is before
    assert seen(before, []) is before


def test_a_card_that_nobody_holds_says_nothing_of_who_will() -> None:
    assert seen(MemoryPeak(), [sample(12, processes=0)]) == MemoryPeak()


def test_an_emulated_card_that_tells_no_use_of_its_memory_has_no_peak() -> None:
    assert seen(MemoryPeak(), [sample(0)]) == MemoryPeak()
