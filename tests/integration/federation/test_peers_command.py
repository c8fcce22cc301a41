"""`puhui peers`, as a shell runs it, with two centres."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

from puhui.v1 import job_pb2
from tests.integration.cli.program import Ended, Puhui
from tests.integration.federation.neighbourhood import Neighbour, in_contact, neighbour


class Operator:
    """Somebody at the command line of a centre."""

    def __init__(self, of: Neighbour, home: Path) -> None:
        self._puhui = Puhui.at(home, of.centre.address)

    async def __call__(self, *arguments: str, given: bytes = b"") -> Ended:
        return await asyncio.to_thread(self._puhui, "peers", *arguments, given=given)

    async def known(self) -> Any:
        return {peer["name"]: peer for peer in (await self("--json")).json["peers"]}


async def test_two_operators_make_their_centres_peers_agree_and_part(tmp_path: Path) -> None:
    async with neighbour("a", tmp_path) as a, neighbour("b", tmp_path) as b:
        here, there = Operator(a, tmp_path / "here"), Operator(b, tmp_path / "there")
        alone = await here()
        assert (alone.code, alone.out) == (0, "")
        assert "no peers; `puhui peers invite`" in alone.err
        assert "a serves its peers at 127.0.0.1:" in alone.err

        made = await here("invite", "--valid", "10m", "--name", "bee", "--no-receive", "--label", "region=eu")
        token = made.out.strip()
        assert (made.code, made.out.count("\n"), "within 10m" in made.err or "within 9m" in made.err) == (0, 1, True)
        added = await there("add", "-", "--most-sent", "5", given=f"\n{token}\n".encode())
        assert (added.code, "a at 127.0.0.1:" in added.err) == (0, True), added.err
        await in_contact(a)
        await in_contact(b)

        bee = (await here.known())["bee"]
        assert (bee["in_contact"], bee["terms"]["receive_off"], bee["terms"]["labels"]) == (
            True,
            True,
            {"region": "eu"},
        )
        assert (await there.known())["a"]["terms"]["most_sent"] == 5
        listed = await here("list")
        shown = " ".join((listed.out + listed.err).split())
        for word in ("PEER", "bee", "in contact", "1 x 7g.80gb", "nothing is taken", "region=eu", "emulated"):
            assert word in shown, shown

        # Only what is named changes.
        terms = (
            "--receive",
            "--weight",
            "2.5",
            "--hours",
            "mon-fri 20:00-08:00",
            "--map-in",
            "x=y",
            "--label",
            "tier=2",
        )
        changed = await here("set", "bee", *terms, "--tenants", "astro, bio", "--most-bytes-a-day", "1GiB", "--json")
        agreed = changed.json["peer"]["terms"]
        assert agreed["labels"] == {"region": "eu", "tier": "2"}
        assert (agreed["receive_off"], agreed["weight"], agreed["hours"]) == (False, 2.5, "mon-fri 20:00-08:00")
        assert (agreed["tenants"], agreed["tenants_in"], agreed["most_bytes_a_day"]) == (
            ["astro", "bio"],
            {"x": "y"},
            2**30,
        )
        await here("set", "bee", "--label", "tier=", "--tenants", "", "--transit")
        agreed = (await here.known())["bee"]["terms"]
        assert (agreed["labels"], agreed["tenants"], agreed["transit"], agreed["weight"]) == (
            {"region": "eu"},
            [],
            True,
            2.5,
        )

        parted = await there("remove", "a")
        assert (parted.code, "a is a peer no longer" in parted.err) == (0, True)
        assert (await here.known(), await there.known()) == ({}, {})


async def test_what_cannot_be_done_is_said_in_one_line(tmp_path: Path) -> None:
    async with neighbour("a", tmp_path) as a, neighbour("b", tmp_path, federation_listen="") as b:
        here, there = Operator(a, tmp_path / "here"), Operator(b, tmp_path / "there")
        token = (await here("invite")).out.strip()
        (tmp_path / "there/token").write_text(token[:-9])
        for ended, code, reason, words in (
            (await there("invite"), 1, "FEDERATION_OFF", "let the other centre invite"),
            (await there("add", "@token"), 1, "INVITATION_INVALID", "damaged, or cut off"),
            (await there("add", "@missing"), 1, "SYSTEM", "missing"),
            (await there("add", "puhui-peer-9.abc"), 1, "INVITATION_INVALID", "another version"),
            (await there("add"), 2, "USAGE", "puhui peers invite"),
            (await here("add", token), 1, "INVITATION_INVALID", "this centre's own"),
            (await here("invite", "--valid", "soon"), 2, "USAGE", "no duration"),
            (await here("invite", "--valid", "30d"), 1, "VALIDITY_INVALID", "7 days"),
            (await here("invite", "--label", "region"), 2, "USAGE", "KEY=VALUE"),
            (await here("invite", "--hours", "nights"), 1, "TERMS_INVALID", "mon-fri 20:00-08:00"),
            (await here("set", "nobody", "--no-send"), 1, "PEER_NOT_FOUND", "there are: none"),
            (await here("set", "nobody"), 2, "USAGE", "say what is to change"),
            (await here("remove", "nobody"), 1, "PEER_NOT_FOUND", "nobody"),
        ):
            assert (ended.code, ended.out, ended.err.count("\n")) == (code, "", 1), ended
            assert reason in ended.err
            assert words in ended.err, ended.err
        refused = await there("add", "puhui-peer-9.abc", "--json")
        assert json.loads(refused.err)["error"]["reason"] == "INVITATION_INVALID"
        # One that serves nobody can send.
        assert (await there("add", token)).code == 0
        await in_contact(b)
        assert "b serves no peers: it sends work only" in (await there()).err
        assert "calls us, heard" in (await here()).out.replace("\n", " ")


async def test_a_peer_that_has_work_is_removed_by_force_only(tmp_path: Path) -> None:
    async with neighbour("a", tmp_path) as a, neighbour("b", tmp_path) as b:
        here, there = Operator(a, tmp_path / "here"), Operator(b, tmp_path / "there")
        assert (await there("add", (await here("invite")).out.strip())).code == 0
        await in_contact(a)
        await in_contact(b)
        await a.fill()
        await a.submit(name="guest")
        guest = await b.guest("guest")
        await b.until(guest.id, job_pb2.JOB_STATE_RUNNING)
        busy = await there("remove", "a")
        assert (busy.code, "puhui peers set a --no-send --no-receive" in busy.err) == (1, True), busy.err
        assert (await there("remove", "a", "--force")).code == 0
        assert (await b.ended(guest.id)).state == job_pb2.JOB_STATE_CANCELLED
