"""`puhui peers`: other centres, to which waiting jobs may go, and from which they may come."""

from __future__ import annotations

import re
import sys
import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated

import grpc
import typer
from rich.text import Text

from puhui.cli.connection import connect
from puhui.cli.job_options import json_flag, server_option
from puhui.cli.message_json import json_of
from puhui.cli.peer_terms import agreed
from puhui.cli.spec_options import pair, takes_options
from puhui.cli.terminal import Mistake, table, terminal
from puhui.cli.words import age, size, span
from puhui.rpc.errors import Refusal
from puhui.rpc.moment import moment, seconds
from puhui.rpc.quantities import parse_duration, parse_size
from puhui.v1.federation_service_pb2 import CapacitySummary
from puhui.v1.peer_service_pb2 import Peer, PeerTerms

__all__ = ["TermsOptions", "add_commands"]

Server = Annotated[str | None, server_option]
Json = Annotated[bool, json_flag]

_MILLISECOND = 1e-3
_LATE_S = 1.0
_AS_SAID = (
    *("transit", "most_sent", "most_received", "weight", "cost", "distance", "hours"),
    *("most_calls_a_second", "highest_priority"),
)


@dataclass(frozen=True)
class TermsOptions:
    """What was written about the terms of a peer; None is not said."""

    send: Annotated[bool | None, typer.Option("--send/--no-send", help="Whether work is sent there.")] = None
    receive: Annotated[bool | None, typer.Option("--receive/--no-receive", help="Whether its work is taken.")] = None
    transit: Annotated[
        bool | None,
        typer.Option("--transit/--no-transit", help="Whether what comes from one peer may go on to another."),
    ] = None
    tenants: Annotated[
        str | None, typer.Option(metavar="A,B", help='Tenants whose jobs may go there; "" is all of them.')
    ] = None
    map_out: Annotated[
        list[str] | None,
        typer.Option(metavar="OURS=THEIRS", help="Name by which it knows a tenant of ours; may be repeated."),
    ] = None
    map_in: Annotated[
        list[str] | None,
        typer.Option(metavar="THEIRS=OURS", help="Our tenant for one of its; may be repeated."),
    ] = None
    most_sent: Annotated[int | None, typer.Option(min=0, help="Jobs of ours there at once; 0 is 100.")] = None
    most_received: Annotated[int | None, typer.Option(min=0, help="Jobs of its here at once; 0 is 100.")] = None
    weight: Annotated[
        float | None, typer.Option(min=0.0, help="Of two that promise the same, the greater weight gets it; 0 is 1.")
    ] = None
    cost: Annotated[float | None, typer.Option(min=0.0, help="Relative cost of work there; 0 is 1.")] = None
    distance: Annotated[
        float | None, typer.Option(min=0.0, help="Nearer ones are asked first; 0 is the measured round trip in ms.")
    ] = None
    hours: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT",
            help='When its work is taken, "mon-fri 20:00-08:00, sat-sun 00:00-24:00"; "mon 20:00-20:00" is 24 hours; '
            '"" is always.',
        ),
    ] = None
    label: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="What holds of that centre, such as region=eu; may be repeated."),
    ] = None
    most_bundle: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Largest bundle that is taken from it; 0 is the centre's own limit."),
    ] = None
    most_bytes_a_day: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Bytes that are taken from it in a day; 0 is 100GiB.")
    ] = None
    most_result: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Largest results of one job that come from it; 0 is 64GiB.")
    ] = None
    most_calls_a_second: Annotated[int | None, typer.Option(min=0, help="Calls a second; 0 is 100.")] = None
    highest_priority: Annotated[
        int | None, typer.Option(min=-100, max=100, help="The highest priority that its jobs get here.")
    ] = None

    def apply(self, terms: PeerTerms) -> None:
        """Changes what was said, and nothing else.

        Raises:
            Mistake: it cannot be meant.
        """
        for name in _AS_SAID:
            value = getattr(self, name)
            if value is not None:
                setattr(terms, name, value)
        if self.send is not None:
            terms.send_off = not self.send
        if self.receive is not None:
            terms.receive_off = not self.receive
        if self.tenants is not None:
            del terms.tenants[:]
            terms.tenants.extend(part.strip() for part in self.tenants.split(",") if part.strip())
        self._apply_pairs(terms)
        if self.most_bundle is not None:
            terms.most_bundle_bytes = _bytes("--most-bundle", self.most_bundle)
        if self.most_result is not None:
            terms.most_result_bytes = _bytes("--most-result", self.most_result)
        if self.most_bytes_a_day is not None:
            terms.most_bytes_a_day = _bytes("--most-bytes-a-day", self.most_bytes_a_day)

    def _apply_pairs(self, terms: PeerTerms) -> None:
        for option, pairs, into in (
            ("--map-out", self.map_out, terms.tenants_out),
            ("--map-in", self.map_in, terms.tenants_in),
            ("--label", self.label, terms.labels),
        ):
            for key, value in (pair(option, text) for text in pairs or ()):
                if value:
                    into[key] = value
                else:
                    into.pop(key, None)

    @property
    def is_empty(self) -> bool:
        """Whether nothing was said."""
        return all(getattr(self, one.name) is None for one in fields(TermsOptions))


@dataclass(frozen=True)
class InviteOptions(TermsOptions):
    """What was written on the command line of an invitation."""

    valid: Annotated[str, typer.Option(metavar="TIME", help="It holds for so long.")] = "1h"
    name: Annotated[str, typer.Option(help="Name that the other centre gets here; default: its own.")] = ""
    address: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="Where it reaches this centre; default: where this one listens.")
    ] = ""
    json: Json = False
    server: Server = None


@dataclass(frozen=True)
class AddOptions(TermsOptions):
    """What was written on the command line that takes an invitation."""

    token: Annotated[str, typer.Argument(metavar="TOKEN|@FILE|-", help="The invitation, or where it is.")] = ""
    name: Annotated[str, typer.Option(help="Name that the other centre gets here; default: its own.")] = ""
    address: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="Where it reaches this centre; default: where this one listens.")
    ] = ""
    json: Json = False
    server: Server = None


@dataclass(frozen=True)
class SetOptions(TermsOptions):
    """What was written on the command line that changes terms."""

    peer: Annotated[str, typer.Argument(metavar="PEER", help="Its name.")] = ""
    json: Json = False
    server: Server = None


def add_commands(app: typer.Typer) -> None:
    """Adds `peers`, with `list`, `invite`, `add`, `set` and `remove`."""
    family = typer.Typer(help="Other centres: waiting jobs go there, and theirs come here.")
    family.callback(invoke_without_command=True)(_peers)
    family.command("list")(_list)
    family.command("invite")(takes_options(InviteOptions, _invite))
    family.command("add")(takes_options(AddOptions, _add))
    family.command("set")(takes_options(SetOptions, _set))
    family.command("remove")(_remove)
    app.add_typer(family, name="peers")


def _peers(context: typer.Context, json: Json = False, server: Server = None) -> None:
    """Other centres: waiting jobs go there, and theirs come here."""
    if context.invoked_subcommand is None:
        _list(json, server)


def _list(json: Json = False, server: Server = None) -> None:
    """List the peers."""
    with connect(server) as centre:
        known = centre.peers()
    if terminal().as_json:
        terminal().json(known)
        return
    if known.peers:
        numbers = ("TRIP", "RATE", "WAITING", "SENT", "HERE")
        shown = table("PEER", "CONTACT", "TRIP", "RATE", "LARGEST FREE", "WAITING", "SENT", "HERE", right=numbers)
        for peer in known.peers:
            shown.add_row(*_row(peer, time.time()))
        terminal().show(shown)
    else:
        terminal().note("no peers; `puhui peers invite` makes an invitation for another centre's `puhui peers add`")
    for peer in known.peers:
        for line in _notes(peer):
            terminal().note(f"{peer.name}: {line}")
    serves = f"serves its peers at {known.address}" if known.address else "serves no peers: it sends work only"
    terminal().note(f"{known.centre} {serves}; its certificate is {known.fingerprint[:16]}…")


def _row(peer: Peer, now_s: float) -> list[str | Text]:
    heard = age(peer.last_contact_time, now_s) if peer.HasField("last_contact_time") else ""
    if peer.in_contact:
        contact = Text("in contact", style="green")
    elif not peer.address:
        contact = Text(f"calls us, heard {heard} ago" if heard else "never heard", style="dim")
    else:
        contact = Text(f"out since {heard}" if heard else "not yet", style="yellow")
    free = [one for one in peer.profiles if one.free or one.idle]
    best = max(free, key=lambda one: _memory_of(one.profile), default=None)
    return [
        peer.name,
        contact,
        f"{seconds(peer.round_trip) / _MILLISECOND:.1f} ms" if peer.HasField("round_trip") else "-",
        f"{size(peer.bytes_per_second)}/s" if peer.bytes_per_second else "-",
        _count_of(best) if best is not None else "none" if peer.profiles else "?",
        str(peer.queued_jobs) if peer.in_contact else "?",
        str(peer.sent),
        str(peer.received),
    ]


def _count_of(slices: CapacitySummary) -> str:
    idle = f"{slices.idle} idle" if slices.idle else ""
    return f"{slices.free} x {slices.profile}" + (f" + {idle}" if idle else "")


def _memory_of(profile: str) -> int:
    """Returns the memory in a profile's name, "2g.20gb"."""
    digits = re.search(r"\.(\d+)gb", profile)
    return int(digits[1]) if digits else 0


def _notes(peer: Peer) -> list[str]:
    """Returns what else there is to say of a peer."""
    said = [peer.message] if peer.message and not peer.in_contact else []
    if peer.emulated:
        said.append("cards there are emulated")
    if peer.offers_asked:
        refused = f"; the last refusal was {peer.last_refusal}" if peer.last_refusal else ""
        said.append(f"made {peer.offers_accepted} offers of {peer.offers_asked} that were asked for{refused}")
    late_s = seconds(peer.broken_promise)
    if late_s > _LATE_S:
        said.append(f"its work begins {span(late_s)} later than it promises")
    unusual = agreed(peer.terms)
    return [*said, "agreed: " + "; ".join(unusual)] if unusual else said


def _invite(options: InviteOptions) -> None:
    """Make an invitation for another centre, which its operator gives to `puhui peers add`, once.

    Whoever has it can become a peer: give it to nobody else.
    """
    terms = PeerTerms()
    options.apply(terms)
    try:
        valid_s = parse_duration(options.valid)
    except ValueError as error:
        raise Mistake("USAGE", f"--valid {error}") from error
    if not valid_s > 0:
        raise Mistake("USAGE", f"--valid {options.valid}: nobody could take it; write 1h or 30m")
    with connect(options.server) as centre:
        made = centre.invite_peer(name=options.name, address=options.address, valid_s=valid_s, terms=terms)
    if terminal().as_json:
        terminal().json(made)
        return
    terminal().text(made.token + "\n")
    left_s = moment(made.expire_time) - time.time()
    terminal().note(f"for one centre, within {span(left_s)}; there: puhui peers add TOKEN")


def _add(options: AddOptions) -> None:
    """Take an invitation: this centre and the one that made it become peers."""
    terms = PeerTerms()
    options.apply(terms)
    token = _token(options.token)
    with connect(options.server) as centre:
        peer = centre.add_peer(token, name=options.name, address=options.address, terms=terms)
    if terminal().as_json:
        terminal().json({"peer": json_of(peer)})
    else:
        terminal().note(f"{peer.name} at {peer.address} is a peer now; `puhui peers` shows what it has")


def _token(said: str) -> str:
    if said == "-":
        return sys.stdin.read()
    if said.startswith("@"):
        return Path(said[1:]).read_text(errors="replace")
    if not said:
        raise Mistake("USAGE", "give the invitation that `puhui peers invite` printed at the other centre")
    return said


def _set(options: SetOptions) -> None:
    """Change what is agreed with a peer. Only what is named changes; KEY= takes a label or a name away."""
    if options.is_empty:
        raise Mistake("USAGE", "say what is to change, such as --no-send; see `puhui peers set --help`")
    with connect(options.server) as centre:
        known = {peer.name: peer for peer in centre.peers().peers}
        if options.peer not in known:
            names = ", ".join(known) or "none"
            raise Refusal(grpc.StatusCode.NOT_FOUND, "PEER_NOT_FOUND", f"no peer {options.peer!r}; there are: {names}")
        terms = known[options.peer].terms
        options.apply(terms)
        peer = centre.set_peer_terms(options.peer, terms)
    if terminal().as_json:
        terminal().json({"peer": json_of(peer)})
    else:
        terminal().note(f"{peer.name}: " + ("; ".join(agreed(peer.terms)) or "the usual terms"))


def _remove(
    peer: Annotated[str, typer.Argument(metavar="PEER", help="Its name.")],
    force: Annotated[
        bool, typer.Option("--force", help="Even while our jobs are there, or its jobs are here.")
    ] = False,
    json: Json = False,
    server: Server = None,
) -> None:
    """End work with a peer."""
    with connect(server) as centre:
        centre.remove_peer(peer, force=force)
    if terminal().as_json:
        terminal().json({"removed": peer})
    else:
        terminal().note(f"{peer} is a peer no longer")


def _bytes(option: str, said: str) -> int:
    try:
        return int(parse_size(said)) if said != "0" else 0
    except ValueError as error:
        raise Mistake("USAGE", f"{option} {error}") from error
