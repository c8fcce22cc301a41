"""Hosts in network namespaces of their own, with a router between them whose links and directions can be cut.

Needs root, as the whole suite does in CI. The kernel here may have no netem, so delay is emulated by
`bench.delay_relay`; cuts and losses are real: a link that is down, packets that the router drops.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from bench.delay_relay import relay_process

_PATIENCE_S = 20.0


@dataclass(frozen=True)
class Network:
    """A router and the hosts behind it.

    Attributes:
        prefix: of the names of its namespaces.
        hosts: their names.
        spaces_of_time: the files of the time namespaces of those hosts that were up for longer than this machine.
    """

    prefix: str
    hosts: tuple[str, ...]
    spaces_of_time: Mapping[str, str] = field(default_factory=dict)

    def address(self, host: str) -> str:
        """Returns the IPv4 address of a host."""
        return f"10.213.{self.hosts.index(host) + 1}.2"

    @property
    def addresses(self) -> list[str]:
        """Of every host, in order."""
        return [self.address(host) for host in self.hosts]

    def within(self, host: str) -> list[str]:
        """Returns the command that enters a host's network and its clocks, and nothing else of it."""
        clocks = [f"--time={self.spaces_of_time[host]}"] if host in self.spaces_of_time else []
        return ["nsenter", f"--net=/run/netns/{self._space(host)}", *clocks]

    def cut(self, host: str) -> None:
        """Takes a host's link down."""
        self._ip("-n", self._space("router"), "link", "set", f"to-{host}", "down")

    def mend(self, host: str) -> None:
        """Puts it up again."""
        self._ip("-n", self._space("router"), "link", "set", f"to-{host}", "up")

    @contextlib.contextmanager
    def without(self, host: str) -> Iterator[None]:
        """A host is cut off for as long as the block lasts."""
        self.cut(host)
        try:
            yield
        finally:
            self.mend(host)

    @contextlib.contextmanager
    def dropping(self, source: str, target: str) -> Iterator[None]:
        """What one host sends to another is lost for as long as the block lasts; the other direction works."""
        rule = ["FORWARD", "-s", self.address(source), "-d", self.address(target), "-j", "DROP"]
        self._filter("-I", rule)
        try:
            yield
        finally:
            self._filter("-D", rule)

    @contextlib.contextmanager
    def far_apart(self, port: int) -> Iterator[Callable[[float], None]]:
        """Has the router delay every connection to a port of a host that is made while the block lasts.

        Yields:
            What sets the delay of either direction, in seconds. It is emulated, see `bench.delay_relay`.
        """
        upstreams = [f"{address}:{port}" for address in self.addresses]
        self._route("conf/all/route_localnet")
        with relay_process(upstreams, self.within("router")) as relay:
            for address, relayed in zip(self.addresses, relay.addresses, strict=True):
                rule = ["PREROUTING", "-d", address, "-p", "tcp", "--dport", str(port), "-j", "DNAT"]
                self._filter("-A", [*rule, "--to-destination", relayed], table="nat")
            yield relay.delay

    def _filter(self, what: str, rule: Sequence[str], table: str = "filter") -> None:
        _run([*self.within("router"), "iptables", "-w", "-t", table, what, *rule])

    def _route(self, setting: str) -> None:
        _run([*self.within("router"), "sh", "-c", f"echo 1 > /proc/sys/net/ipv4/{setting}"])

    def _space(self, host: str) -> str:
        return f"{self.prefix}-{host}"

    def _ip(self, *arguments: str) -> None:
        _run(["ip", *arguments])

    def _make(self) -> None:
        for host in ("router", *self.hosts):
            self._ip("netns", "add", self._space(host))
            self._ip("-n", self._space(host), "link", "set", "lo", "up")
        router = self._space("router")
        self._route("ip_forward")
        for number, host in enumerate(self.hosts, 1):
            space = self._space(host)
            pair = ["type", "veth", "peer", "name", "uplink", "netns", space]
            self._ip("-n", router, "link", "add", f"to-{host}", *pair)
            self._ip("-n", router, "address", "add", f"10.213.{number}.1/24", "dev", f"to-{host}")
            self._ip("-n", space, "address", "add", f"10.213.{number}.2/24", "dev", "uplink")
            self._ip("-n", router, "link", "set", f"to-{host}", "up")
            self._ip("-n", space, "link", "set", "uplink", "up")
            self._ip("-n", space, "route", "add", "default", "via", f"10.213.{number}.1")

    def _remove(self) -> None:
        for host in ("router", *self.hosts):
            subprocess.run(["ip", "netns", "delete", self._space(host)], check=False, capture_output=True)


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=_PATIENCE_S)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")


@contextlib.contextmanager
def network(*hosts: str, longer_up_s: Mapping[str, int] | None = None) -> Iterator[Network]:
    """Makes hosts and a router; all of it is gone when the block ends.

    Args:
        hosts: their names.
        longer_up_s: by host, for how much longer it has been up than this machine, in seconds. The clocks that count
            from the start of a host, CLOCK_MONOTONIC and CLOCK_BOOTTIME, are so much ahead there, by the kernel.
    """
    with contextlib.ExitStack() as stack:
        spaces = {host: stack.enter_context(_ahead(seconds)) for host, seconds in (longer_up_s or {}).items()}
        made = Network(f"puhui-{os.getpid()}", hosts, spaces)
        stack.callback(made._remove)
        made._make()
        yield made


@contextlib.contextmanager
def _ahead(seconds: int) -> Iterator[str]:
    """Makes a time namespace that is there until the block ends, and yields its file."""
    offsets = ["--monotonic", str(seconds), "--boottime", str(seconds)]
    command = ["unshare", "--time", *offsets, "sh", "-c", "echo there; exec sleep infinity"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            if process.stdout.readline() != "there\n":
                raise RuntimeError("no time namespace could be made; see `unshare --time`")
            yield f"/proc/{process.pid}/ns/time_for_children"
        finally:
            process.kill()
