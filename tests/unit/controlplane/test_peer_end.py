"""The end of an attempt at a peer, where the peer or this centre is not as it should be."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import replace
from pathlib import Path

import grpc

from controlplane.forwards import ForwardStage
from puhui.v1 import federation_service_pb2 as wire
from puhui.v1.job_pb2 import JOB_STATE_SUCCEEDED
from tests.unit.controlplane.centres import eventually
from tests.unit.controlplane.fake_peer import FakePeer
from tests.unit.controlplane.test_peer_driver import KEY, ends, leave, lost, origin, refusal, run_there

_LOST = refusal("RESULTS_LOST", grpc.StatusCode.DATA_LOSS)


async def test_peers_that_are_not_opened_yet_are_waited_for(tmp_path: Path) -> None:
    """At the start and at the end of a control plane nobody is a peer: work with them was not ended."""
    peer = FakePeer()
    async with origin(tmp_path, peer) as site:
        await lost(site, peer)
        leave(peer)
        await ends(peer)
        site.peers.is_open = False
        del site.peers["b"]
        await peer.set_contact(True)
        await eventually(lambda: site.peers.asked_in_vain > 1)
        assert (await site.forward()).stage is ForwardStage.LOST
        site.peers["b"] = peer
        site.peers.is_open = True
        await site.settled()
        assert (await site.job()).state == JOB_STATE_SUCCEEDED


async def test_what_came_late_and_not_whole_is_not_told_as_whole(tmp_path: Path) -> None:
    peer = FakePeer()
    async with origin(tmp_path, peer) as site:
        await lost(site, peer)
        leave(peer)
        peer.denies = [_LOST] * 50
        await ends(peer)
        await peer.set_contact(True)
        await site.settled()
        record = await site.job()
        assert record.state == JOB_STATE_SUCCEEDED
        assert "its log" in record.results_lost
        assert record.job.artifacts.file_count == 1


async def test_a_lost_log_does_not_keep_from_waiting_for_the_artifacts(tmp_path: Path) -> None:
    peer, refused = FakePeer(), 0
    whole = peer.read_artifacts

    async def refused_at_first(
        request: wire.GetForwardedArtifactsRequest,
    ) -> AsyncGenerator[wire.GetForwardedArtifactsResponse, None]:
        nonlocal refused
        if refused < 5:
            refused += 1
            raise refusal("INTERNAL", grpc.StatusCode.INTERNAL)
        async for part in whole(request):
            yield part

    peer.read_artifacts = refused_at_first  # type: ignore[method-assign]
    async with origin(tmp_path, peer) as site:
        await run_there(site, peer)
        leave(peer)
        peer.denies = [_LOST] * 50
        await ends(peer)
        await site.settled()
        record = await site.job()
        assert record.job.artifacts.file_count == 1
        assert record.results_lost.startswith("its log could not be had from peer b")
        assert peer.calls.count("read_artifacts") == 1  # they had come, and were not fetched again for the log's sake


async def test_artifacts_that_are_damaged_there_are_given_up(tmp_path: Path) -> None:
    peer = FakePeer()
    async with origin(tmp_path, peer) as site:
        await run_there(site, peer)
        leave(peer)
        manifest, archive = peer.artifacts[KEY]
        peer.artifacts[KEY] = (manifest, b"X" * len(archive))
        await ends(peer)
        await site.settled()
        record = await site.job()
        assert record.state == JOB_STATE_SUCCEEDED
        assert "its artifacts could not be had" in record.results_lost
        assert record.job.log_size_bytes == len(peer.logs[KEY])
        assert peer.calls.count("read_logs") == 1


async def test_an_attempt_that_another_control_plane_commands_is_left_to_it(tmp_path: Path) -> None:
    peer = FakePeer()
    async with origin(tmp_path, peer) as site:
        await lost(site, peer)
        peer.guests[KEY] = replace(peer.guests[KEY], token=999)
        await peer.set_contact(True)
        await eventually(lambda: not site.attempts.driven)
        assert peer.calls.count("cancel") == 1
        assert (await site.forward()).stage is ForwardStage.LOST
