"""Whatever is done to a host, its lease clock only grows, and says when a reading tells nothing of the time between."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from puhui.rpc.lease_clock import LeaseClock, ThisHost


class FakeHost:
    """A host that is turned off and on, and whose wall clock is set at will."""

    def __init__(self) -> None:
        self.boots = 1
        self.up_s = 100.0
        self.wall = 1_000_000.0

    def boot_id(self) -> str:
        return f"boot-{self.boots}"

    def uptime_s(self) -> float:
        return self.up_s

    def wall_s(self) -> float:
        return self.wall

    def passes(self, seconds: float) -> None:
        self.up_s += seconds
        self.wall += seconds

    def reboot(self, wall_step_s: float) -> None:
        self.boots += 1
        self.up_s = 3.0
        self.wall += wall_step_s


@pytest.fixture
def host() -> FakeHost:
    return FakeHost()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "lease-clock"


def test_it_begins_at_the_wall_clock_and_no_step_of_that_moves_it(host: FakeHost, path: Path) -> None:
    clock = LeaseClock(path, host)
    assert clock.now() == 1_000_000.0
    host.wall -= 5000.0
    host.passes(10.0)
    assert clock.now() == 1_000_010.0


def test_a_restart_of_the_process_does_not_move_it(host: FakeHost, path: Path) -> None:
    first = LeaseClock(path, host)
    host.passes(500.0)
    host.wall += 99_999.0
    again = LeaseClock(path, host)
    assert again.now() == first.now() == 1_000_500.0
    assert again.boot == first.boot


@pytest.mark.parametrize("step_s", [-10_000.0, 0.0, 10_000.0])
def test_after_a_reboot_it_goes_on_at_the_wall_clock_but_never_before_what_it_said(
    host: FakeHost, path: Path, step_s: float
) -> None:
    before = LeaseClock(path, host)
    host.passes(500.0)
    said, boot = before.now(), before.boot
    host.reboot(step_s)
    after = LeaseClock(path, host)
    assert after.now() >= max(said, host.wall)
    assert after.boot != boot


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: b"",
        lambda text: text[: len(text) // 2],
        lambda text: b"\xff\x00" + text,
        lambda text: b"[]",
        lambda text: b"null",
        lambda text: text.replace(b'"era"', b'"something"'),
        lambda text: json.dumps({**json.loads(text), "offset": float("nan")}).encode(),
        lambda text: json.dumps({**json.loads(text), "ceiling": None}).encode(),
    ],
)
def test_with_a_damaged_file_it_begins_anew_and_says_so(
    host: FakeHost, path: Path, damage: Callable[[bytes], bytes]
) -> None:
    before = LeaseClock(path, host)
    path.write_bytes(damage(path.read_bytes()))
    after = LeaseClock(path, host)
    assert after.now() == host.wall
    assert after.boot != before.boot, "leases of before would be taken to hold"
    assert LeaseClock(path, host).boot == after.boot


def test_when_its_file_is_gone_it_begins_anew_and_says_so(host: FakeHost, path: Path) -> None:
    before = LeaseClock(path, host)
    path.unlink()
    assert LeaseClock(path, host).boot != before.boot


def test_a_crash_between_write_and_rename_changes_nothing(host: FakeHost, path: Path) -> None:
    clock = LeaseClock(path, host)
    path.with_suffix(".new").write_text('{"boot_id": "boot-1", "era"')
    again = LeaseClock(path, host)
    assert (again.now(), again.boot) == (clock.now(), clock.boot)


def test_it_says_nothing_that_it_has_not_provided_for(host: FakeHost, path: Path) -> None:
    clock = LeaseClock(path, host)
    kept = path.read_bytes()
    path.with_suffix(".new").mkdir()  # stands for a full disk: it cannot be written
    host.passes(61.0)
    for _ in range(2):
        with pytest.raises(OSError, match="directory"):
            clock.now()
    assert path.read_bytes() == kept
    path.with_suffix(".new").rmdir()
    assert clock.now() == 1_000_061.0
    assert json.loads(path.read_text())["ceiling"] > 1_000_061.0


def test_the_folder_must_be_there(host: FakeHost, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file"):
        LeaseClock(tmp_path / "gone" / "lease-clock", host)


def test_the_real_host_runs_with_boottime(path: Path) -> None:
    host = ThisHost()
    assert host.boot_id() == host.boot_id() != ""
    first = LeaseClock(path)
    one, other = first.now(), LeaseClock(path).now()
    assert one <= other < one + 60
    assert abs(one - host.wall_s()) < 60
    assert list(path.parent.iterdir()) == [path]


_DEEDS = st.lists(
    st.tuples(
        st.sampled_from(["passes", "steps", "restarts", "reboots"]), st.floats(-1e6, 1e6), st.floats(0.0, 10_000.0)
    ),
    max_size=30,
)


@given(deeds=_DEEDS)
def test_whatever_is_done_to_it_it_only_grows(
    deeds: list[tuple[str, float, float]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    host, path = FakeHost(), tmp_path_factory.mktemp("clock") / "lease-clock"
    clock = LeaseClock(path, host)
    said, boots = clock.now(), {clock.boot}
    for what, step_s, passes_s in deeds:
        if what == "passes":
            host.passes(passes_s)
        elif what == "steps":
            host.wall += step_s
        elif what == "restarts":
            clock = LeaseClock(path, host)
            assert clock.boot in boots
        else:
            host.reboot(step_s)
            clock = LeaseClock(path, host)
            assert clock.boot not in boots
            boots.add(clock.boot)
        now = clock.now()
        assert now >= said
        said = now
