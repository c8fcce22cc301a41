"""One node daemon, put together from its parts."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sqlite3
import subprocess
from collections.abc import AsyncIterator, Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog

from nodedaemon.answers import Mutations
from nodedaemon.attachments import Attachments
from nodedaemon.bundles import Bundles
from nodedaemon.carrying import Carrying
from nodedaemon.cgroups import CgroupTree, claim
from nodedaemon.checkpoint import Checkpoints
from nodedaemon.checkpoint_cuda import CudaCheckpoints
from nodedaemon.checkpoint_emulated import EmulatedCheckpoints
from nodedaemon.container_leases import ContainerLeases
from nodedaemon.containers import Containers
from nodedaemon.devices import CardDevices
from nodedaemon.driver import Driver
from nodedaemon.driver_facts import DriverError, Mig
from nodedaemon.emulation import install, parse_cards
from nodedaemon.events import EventLog
from nodedaemon.gpus import Gpus
from nodedaemon.host import has_real_gpu
from nodedaemon.hotplug import HotPlug, LinkPlug
from nodedaemon.hotplug_mounts import MountPlug
from nodedaemon.idle_watch import Idling
from nodedaemon.inventory import Inventory, Revision
from nodedaemon.journal import Journal
from nodedaemon.journal_lock import locked_by
from nodedaemon.podman_account import PodmanAccount, PodmanUnusableError
from nodedaemon.podman_runtime import PodmanRuntime
from nodedaemon.process_runtime import ProcessRuntime
from nodedaemon.process_user import ProcessesRefusedError, ProcessUser, find_process_user, require_no_real_gpu
from nodedaemon.reclaim import Reclaim
from nodedaemon.recovery import Recovery
from nodedaemon.registration import Registration
from nodedaemon.results import Results
from nodedaemon.runtime import ContainerRuntime
from nodedaemon.service import NodeService
from nodedaemon.slice_recovery import SliceRecovery
from nodedaemon.slice_transfers import SliceTransfers
from nodedaemon.slices import Slices
from nodedaemon.telemetry import Telemetry
from nodedaemon.utilization_meter import DriverMeter
from nodedaemon.workspace import Attempts
from puhui.rpc.address import require_private_address
from puhui.rpc.errors import Refusal
from puhui.rpc.identity import new_id
from puhui.rpc.lease_clock import LeaseClock
from puhui.rpc.moment import now
from puhui.rpc.notify import notify_ready, notify_stopping
from puhui.rpc.server import RpcServer
from puhui.v1.node_pb2 import RuntimeKind
from puhui.v1.node_service_pb2_grpc import add_NodeServiceServicer_to_server

__all__ = ["CannotServeError", "Settings", "serve"]

_log = structlog.get_logger(__name__)

_GRACE_S = 3.0
_SETTLE_S = 15.0
_PRUNE_S = 3600.0
_THREADS = 32


class CannotServeError(Exception):
    """The daemon cannot serve with these settings on this host; the text says why and what to do."""


@dataclass(frozen=True)
class Settings:
    """How a daemon is to serve. See `nodedaemon serve --help`."""

    listen: str
    state: Path
    name: str
    control_plane: str | None
    join_token_file: Path | None
    emulate: str | None
    runtime: str
    podman_user: str
    image: str
    allow_root_processes: bool = False


async def serve(settings: Settings, stop: asyncio.Event) -> None:
    """Serves until `stop` is set.

    Raises:
        CannotServeError: these settings do not work on this host.
    """
    _require_sound(settings)
    # Packing artifacts takes long; the driver and the logs must not wait for it.
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(_THREADS, thread_name_prefix="node"))
    async with contextlib.AsyncExitStack() as stack:
        try:
            settings.state.mkdir(parents=True, exist_ok=True)
            journal = Journal(settings.state / "node.db")
        except sqlite3.OperationalError as error:
            holder = locked_by(settings.state / "node.db")
            why = f"it is in use by process {holder}: stop that, or name another --state" if holder else str(error)
            raise CannotServeError(f"{settings.state / 'node.db'} cannot be opened: {why}") from error
        except OSError as error:
            raise CannotServeError(f"the state directory {settings.state} cannot be made: {error.strerror}") from error
        stack.callback(journal.close)
        driver, cards = _open_driver(settings)
        stack.callback(driver.close)
        node_id = journal.fact("node_id", new_id("n"))
        runtime, user = await _open_runtime(settings, node_id, cards.emulated)
        stack.push_async_callback(runtime.close)

        events = EventLog(journal)
        revision = Revision()
        try:
            gpus = Gpus(driver, emulated=cards.emulated)
        except DriverError as error:
            raise CannotServeError(f"the NVIDIA driver does not list its GPUs ({error}); see `nvidia-smi`") from error
        stack.callback(gpus.close)
        slices = Slices(gpus, journal, events, changed=revision.grow)
        inventory = Inventory(settings.name, node_id, gpus, slices, runtime, revision)
        bundles = Bundles(settings.state / "bundles")
        attempts = Attempts(settings.state / "attempts", user.uid, user.gid)
        hotplug = _open_hotplug(runtime, user, cards)
        stack.push_async_callback(hotplug.close)
        kind = runtime.describe().kind
        telemetry = Telemetry(gpus, DriverMeter())
        idling = Idling(journal, events, telemetry, kind)
        attachments = Attachments(
            journal,
            events,
            gpus,
            slices,
            attempts,
            cards,
            hotplug,
            kind,
            changed=revision.grow,
            idleness=idling.describe,
        )
        slices.on_vanished = attachments.let_go
        leases = _open_leases(settings, runtime, journal)
        stack.push_async_callback(leases.close)
        containers = Containers(
            runtime,
            journal,
            events,
            slices,
            bundles,
            attempts,
            cards,
            settings.image,
            attachments,
            leases,
            idleness=idling.describe,
        )
        idling.commands, containers.execs.on_began = containers.execs.commands, idling.began
        results = Results(journal, attempts, runtime, containers.ends.ended)
        transfers = SliceTransfers(journal, gpus, slices, attachments, containers.holder_of)
        carrying = Carrying(settings.state / "uploads", journal, attempts, runtime, user.uid, user.gid)
        checkpoints = _open_checkpoints(settings, user, gpus, cards)
        reclaim = Reclaim(runtime, journal, events, containers, attachments, checkpoints, idling.look)
        inventory.checkpoints = checkpoints.probe
        mutations = Mutations(journal)
        slice_recovery = SliceRecovery(journal, events, gpus, slices, revision, settle=attachments.settle)
        recovery = Recovery(journal, events, containers, runtime, slice_recovery)
        try:
            await recovery.run()
            await attachments.restore()
            await reclaim.restore()
        except Refusal as error:
            raise CannotServeError(f"what an earlier daemon left cannot be looked at: {error.message}") from error
        except OSError as error:
            raise CannotServeError(
                f"what an earlier daemon left cannot be made good: {error}; see that {settings.state} can be written to"
            ) from error

        server = RpcServer(settings.listen)
        server.add(
            "puhui.v1.NodeService",
            add_NodeServiceServicer_to_server,
            NodeService(
                inventory,
                mutations,
                slices,
                containers,
                attachments,
                results,
                bundles,
                events,
                telemetry,
                transfers,
                carrying,
                reclaim,
            ),
        )
        stack.push_async_callback(reclaim.close)
        await stack.enter_async_context(_background(containers.ends.watch(), stop))
        stack.push_async_callback(containers.execs.close)
        await stack.enter_async_context(_background(_prune(journal, containers, carrying), stop))
        await stack.enter_async_context(_background(slice_recovery.keep(), stop))
        await stack.enter_async_context(_background(telemetry.run(), stop))
        await stack.enter_async_context(_background(idling.run(), stop))
        try:
            port = await server.start()
        except OSError as error:
            raise CannotServeError(str(error)) from error
        address = settings.listen if settings.listen.startswith("unix:") else _with_port(settings.listen, port)
        if settings.control_plane is not None:
            registration = Registration(settings.control_plane, settings.join_token_file, address, inventory)
            await stack.enter_async_context(_background(registration.run(), stop))
        _log.info("node daemon serves", address=address, name=settings.name, emulated=cards.emulated)
        notify_ready(address)
        await stop.wait()
        notify_stopping()
        events.close()
        containers.execs.stop()
        telemetry.close()
        await server.stop(_GRACE_S)
        await mutations.settle(_SETTLE_S)


def _require_sound(settings: Settings) -> None:
    """Refuses settings that can work on no host, before anything is touched."""
    try:
        require_private_address(settings.listen)
    except ValueError as error:
        raise CannotServeError(str(error)) from error
    if settings.runtime not in ("auto", "podman", "process"):
        raise CannotServeError(f"--runtime {settings.runtime}: use auto, podman or process")
    if settings.runtime == "process":
        try:
            require_no_real_gpu(emulated=settings.emulate is not None, real_gpu=has_real_gpu())
        except ProcessesRefusedError as error:
            raise CannotServeError(str(error)) from error


def _open_driver(settings: Settings) -> tuple[Driver, CardDevices]:
    try:
        if settings.emulate is None:
            return Driver(), CardDevices.real()
        emulated = install(settings.state / "emulation", parse_cards(settings.emulate))
        return Driver(), CardDevices(emulated.caps.directory, emulated.caps.minors_file, True)
    except DriverError as error:
        raise CannotServeError(
            f"no NVIDIA driver answers on this host ({error}); install one, or serve emulated cards with "
            "--emulate H100-80GB-SXM5:2"
        ) from error
    except (ValueError, RuntimeError, OSError) as error:
        raise CannotServeError(str(error)) from error


async def _open_runtime(settings: Settings, node_id: str, emulated: bool) -> tuple[ContainerRuntime, ProcessUser]:
    why = ""
    if settings.runtime != "process":
        try:
            account = PodmanAccount.find(settings.podman_user)
            _open_state(settings.state, account)
            account.require_reach(settings.state.resolve())
            # First: what is started from here on is in the cgroup where it is to be.
            cgroup = claim(account.layout, account.uid, account.gid, account.name, CgroupTree())
            runtime = await PodmanRuntime.open(account, node_id, cgroup)
            return runtime, ProcessUser(account.name, account.uid, account.gid)
        except (PodmanUnusableError, OSError, subprocess.SubprocessError) as error:
            if settings.runtime == "podman" or not emulated:
                raise CannotServeError(str(error)) from error
            why = str(error)
            _log.warning("no rootless containers on this host; commands run as plain processes", why=why)
    try:
        require_no_real_gpu(emulated=emulated, real_gpu=has_real_gpu())
        user = find_process_user(settings.podman_user, settings.state, allow_root=settings.allow_root_processes)
    except ProcessesRefusedError as error:
        raise CannotServeError(f"{error} (no containers: {why})" if why else str(error)) from error
    return ProcessRuntime(settings.state / "processes", user, why), user


def _open_hotplug(runtime: ContainerRuntime, user: ProcessUser, cards: CardDevices) -> HotPlug:
    if runtime.describe().kind == RuntimeKind.RUNTIME_KIND_PODMAN:
        return MountPlug(user.uid, user.gid, device=not cards.emulated)
    return LinkPlug()


def _open_checkpoints(settings: Settings, user: ProcessUser, gpus: Gpus, cards: CardDevices) -> Checkpoints:
    if cards.emulated:
        return EmulatedCheckpoints(user.uid, user.gid, settings.state / "checkpoints")
    return CudaCheckpoints(mig=lambda: any(gpu.mig is Mig.ENABLED for gpu in gpus.every()))


def _open_leases(settings: Settings, runtime: ContainerRuntime, journal: Journal) -> ContainerLeases:
    try:
        clock = LeaseClock(settings.state / "lease_clock.json")
        return ContainerLeases(clock, runtime, journal, settings.state / "leases")
    except (OSError, ValueError) as error:
        raise CannotServeError(
            f"the lease clock in {settings.state} cannot be kept: {error}; see that it can be written to"
        ) from error


def _open_state(state: Path, account: PodmanAccount) -> None:
    """Lets the user that owns the containers through to its files below the state directory, and nobody else."""
    if os.geteuid() == 0:
        os.chown(state, 0, account.gid)
        state.chmod(0o710)


@contextlib.asynccontextmanager
async def _background(work: Coroutine[Any, Any, None], stop: asyncio.Event) -> AsyncIterator[None]:
    """Runs something beside the daemon for as long as the block lasts. If it fails, the daemon stops.

    Raises:
        Exception: what it failed with.
    """
    task = asyncio.create_task(work)
    task.add_done_callback(lambda _: stop.set())
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def _prune(journal: Journal, containers: Containers, carrying: Carrying) -> None:
    while True:
        try:
            containers.execs.prune(now())
            journal.prune(now())
            containers.leases.prune()
            await carrying.prune(now())
        except OSError as error:
            _log.warning("what is old is kept for longer", error=str(error))
        await asyncio.sleep(_PRUNE_S)


def _with_port(listen: str, port: int) -> str:
    return f"{listen.rpartition(':')[0]}:{port}"
