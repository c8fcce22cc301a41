"""The device nodes and cap nodes of the real driver: are they there, and may the daemon use them?"""

from __future__ import annotations

import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from nodedaemon.device_files import CONFIG, MONITOR, capabilities
from nodedaemon.devices import CardDevices, read_minors
from nodedaemon.doctor.findings import Ability, Finding, notice, ok, problem, unknown

__all__ = ["Node", "NodeFacts", "judge_nodes", "look_at_nodes"]

_PREPARE = "puhui-nodedaemon prepare"
_CARDS = Ability.CARDS


@dataclass(frozen=True)
class Node:
    """One device node."""

    path: Path
    present: bool
    """Whether a character device is there."""
    readable: bool | None
    """By the daemon's user; None when it cannot be said."""


@dataclass(frozen=True)
class NodeFacts:
    """The device files of the real driver."""

    user: str
    by_root: bool
    """The daemon is asked for by root, who may use every capability."""
    control: tuple[Node, ...]
    """nvidiactl and nvidia-uvm."""
    minors_readable: bool
    config: Node | None
    """None when the driver does not say its minor."""
    monitor: Node | None
    config_reset: bool | None
    """Whether nvidia-modprobe would take the permission on config away again; None when it cannot be said."""
    missing: tuple[str, ...]
    """Names of existing instances without a node."""


def look_at_nodes(
    root: Path, cards: CardDevices, user: str, may: Callable[[str, Path], bool | None], *, by_root: bool
) -> NodeFacts:
    """Looks at the device files.

    Args:
        root: where /dev and /proc are to be found; "/" but in tests.
        cards: where the driver keeps its files.
        user: name of the daemon's user.
        may: says whether test(1) with a flag holds for that user.
        by_root: the daemon is asked for by root.
    """

    def node(path: Path) -> Node:
        try:
            present = stat.S_ISCHR(path.stat().st_mode)
        except FileNotFoundError:
            return Node(path, False, False)
        except OSError:
            return Node(path, True, None)
        return Node(path, present, may("-r", path))

    try:
        minors = read_minors(cards.minors.read_text())
    except OSError:
        minors = {}
    try:
        known = capabilities(root)
    except OSError:
        known = []

    def cap(name: str) -> Node | None:
        return node(cards.caps / f"nvidia-cap{minors[name]}") if name in minors else None

    return NodeFacts(
        user=user,
        by_root=by_root,
        control=tuple(node(root / "dev" / name) for name in ("nvidiactl", "nvidia-uvm")),
        minors_readable=bool(minors),
        config=cap(CONFIG),
        monitor=cap(MONITOR),
        config_reset=next((one.modify for one in known if one.name == CONFIG), None),
        missing=tuple(
            one.name
            for one in known
            if one.name.endswith("/access") and not node(cards.caps / f"nvidia-cap{one.minor}").present
        ),
    )


def judge_nodes(facts: NodeFacts) -> list[Finding]:
    """Says what the device files are good for."""
    findings = [_control(one) for one in facts.control]
    if not facts.minors_readable:
        findings.append(
            problem(
                "cap-nodes",
                "/proc/driver/nvidia-caps/mig-minors cannot be read: the driver has no MIG capabilities, or is too old",
                "ls -l /proc/driver/nvidia-caps && nvidia-smi",
                _CARDS,
            )
        )
        return findings
    findings.append(_config(facts))
    findings.append(_monitor(facts))
    if facts.missing:
        findings.append(
            problem(
                "slice-nodes",
                f"{len(facts.missing)} existing instances have no cap node, {facts.missing[0]} among them",
                _PREPARE,
                _CARDS,
            )
        )
    else:
        findings.append(ok("slice-nodes", "every existing instance has its cap node"))
    return findings


def _control(node: Node) -> Finding:
    name = node.path.name
    if not node.present:
        return problem(name, f"{node.path} is missing", _PREPARE, _CARDS)
    if node.readable is None:
        return unknown(name, f"{node.path} is there, but cannot be looked at", f"ls -l {node.path}", _CARDS)
    if not node.readable:
        return problem(name, f"{node.path} may not be read by the daemon's user", f"chmod 0666 {node.path}", _CARDS)
    return ok(name, f"{node.path} is there")


def _config(facts: NodeFacts) -> Finding:
    check, node, user = "cap-config", facts.config, facts.user
    if node is None:
        return unknown(check, "the driver does not say which node lets create slices", "nvidia-smi", _CARDS)
    if not node.present:
        return problem(check, f"{node.path}, which lets create slices, is missing", _PREPARE, _CARDS)
    if node.readable is None:
        return unknown(check, f"whether {user} may read {node.path} cannot be said", f"ls -l {node.path}", _CARDS)
    if not node.readable and facts.by_root:
        return notice(check, f"root may create slices, but a daemon run by {user} may not: {node.path}", _PREPARE)
    if not node.readable:
        return problem(check, f"user {user} may not read {node.path}, so may not create slices", _PREPARE, _CARDS)
    if facts.config_reset is None:
        return unknown(
            check,
            f"user {user} may create slices; whether nvidia-modprobe will take that away again cannot be said",
            "cat /proc/driver/nvidia/capabilities/mig/config",
        )
    if facts.config_reset and not facts.by_root:
        return notice(check, f"user {user} may create slices until nvidia-modprobe next resets {node.path}", _PREPARE)
    return ok(check, f"user {user} may create slices: {node.path} is readable")


def _monitor(facts: NodeFacts) -> Finding:
    check, node, user = "cap-monitor", facts.monitor, facts.user
    if node is None or node.readable is None:
        return unknown(
            check, f"whether {user} may watch slices by GPM cannot be said", "ls -l /dev/nvidia-caps/nvidia-cap2"
        )
    if not node.present or not node.readable:
        return notice(check, f"user {user} may not read {node.path}, so slices may go unwatched", _PREPARE)
    return ok(check, f"user {user} may watch slices: {node.path} is readable")
