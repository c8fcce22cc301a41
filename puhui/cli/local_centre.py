"""One centre in processes of this machine: a control plane and a node daemon with emulated cards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from puhui.cli.local_daemon import LocalDaemon
from puhui.cli.local_state import CentreRecord
from puhui.cli.ports import free_port, is_free

__all__ = ["FIRST", "MOST_CENTRES", "LocalCentre", "LocalOptions", "centre_name"]

_Arguments = Callable[[str], Sequence[str]]

FIRST = "local"
"""Name of the first centre of a machine."""
MOST_CENTRES = 8
"""So many centres are run on one machine at most."""


def centre_name(number: int) -> str:
    """Returns the name of a machine's centre, counted from 1: local, local-2, local-3, ..."""
    return FIRST if number == 1 else f"{FIRST}-{number}"


@dataclass(frozen=True)
class LocalOptions:
    """What the centres of this machine are to be like."""

    emulate: tuple[str, ...]
    """Emulated cards of each centre, "MODEL:COUNT,...". There are as many centres as there are of these."""
    port: int
    """Port of the first centre's control plane on loopback; 0 is any free one, for every centre."""
    runtime: str
    """"auto", "podman" or "process"."""
    image: str
    """Default image; empty is the node daemon's."""
    podman_user: str
    """User that owns the containers when we are root; empty is the node daemon's default."""
    log_level: str
    """Level of the daemons' logs."""

    def arguments(self) -> list[str]:
        """Returns them as arguments of `puhui up`."""
        return [
            *("--centers", str(len(self.emulate)), "--port", str(self.port), "--runtime", self.runtime),
            *(word for cards in self.emulate for word in ("--emulate", cards)),
            *("--image", self.image, "--podman-user", self.podman_user, "--log-level", self.log_level),
        ]


class LocalCentre:
    """The two daemons of one centre, and what they are started with.

    Args:
        number: which centre of this machine; the first is 1.
        path: folder of its state; one that an earlier `puhui up` has left is taken up.
        options: what it is to be like.
        port: port of its control plane on loopback; 0 is any free one.
    """

    def __init__(self, number: int, path: Path, options: LocalOptions, port: int) -> None:
        self.name = centre_name(number)
        self.path = path
        self.logs = path / "logs"
        self.cards = options.emulate[number - 1]
        self._options = options
        self._port = port
        self._federation_port = 0
        self.controlplane = self._daemon("controlplane", self._controlplane_arguments)
        self.node = self._daemon("nodedaemon", self._node_arguments)

    @property
    def address(self) -> str:
        """Where its control plane serves; "" before it first did."""
        return self.controlplane.address

    @property
    def federation_address(self) -> str:
        """Where its control plane serves its peers."""
        return f"127.0.0.1:{self._federation_port}"

    def prepare(self) -> None:
        """Makes its folders, and chooses where it serves its peers.

        Raises:
            OSError: they cannot be made.
        """
        # The user that owns the containers passes through; what is secret has modes of its own.
        self.path.mkdir(parents=True, exist_ok=True, mode=0o755)
        self.logs.mkdir(exist_ok=True)
        # Peers keep the address at which they reach it, so the port stays for as long as the state does.
        kept = self.path / "federation-port"
        said = kept.read_text() if kept.exists() else ""
        port = int(said) if said.isdecimal() else 0
        self._federation_port = port if port and is_free(port) else free_port()
        kept.write_text(str(self._federation_port))

    def record(self) -> CentreRecord:
        """Returns what others want to know of it."""
        return CentreRecord(
            self.name, self.address, self.node.address, self.federation_address, self.cards, str(self.path)
        )

    def _daemon(self, module: str, arguments: _Arguments) -> LocalDaemon:
        first = self.name == FIRST
        return LocalDaemon(
            module if first else f"{self.name}/{module}",
            module if first else f"{module} of {self.name}",
            module,
            arguments,
            self.logs / f"{module}.log",
        )

    def _controlplane_arguments(self, address: str) -> list[str]:
        return [
            *("--listen", address or f"127.0.0.1:{self._port}", "--centre", self.name),
            *("--federation-listen", self.federation_address),
            *("--join-token-file", str(self._token), *self._common("controlplane")),
        ]

    def _node_arguments(self, address: str) -> list[str]:
        options = self._options
        return [
            *("--listen", address or "127.0.0.1:0", "--name", self.name, "--control-plane", self.address),
            *("--join-token-file", str(self._token), "--emulate", self.cards, "--runtime", options.runtime),
            *(("--image", options.image) if options.image else ()),
            *(("--podman-user", options.podman_user) if options.podman_user else ()),
            *self._common("nodedaemon"),
        ]

    @property
    def _token(self) -> Path:
        return self.path / "join-token"

    def _common(self, module: str) -> Sequence[str]:
        return "--state", str(self.path / module), "--log-level", self._options.log_level
