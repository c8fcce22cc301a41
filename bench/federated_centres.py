"""Real centres as processes, peers of each other over relays that delay."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.daemons import daemon, open_folder
from bench.delay_relay import RelayProcess, relay_process
from puhui.client import Centre
from puhui.rpc.moment import duration
from puhui.v1.job_pb2 import JOB_STATE_RUNNING, JobSpec, PeerPolicy, Resources

__all__ = ["Site", "federated", "fill"]

_READY_S = 60.0
_LOOK_S = 0.02
_FULL_S = 3600.0


@dataclass(frozen=True)
class Site:
    """One centre."""

    name: str
    address: str
    """Where its control plane serves."""
    centre: Centre
    """A connection to its control plane."""


@contextlib.contextmanager
def federated(cards: Sequence[str], runtime: str) -> Iterator[tuple[list[Site], RelayProcess]]:
    """Runs centres until the block ends. The first one and each other are peers of each other, over relays.

    Args:
        cards: emulated cards of each centre, "MODEL:COUNT,...".
        runtime: "podman" or "process".

    Yields:
        The centres, and the relays: number 0 leads to the first centre, number n to the one after n others.

    Raises:
        RuntimeError: something did not start, or they do not come into contact.
    """
    with open_folder() as folder, contextlib.ExitStack() as stack:
        sites = [stack.enter_context(_site(folder / f"c{number}", number, cards)) for number in range(len(cards))]
        relays = stack.enter_context(relay_process([site.centre.peers().address for site in sites]))
        first = sites[0]
        for other, address in zip(sites[1:], relays.addresses[1:], strict=True):
            invitation = other.centre.invite_peer(address=address)
            first.centre.add_peer(invitation.token, address=relays.addresses[0])
        # Nodes last: what they have is then told over connections that are there.
        for number, site in enumerate(sites):
            stack.enter_context(_node(folder / f"c{number}", site, cards[number], runtime))
        for site in sites:
            _await(lambda site=site: len(list(site.centre.nodes())) == 1, f"the node of {site.name} does not register")  # type: ignore[misc]
            _await(
                lambda site=site: all(peer.in_contact and peer.profiles for peer in site.centre.peers().peers),  # type: ignore[misc]
                f"the peers of {site.name} do not come into contact",
            )
        yield sites, relays


@contextlib.contextmanager
def _site(folder: Path, number: int, cards: Sequence[str]) -> Iterator[Site]:
    folder.mkdir(mode=0o711)
    name = f"bench-{number + 1}"
    arguments = ["--listen", "127.0.0.1:0", "--federation-listen", "127.0.0.1:0", "--centre", name]
    arguments += ["--state", str(folder / "controlplane"), "--join-token-file", str(folder / "join-token")]
    with daemon("controlplane", arguments, folder / "controlplane.log") as address, Centre(address) as centre:
        yield Site(name, address, centre)


@contextlib.contextmanager
def _node(folder: Path, site: Site, cards: str, runtime: str) -> Iterator[None]:
    arguments = ["--listen", "127.0.0.1:0", "--name", site.name, "--control-plane", site.address]
    arguments += ["--state", str(folder / "node"), "--join-token-file", str(folder / "join-token")]
    arguments += ["--emulate", cards, "--runtime", runtime]
    with daemon("nodedaemon", arguments, folder / "node.log"):
        yield


def _await(is_so: Callable[[], bool], complaint: str) -> None:
    deadline = time.monotonic() + _READY_S
    while not is_so():
        if time.monotonic() > deadline:
            raise RuntimeError(complaint)
        time.sleep(_LOOK_S)


@contextlib.contextmanager
def fill(site: Site, profile: str, count: int = 1) -> Iterator[None]:
    """Keeps all shares of a centre taken until the block ends, by jobs that say how long they take."""
    spec = JobSpec(
        name="full",
        command=["sleep", str(int(_FULL_S))],
        resources=Resources(profile=profile),
        max_duration=duration(_FULL_S),
        peers=PeerPolicy(here_only=True),
    )
    jobs = [site.centre.submit(spec, {"full.py": b"pass\n"}) for _ in range(count)]
    try:
        for job in jobs:
            _await(lambda job=job: site.centre.get(job.id).state == JOB_STATE_RUNNING, f"{site.name} is not full")  # type: ignore[misc]
        yield
    finally:
        for job in jobs:
            site.centre.cancel(job.id)
            site.centre.wait(job.id, timeout_s=_READY_S)
