"""What `puhui up` says about the centres of this machine when they serve."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from typing import Any

import puhui
from puhui.cli.fleet import cards_of, runtime_of
from puhui.cli.local_state import CentreRecord, Record, StateFolder, default_state, local_command
from puhui.cli.message_json import json_of
from puhui.cli.terminal import terminal
from puhui.client import DEFAULT_ADDRESS, Centre, Refusal
from puhui.v1 import fleet_service_pb2

__all__ = ["announce"]

_JOIN_S = 20.0
_LOOK_S = 0.05
_EMULATED = "EMULATED CARDS: no GPU computes, code runs on the CPU."


@dataclass(frozen=True)
class _Seen:
    """A centre, as it shows itself."""

    record: CentreRecord
    node: fleet_service_pb2.Node | None
    """Its node; None when it has not joined."""
    peers: dict[str, bool]
    """Whether it is in contact with a peer, by name."""

    @property
    def cards(self) -> str:
        return ", ".join(cards_of(self.node.inventory)) if self.node else "none: the node daemon has not joined"

    def document(self) -> dict[str, Any]:
        """Returns it for scripts."""
        return {
            "name": self.record.name,
            "address": self.record.address,
            "federation_address": self.record.federation_address,
            "state": self.record.state,
            "emulated": True,
            "node": json_of(self.node) if self.node is not None else None,
            "peers": [{"name": name, "in_contact": contact} for name, contact in self.peers.items()],
        }


def announce(folder: StateFolder, record: Record, *, detached: bool) -> None:
    """Says where the centres serve, what is emulated, and what to do next."""
    first, *others = seen = [_look(centre, several=len(record.centres) > 1) for centre in record.centres]
    screen = terminal()
    if screen.as_json:
        of_first = first.document()
        top = {key: of_first[key] for key in ("address", "emulated", "node")}
        places = {"state": str(folder.path), "logs": str(folder.logs)}
        screen.json({**top, **places, "centres": [one.document() for one in seen]})
        return
    runtime = runtime_of(first.node.inventory.runtime) if first.node else "unknown"
    lines = _of_several(seen) if others else _of_one(first)
    lines += [("containers", runtime), ("state", str(folder.path)), ("logs", _logs(folder, others))]
    lines += [("try", text) for text in _try(folder, seen)]
    lines.append(("stop", local_command("down", folder.path) if detached else "Ctrl-C"))
    said = ""
    for label, text in lines:
        screen.text(f"{'' if label == said else label:<11} {text}\n")
        said = label
    for notice in first.node.inventory.runtime.notices if first.node else ():
        screen.note(notice, "note")


def _of_one(seen: _Seen) -> list[tuple[str, str]]:
    return [
        ("puhui", f"{puhui.__version__}, a local centre. {_EMULATED}"),
        ("serves at", seen.record.address),
        ("cards", seen.cards),
    ]


def _of_several(seen: list[_Seen]) -> list[tuple[str, str]]:
    paired = all(one.peers and all(one.peers.values()) for one in seen)
    peers = "each of all others" if paired else "not all of them: see `puhui peers list`"
    return [
        ("puhui", f"{puhui.__version__}, {len(seen)} local centres. {_EMULATED}"),
        *((one.record.name, f"serves at {one.record.address}, cards: {one.cards}") for one in seen),
        ("peers", peers),
    ]


def _logs(folder: StateFolder, others: list[_Seen]) -> str:
    return str(folder.logs) + (f", and {folder.path}/NAME/logs of the others" if others else "")


def _try(folder: StateFolder, seen: list[_Seen]) -> list[str]:
    first, *others = seen
    export = [] if first.record.address == DEFAULT_ADDRESS else [f"export PUHUI_SERVER={first.record.address}"]
    # A name is looked up in the default state only.
    by_name = folder.path == default_state()
    there = [f"puhui ps --server {one.record.name if by_name else one.record.address}" for one in others[:1]]
    return [*export, "puhui run train.py", *there]


def _look(centre: CentreRecord, *, several: bool) -> _Seen:
    """Waits until a centre's node has joined, or that takes too long, and looks at the centre then."""
    node: fleet_service_pb2.Node | None = None
    peers: dict[str, bool] = {}
    deadline = time.monotonic() + _JOIN_S
    # A control plane that has died already is started again in a moment, and is seen as it was until then.
    with Centre(centre.address) as client, contextlib.suppress(Refusal):
        while node is None and time.monotonic() < deadline:
            found = (one for one in client.nodes() if one.state == fleet_service_pb2.NODE_STATE_READY)
            node = next((one for one in found if one.inventory.gpus), None)
            if node is None:
                time.sleep(_LOOK_S)
        if several:
            peers = {peer.name: peer.in_contact for peer in client.peers().peers}
    return _Seen(centre, node, peers)
