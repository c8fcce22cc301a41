"""What is shown of usage: which part of it was at peers."""

import pytest
from rich.console import Console

from puhui.cli.terminal import Terminal
from puhui.cli.usage import By, remarks, usage_table
from puhui.v1.fleet_service_pb2 import GetUsageResponse, UsageRow


def shown(usage: GetUsageResponse) -> list[list[str]]:
    console = Console(width=120, color_system=None)
    with console.capture() as captured:
        console.print(usage_table(usage, By.TENANT))
    return [line.split() for line in captured.get().splitlines()]


def test_what_was_held_at_peers_is_a_part_of_what_was_held() -> None:
    home = UsageRow(tenant="lab", held_seconds=3600, held_slice_seconds=7200, tflops_hours=1)
    away = UsageRow(tenant="astro", held_seconds=3600, held_slice_seconds=7200, peer_slice_seconds=3600, tflops_hours=1)
    heading, *rows = shown(GetUsageResponse(rows=[home, away]))
    assert heading[3:5] == ["SHARE-H", "PEERS-H"]
    assert [(row[0], *row[4:6]) for row in rows] == [("lab", "2.0", "0.0"), ("astro", "2.0", "1.0")]
    assert remarks(GetUsageResponse(rows=[home, away])) == ["1.0 of these share-hours were held at peers: 25 %"]


def test_who_used_no_peer_is_told_nothing_of_peers() -> None:
    home = UsageRow(tenant="lab", held_seconds=3600, held_slice_seconds=7200, tflops_hours=1)
    assert "PEERS-H" not in shown(GetUsageResponse(rows=[home]))[0]
    assert remarks(GetUsageResponse(rows=[home])) == []


def test_no_figure_is_cut_where_there_is_no_room(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    row = UsageRow(tenant="lab", held_seconds=3600, held_slice_seconds=7200, tflops_hours=236.1, reclaims=12)
    Terminal().show(usage_table(GetUsageResponse(rows=[row]), By.TENANT))
    heading, line = capsys.readouterr().out.splitlines()
    assert (heading.split()[-1], line.split()[-1]) == ("TAKEN", "12")
    assert "236.1" in line
