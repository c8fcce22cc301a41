"""What the doctor makes of facts: every finding that is not ok says what to type, and the verdict follows from them."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pynvml
import pytest

from nodedaemon.cgroups import ContainerCgroup
from nodedaemon.doctor import Ability, Finding, Level, Report, Section, as_json, print_table
from nodedaemon.doctor.cards import Card, CardFacts, judge_cards
from nodedaemon.doctor.containers import ContainerFacts, judge_containers, subordinate_ids
from nodedaemon.doctor.findings import advice, notice, ok, problem, unknown, verdict
from nodedaemon.doctor.host import HostFacts, ProcessFacts, judge_host, judge_processes
from nodedaemon.doctor.nodes import Node, NodeFacts, judge_nodes
from nodedaemon.doctor.state import StateFacts, judge_state
from nodedaemon.driver_facts import Mig

_GPU = "GPU-1"
_H100 = Card(0, "NVIDIA H100 80GB HBM3", Mig.ENABLED, Mig.ENABLED, pynvml.NVML_DEVICE_ARCH_HOPPER)
_A100 = Card(0, "NVIDIA A100-SXM4-80GB", Mig.DISABLED, Mig.DISABLED, pynvml.NVML_DEVICE_ARCH_AMPERE)
_CARDS = CardFacts(True, "580.95.05", "", (_H100,), frozenset())


def _found(findings: list[Finding], check: str) -> Finding:
    return next(one for one in findings if one.check == check)


def _levels(findings: list[Finding]) -> set[Level]:
    return {one.level for one in findings}


# Findings and verdict ------------------------------------------------------------------------------------------


def test_what_is_not_ok_must_say_what_to_do() -> None:
    for level in (Level.NOTICE, Level.PROBLEM, Level.UNKNOWN):
        with pytest.raises(ValueError, match="what to do"):
            Finding("check", level, "something is wrong")


@pytest.mark.parametrize(
    ("message", "text", "command"),
    [
        (
            "user x has no range in /etc/subuid: give it one with `usermod x`",
            "user x has no range in /etc/subuid",
            "usermod x",
        ),
        ("it is broken", "it is broken", "look"),
        ("do `this`", "do `this`", "this"),
    ],
)
def test_an_errors_command_is_taken_out_of_its_sentence(message: str, text: str, command: str) -> None:
    assert advice(message, "look") == (text, command)


_REAL = [
    ([ok("driver", "fine")], True, "can serve real cards"),
    ([notice("clock", "late", "x")], True, "can serve real cards"),
    ([problem("driver", "none", "x", Ability.CARDS)], False, "cannot serve real cards: see driver"),
    ([problem("podman", "none", "x", Ability.CONTAINERS)], False, "cannot serve real cards: see podman"),
    ([unknown("cap-config", "?", "x", Ability.CARDS)], False, "cannot be said"),
    ([unknown("clock", "?", "x")], True, "can serve real cards"),
    ([problem("state", "none", "x", Ability.SERVE), unknown("cap", "?", "x", Ability.CARDS)], False, "see state."),
    ([problem("processes", "none", "x", Ability.PROCESSES)], True, "can serve real cards"),
]


@pytest.mark.parametrize(("findings", "can_serve", "words"), _REAL)
def test_the_verdict_on_real_cards(findings: list[Finding], can_serve: bool, words: str) -> None:
    found = verdict(findings, emulated=False)
    assert (found.can_serve, words in found.text) == (can_serve, True), found.text


_NO_PODMAN = problem("podman", "none", "x", Ability.CONTAINERS)
_EMULATED = [
    ([ok("driver", "none")], True, "emulated cards with containers"),
    ([problem("driver", "none", "x", Ability.CARDS)], True, "emulated cards with containers"),
    ([_NO_PODMAN], True, "processes only, without isolation: see podman"),
    ([_NO_PODMAN, problem("processes", "root", "x", Ability.PROCESSES)], False, "see podman, processes"),
    ([_NO_PODMAN, unknown("processes", "?", "x", Ability.PROCESSES)], False, "cannot be said"),
    ([problem("leases", "none", "x", Ability.EMULATION)], False, "cannot serve emulated cards: see leases"),
    ([unknown("storage", "?", "x", Ability.CONTAINERS)], False, "cannot be said"),
    ([problem("state-reach", "no", "x", Ability.CONTAINERS, Ability.PROCESSES)], False, "see state-reach."),
]


@pytest.mark.parametrize(("findings", "can_serve", "words"), _EMULATED)
def test_the_verdict_on_emulated_cards(findings: list[Finding], can_serve: bool, words: str) -> None:
    found = verdict(findings, emulated=True)
    assert (found.can_serve, words in found.text) == (can_serve, True), found.text


# Cards ---------------------------------------------------------------------------------------------------------


def test_a_card_with_mig_mode_on_is_ok() -> None:
    assert _levels(judge_cards(_CARDS, emulated=False)) == {Level.OK}


@pytest.mark.parametrize(
    ("card", "command"),
    [
        (_A100, "nvidia-smi -i 0 -mig 1"),
        (replace(_A100, pending=Mig.ENABLED), "nvidia-smi -i 0 --gpu-reset"),
        (replace(_H100, mig=Mig.DISABLED, pending=Mig.DISABLED), "systemctl enable --now puhui-mig@0.service"),
        (replace(_A100, architecture=None), "nvidia-smi -i 0 -mig 1"),
    ],
)
def test_how_mig_mode_is_turned_on_depends_on_the_architecture(card: Card, command: str) -> None:
    findings = judge_cards(replace(_CARDS, cards=(card,)), emulated=False)
    assert _found(findings, "gpu0").command == command
    assert _found(findings, "mig").command == command
    assert not verdict(findings, emulated=False).can_serve


def test_one_card_that_can_be_cut_is_enough() -> None:
    findings = judge_cards(replace(_CARDS, cards=(_H100, replace(_A100, index=1))), emulated=False)
    assert verdict(findings, emulated=False).can_serve
    assert _found(findings, "gpu1").level is Level.NOTICE


def test_a_card_that_does_not_answer_is_unknown_and_not_broken() -> None:
    card = replace(_H100, trouble="GPU is lost")
    findings = judge_cards(replace(_CARDS, cards=(_H100, replace(card, index=1))), emulated=False)
    assert _found(findings, "gpu1").level is Level.UNKNOWN
    assert "GPU is lost" in _found(findings, "gpu1").text


def test_a_card_that_loses_mig_mode_at_its_next_reset_is_noticed() -> None:
    findings = judge_cards(replace(_CARDS, cards=(replace(_H100, pending=Mig.DISABLED),)), emulated=False)
    assert _found(findings, "gpu0").level is Level.NOTICE


def test_foreign_slices_are_told_and_unknown_while_a_daemon_holds_the_journal() -> None:
    card = replace(_H100, instances=((_GPU, 1), (_GPU, 2)))
    facts = replace(_CARDS, cards=(card,))
    assert (
        "1 slice that"
        in _found(judge_cards(replace(facts, own_slices=frozenset({(_GPU, 1)})), emulated=False), "gpu0-slices").text
    )
    held = judge_cards(replace(facts, own_slices=None), emulated=False)
    assert _found(held, "gpu0-slices").level is Level.UNKNOWN
    assert verdict(held, emulated=False).can_serve
    own = judge_cards(replace(facts, own_slices=frozenset(card.instances)), emulated=False)
    assert _levels(own) == {Level.OK}


def test_no_driver_and_a_driver_that_does_not_answer_are_problems_for_real_cards_only() -> None:
    for facts in (CardFacts(loaded=False), CardFacts(loaded=True, trouble="version mismatch")):
        findings = judge_cards(facts, emulated=False)
        assert not verdict(findings, emulated=False).can_serve
        assert Level.PROBLEM not in _levels(judge_cards(facts, emulated=True))


# Device files --------------------------------------------------------------------------------------------------


def _node(name: str, *, present: bool = True, readable: bool | None = True) -> Node:
    return Node(Path("/dev", name), present, readable)


_NODES = NodeFacts(
    user="puhui",
    by_root=False,
    control=(_node("nvidiactl"), _node("nvidia-uvm")),
    minors_readable=True,
    config=_node("nvidia-cap1"),
    monitor=_node("nvidia-cap2"),
    config_reset=False,
    missing=(),
)


def test_nodes_that_are_all_there_are_ok() -> None:
    assert _levels(judge_nodes(_NODES)) == {Level.OK}


@pytest.mark.parametrize(
    ("change", "check", "level"),
    [
        ({"config": _node("nvidia-cap1", readable=False)}, "cap-config", Level.PROBLEM),
        ({"config": _node("nvidia-cap1", readable=False), "by_root": True}, "cap-config", Level.NOTICE),
        ({"config": _node("nvidia-cap1", present=False)}, "cap-config", Level.PROBLEM),
        ({"config": _node("nvidia-cap1", readable=None)}, "cap-config", Level.UNKNOWN),
        ({"config": None}, "cap-config", Level.UNKNOWN),
        ({"config_reset": True}, "cap-config", Level.NOTICE),
        ({"config_reset": None}, "cap-config", Level.UNKNOWN),
        ({"monitor": _node("nvidia-cap2", readable=False)}, "cap-monitor", Level.NOTICE),
        ({"minors_readable": False}, "cap-nodes", Level.PROBLEM),
        ({"missing": ("gpu0/gi1/access",)}, "slice-nodes", Level.PROBLEM),
        ({"control": (_node("nvidiactl", present=False),)}, "nvidiactl", Level.PROBLEM),
        ({"control": (_node("nvidia-uvm", readable=None),)}, "nvidia-uvm", Level.UNKNOWN),
    ],
)
def test_each_missing_node_is_told(change: dict[str, object], check: str, level: Level) -> None:
    assert _found(judge_nodes(replace(_NODES, **change)), check).level is level  # type: ignore[arg-type]


# Containers ----------------------------------------------------------------------------------------------------

_SYSCTLS = {
    "max_user_namespaces": 15000,
    "unprivileged_userns_clone": None,
    "apparmor_restrict_unprivileged_userns": None,
}
_CONTAINERS = ContainerFacts(
    user="puhui",
    person=True,
    is_root=False,
    programs=dict.fromkeys(("podman", "newuidmap", "newgidmap", "setpriv", "catatonit"), True),
    oci_runtimes=("crun",),
    podman_version="4.3.1",
    mappers={"newuidmap": True, "newgidmap": True},
    subuids=65536,
    subgids=65536,
    sysctls=_SYSCTLS,
    namespaces=True,
    layout="v2",
    network_trouble="",
    storage_driver="overlay",
    images=("localhost/puhui/base:latest",),
    image="localhost/puhui/base:latest",
)


def test_a_host_with_all_that_containers_need_is_ok() -> None:
    assert _levels(judge_containers(_CONTAINERS)) == {Level.OK}


@pytest.mark.parametrize(
    ("change", "check", "level", "command"),
    [
        ({"person": False}, "user", Level.PROBLEM, "useradd --system"),
        ({"is_root": True}, "user", Level.PROBLEM, "--podman-user"),
        ({"podman_version": "3.4.4"}, "podman-version", Level.PROBLEM, "apt-get"),
        ({"podman_version": ""}, "podman-version", Level.UNKNOWN, "podman --version"),
        ({"oci_runtimes": ()}, "oci-runtime", Level.PROBLEM, "apt-get install runc"),
        ({"layout": "hybrid"}, "oci-runtime", Level.PROBLEM, "apt-get install runc"),
        ({"mappers": {"newuidmap": False}}, "newuidmap", Level.PROBLEM, "chmod u+s"),
        ({"mappers": {"newgidmap": None}}, "newgidmap", Level.UNKNOWN, "getcap"),
        ({"subuids": 0}, "subuid", Level.PROBLEM, "usermod --add-subuids"),
        ({"subgids": 1000}, "subgid", Level.PROBLEM, "usermod --add-subgids"),
        ({"subgids": None}, "subgid", Level.UNKNOWN, "cat /etc/subgid"),
        ({"sysctls": {**_SYSCTLS, "max_user_namespaces": 0}}, "user-namespaces", Level.PROBLEM, "sysctl -w user."),
        (
            {"sysctls": {**_SYSCTLS, "unprivileged_userns_clone": 0}},
            "user-namespaces",
            Level.PROBLEM,
            "kernel.unprivileged_userns_clone=1",
        ),
        (
            {"sysctls": {**_SYSCTLS, "apparmor_restrict_unprivileged_userns": 1}, "namespaces": False},
            "user-namespaces",
            Level.UNKNOWN,
            "apparmor_restrict",
        ),
        ({"namespaces": False}, "user-namespaces", Level.PROBLEM, "unshare"),
        ({"namespaces": None}, "user-namespaces", Level.UNKNOWN, "unshare"),
        ({"storage_driver": "vfs"}, "storage", Level.PROBLEM, "mv "),
        ({"storage_driver": None}, "storage", Level.UNKNOWN, "sudo"),
        ({"storage_driver": ""}, "storage", Level.OK, ""),
        ({"network_trouble": "no tun: run `chmod a+rw /dev/net/tun`"}, "network", Level.NOTICE, "chmod a+rw"),
        ({"network_trouble": None}, "network", Level.UNKNOWN, "ls -l /dev/net/tun"),
        ({"images": ()}, "base-image", Level.NOTICE, "scripts/base-image"),
        ({"images": None}, "base-image", Level.UNKNOWN, "image exists"),
    ],
)
def test_each_thing_that_containers_lack_is_told(
    change: dict[str, object], check: str, level: Level, command: str
) -> None:
    finding = _found(judge_containers(replace(_CONTAINERS, **change)), check)  # type: ignore[arg-type]
    assert (finding.level, command in finding.command) == (level, True)


def test_a_host_with_nothing_installed_is_told_all_of_it() -> None:
    bare = replace(
        _CONTAINERS,
        person=False,
        programs=dict.fromkeys(_CONTAINERS.programs, False),
        oci_runtimes=(),
        podman_version="",
        mappers={},
        subuids=None,
        subgids=None,
        namespaces=None,
        network_trouble=None,
        storage_driver=None,
        images=None,
    )
    findings = judge_containers(bare)
    problems = {one.check for one in findings if one.level is Level.PROBLEM}
    assert problems == {"user", "podman", "newuidmap", "newgidmap", "setpriv", "catatonit", "oci-runtime"}
    assert not verdict(findings, emulated=False).can_serve


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("puhui:100000:65536\n", 65536),
        ("other:100000:65536\n", 0),
        ("999:100000:65536\npuhui:300000:1000\n", 66536),
        ("puhui:100000\nnonsense\n\n# puhui:1:1\n", 0),
    ],
)
def test_subordinate_ids_are_counted_by_name_and_by_number(text: str, count: int) -> None:
    assert subordinate_ids(text, ("puhui", "999")) == count


# State ---------------------------------------------------------------------------------------------------------

_STATE = StateFacts(
    path=Path("/var/lib/puhui/node"),
    kind="directory",
    near=Path("/var/lib/puhui/node"),
    writable=True,
    reachable=True,
    user="puhui",
    file_system="ext4",
    free_bytes=2**40,
    free_inodes=10**6,
    leases=True,
    fsync_s=0.001,
    holder=None,
)


def test_a_sound_state_directory_is_ok() -> None:
    assert _levels(judge_state(_STATE, emulated=True)) == {Level.OK}


@pytest.mark.parametrize(
    ("change", "check", "level"),
    [
        ({"kind": "missing"}, "state", Level.OK),
        ({"kind": "hidden"}, "state", Level.UNKNOWN),
        ({"kind": "other"}, "state", Level.PROBLEM),
        ({"writable": False}, "state", Level.PROBLEM),
        ({"reachable": False}, "state-reach", Level.PROBLEM),
        ({"reachable": None}, "state-reach", Level.UNKNOWN),
        ({"file_system": "nfs4"}, "file-system", Level.PROBLEM),
        ({"file_system": "tmpfs"}, "file-system", Level.NOTICE),
        ({"file_system": ""}, "file-system", Level.UNKNOWN),
        ({"free_bytes": 2**20}, "space", Level.PROBLEM),
        ({"free_bytes": 2**30}, "space", Level.NOTICE),
        ({"free_inodes": 5}, "inodes", Level.NOTICE),
        ({"free_inodes": None}, "inodes", Level.OK),
        ({"leases": False}, "leases", Level.PROBLEM),
        ({"leases": None}, "leases", Level.UNKNOWN),
        ({"fsync_s": 0.1}, "fsync", Level.NOTICE),
        ({"fsync_s": None}, "fsync", Level.UNKNOWN),
        ({"holder": 77}, "daemon", Level.NOTICE),
        ({"holder": 0}, "daemon", Level.UNKNOWN),
    ],
)
def test_each_flaw_of_a_state_directory_is_told(change: dict[str, object], check: str, level: Level) -> None:
    assert _found(judge_state(replace(_STATE, **change), emulated=True), check).level is level  # type: ignore[arg-type]


def test_leases_only_matter_to_emulated_cards() -> None:
    assert _levels(judge_state(replace(_STATE, leases=False), emulated=False)) == {Level.OK}


# Host ----------------------------------------------------------------------------------------------------------

_HOST = HostFacts(
    who="the running daemon",
    layout="v2",
    cgroup=ContainerCgroup("/x.service/containers", ("cpu", "memory", "pids"), freezer=True),
    files=2**20,
    inotify_instances=1024,
    synchronised=True,
    runtime_dir="/run/puhui/podman-999",
    linger=False,
    user="puhui",
)


def test_a_host_with_all_that_a_daemon_wants_is_ok() -> None:
    assert _levels(judge_host(_HOST)) == {Level.OK}


@pytest.mark.parametrize(
    ("change", "check", "level"),
    [
        ({"layout": "hybrid"}, "limits", Level.NOTICE),
        ({"layout": "v1"}, "pause", Level.NOTICE),
        ({"cgroup": None}, "limits", Level.UNKNOWN),
        ({"cgroup": None}, "pause", Level.UNKNOWN),
        ({"cgroup": ContainerCgroup("/x/containers", ("pids",), freezer=True)}, "limits", Level.NOTICE),
        ({"cgroup": ContainerCgroup("/x/containers", ("pids",), freezer=True)}, "pause", Level.OK),
        ({"cgroup": ContainerCgroup(no_limits="why", no_freezer="why")}, "pause", Level.NOTICE),
        ({"files": 1024}, "open-files", Level.NOTICE),
        ({"files": None}, "open-files", Level.UNKNOWN),
        ({"inotify_instances": 8}, "inotify", Level.NOTICE),
        ({"inotify_instances": None}, "inotify", Level.UNKNOWN),
        ({"synchronised": False}, "clock", Level.NOTICE),
        ({"synchronised": None}, "clock", Level.UNKNOWN),
        ({"runtime_dir": "/run/user/1000/puhui-podman"}, "linger", Level.NOTICE),
        ({"runtime_dir": "/run/user/1000/puhui-podman", "linger": True}, "linger", Level.OK),
    ],
)
def test_each_thing_that_the_host_lacks_is_told_and_stops_nothing(
    change: dict[str, object], check: str, level: Level
) -> None:
    findings = judge_host(replace(_HOST, **change))  # type: ignore[arg-type]
    assert _found(findings, check).level is level
    assert verdict(findings, emulated=False).can_serve


def test_why_processes_are_refused_is_told() -> None:
    assert judge_processes(ProcessFacts(""))[0].level is Level.OK
    refused = judge_processes(ProcessFacts("there is a real GPU"))[0]
    assert refused.level is Level.PROBLEM
    assert "there is a real GPU" in refused.text


# Reports -------------------------------------------------------------------------------------------------------


def _report() -> Report:
    findings = (
        ok("podman", "podman is installed"),
        problem("driver", "no driver " * 30, "modprobe nvidia", Ability.CARDS),
    )
    return Report((Section("Cards", findings),), verdict(findings, emulated=False), False)


def test_the_table_ends_with_the_verdict_and_has_no_colours_off_a_terminal() -> None:
    output = io.StringIO()
    print_table(_report(), output)
    lines = output.getvalue().splitlines()
    assert lines[-1] == "This host cannot serve real cards: see driver."
    assert "\x1b" not in output.getvalue()
    assert any(line.strip() == "→ modprobe nvidia" for line in lines)
    assert max(len(line) for line in lines) <= 120
    assert lines == [line.rstrip() for line in lines]


def test_json_holds_all_of_it_in_one_object() -> None:
    told = json.loads(as_json(_report()))
    assert told["can_serve"] is False
    assert [one["level"] for one in told["findings"]] == ["ok", "problem"]
    assert told["findings"][1]["needed_for"] == ["cards"]
    assert told["findings"][1]["command"] == "modprobe nvidia"
