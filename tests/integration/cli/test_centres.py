"""`puhui up --centers N`: several centres on one machine."""

import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from puhui.cli.ports import free_port
from puhui.client import Centre
from tests.integration.cli.program import Puhui

UP = ("up", "--port", "0", "--runtime", "process")


@pytest.fixture
def user(tmp_path: Path) -> Iterator[Puhui]:
    """Somebody whose centres, if any are left, are stopped."""
    puhui = Puhui.at(tmp_path / "home")
    puhui.environment["PUHUI_LOCAL_STATE"] = str(tmp_path / "state")
    yield puhui
    puhui("down")


def record(user: Puhui) -> Any:
    return json.loads(Path(user.environment["PUHUI_LOCAL_STATE"], "up.json").read_text())


def models(centre: dict[str, Any]) -> list[str]:
    assert centre["emulated"] is True
    return [gpu["model"] for gpu in centre["node"]["inventory"]["gpus"]]


def test_each_centre_has_its_own_name_cards_and_state(user: Puhui) -> None:
    cards = ("--emulate", "A30-24GB:1", "--emulate", "A100-80GB:2")
    started = user(*UP, "--centers", "2", *cards, "--detach", "--json")
    assert started.code == 0, started.err
    first, second = started.json["centres"]
    assert [first["name"], second["name"]] == ["local", "local-2"]
    assert [len(models(first)), len(models(second))] == [1, 2]
    assert started.json["address"] == first["address"] != second["address"]
    assert Path(second["state"]) == Path(user.environment["PUHUI_LOCAL_STATE"], "local-2")

    listed = user("centres", "--json").json["centres"]
    assert [(one["name"], one["address"], one["emulated"]) for one in listed] == [
        ("local", first["address"], True),
        ("local-2", second["address"], True),
    ]
    assert "CARDS (EMULATED)" in user("centres").out
    # A centre is reached by its name, by its address, and by either in the environment.
    for server in ("local-2", second["address"]):
        [node] = user("nodes", "--json", "--server", server).json["nodes"]
        assert node["inventory"]["name"] == "local-2"
    user.environment["PUHUI_SERVER"] = "local"
    assert user("nodes", "--json").json["nodes"][0]["inventory"]["name"] == "local"
    wrong = user("nodes", "--server", "local-3")
    assert (wrong.code, "a local centre that runs: local, local-2" in wrong.err) == (2, True)

    down = user("down")
    assert "2 centres have stopped" in down.err
    assert user("centres", "--json").json == {"centres": []}
    assert "no address" in user("nodes", "--server", "local-2").err


def test_one_set_of_cards_is_for_all_and_the_next_free_ports_are_taken(user: Puhui) -> None:
    port = free_port()
    started = user(*UP, "--port", str(port), "--centres", "2", "--emulate", "A30-24GB:1", "--detach", "--json")
    assert started.code == 0, started.err
    ports = [int(centre["address"].rpartition(":")[2]) for centre in started.json["centres"]]
    assert ports[0] == port
    assert ports[1] > port
    assert [len(models(centre)) for centre in started.json["centres"]] == [1, 1]
    before = [centre["federation_address"] for centre in started.json["centres"]]
    assert len(set(before)) == 2
    assert user("down").code == 0
    # Peers keep the address of a centre, so it keeps its port.
    again = user(*UP, "--centres", "2", "--emulate", "A30-24GB:1", "--detach", "--json")
    assert [centre["federation_address"] for centre in again.json["centres"]] == before


def test_the_state_of_one_centre_is_taken_up_by_several_and_left_by_fewer(user: Puhui, tmp_path: Path) -> None:
    (tmp_path / "code").mkdir()
    (tmp_path / "code/end.py").write_text("raise SystemExit(3)\n")
    cards = ("--emulate", "A30-24GB:1")
    user.environment["PUHUI_SERVER"] = user(*UP, *cards, "--detach", "--json").json["address"]
    job_id = user("submit", "--memory", "4GB", tmp_path / "code/end.py").out.strip()
    assert user("wait", job_id).code == 3
    user("down")
    user.environment["PUHUI_SERVER"] = "local"
    assert user(*UP, *cards, "--centers", "2", "--detach").code == 0
    assert user("get", job_id, "--json").json["exit_code"] == 3
    assert user("ps", "--all", "--json", "--server", "local-2").json == {"jobs": []}
    user("down")
    assert user(*UP, *cards, "--detach").code == 0
    assert (
        "local-2 has state here and is not started"
        in Path(user.environment["PUHUI_LOCAL_STATE"], "logs/up.log").read_text()
    )


def test_a_dead_daemon_of_the_second_centre_is_named_and_started_again(user: Puhui) -> None:
    assert user(*UP, "--centers", "2", "--emulate", "A30-24GB:1", "--detach").code == 0
    before = record(user)
    assert set(before["daemons"]) == {"controlplane", "nodedaemon", "local-2/controlplane", "local-2/nodedaemon"}
    log = Path(user.environment["PUHUI_LOCAL_STATE"], "logs/supervisor.log")
    os.kill(before["daemons"]["local-2/controlplane"]["pid"], signal.SIGKILL)
    # It answers again at the same address; the command waits for that.
    [node] = user("nodes", "--json", "--server", "local-2").json["nodes"]
    assert node["inventory"]["name"] == "local-2"
    assert "the controlplane of local-2 was killed by signal 9" in log.read_text()
    assert record(user)["centres"] == before["centres"]


@pytest.mark.parametrize(
    "flags",
    [
        ("--centers", "9"),
        ("--centers", "0"),
        ("--centers", "3", "--emulate", "A30-24GB:1", "--emulate", "A30-24GB:2"),
        ("--emulate", "A30-24GB:1", "--emulate", "A30-24GB:2"),
    ],
)
def test_a_mistake_starts_nothing(user: Puhui, flags: tuple[str, ...]) -> None:
    ended = user(*UP, *flags)
    assert (ended.code, ended.err.count("\n"), "USAGE" in ended.err) == (2, 1, True)
    assert not Path(user.environment["PUHUI_LOCAL_STATE"]).exists()


def peers(started: Any) -> dict[str, dict[str, bool]]:
    return {one["name"]: {peer["name"]: peer["in_contact"] for peer in one["peers"]} for one in started["centres"]}


def fingerprints(started: Any) -> dict[str, str]:
    found = {}
    for one in started["centres"]:
        with Centre(one["address"]) as centre:
            found[one["name"]] = centre.peers().fingerprint
    return found


def test_all_centres_are_peers_of_each_other_and_stay_so(user: Puhui) -> None:
    up = (*UP, "--emulate", "A30-24GB:1", "--detach", "--json")
    every = {name: {other: True for other in ("local", "local-2") if other != name} for name in ("local", "local-2")}
    started = user(*up, "--centers", "2")
    assert started.code == 0, started.err
    assert peers(started.json) == every
    before = fingerprints(started.json)
    user("down")
    again = user(*up, "--centers", "2")
    assert peers(again.json) == every
    assert fingerprints(again.json) == before
    user("down")
    # A centre that is made anew is another one, and the third is new to both.
    shutil.rmtree(again.json["centres"][1]["state"])
    more = user(*up, "--centers", "3", timeout_s=120)
    assert more.code == 0, more.err
    names = ("local", "local-2", "local-3")
    assert peers(more.json) == {name: {other: True for other in names if other != name} for name in names}
    after = fingerprints(more.json)
    assert (after["local"] == before["local"], after["local-2"] == before["local-2"]) == (True, False)
