"""One centre: its parts, put together, started and stopped."""

from __future__ import annotations

import asyncio
import fcntl
import os
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from controlplane.attempts import Attempts
from controlplane.bundles import Bundles
from controlplane.cancelling import Cancelling
from controlplane.carried_calls import CarriedJobService
from controlplane.dry_runs import DryRuns
from controlplane.federation import Federation, Inside
from controlplane.fleet_service import FleetService
from controlplane.idempotency import KEPT_S
from controlplane.idle_policy import CentrePolicy
from controlplane.job_service import JobService
from controlplane.jobs import PLACED_STATES
from controlplane.lasting import Lasting
from controlplane.log_reader import LogReader
from controlplane.node_client import GrpcNodeClient, NodeClient
from controlplane.nodes import Nodes
from controlplane.pages import Pages
from controlplane.prediction import COSTS, Costs, OnnxPrediction, Prediction, Tracing
from controlplane.records import JobRecord
from controlplane.reservations import Reservations
from controlplane.results import Results
from controlplane.resumption import Resumption
from controlplane.runs import Runs
from controlplane.scheduler import Scheduler
from controlplane.sqlite_store import SqliteStore
from controlplane.submission import Submission
from controlplane.surroundings import Surroundings
from controlplane.wants import Wants
from controlplane.warm import WarmShares
from controlplane.watch import Feed
from puhui.rpc.moment import now
from puhui.rpc.server import RpcServer
from puhui.v1.fleet_service_pb2_grpc import add_FleetServiceServicer_to_server
from puhui.v1.job_service_pb2_grpc import add_JobServiceServicer_to_server

__all__ = ["Centre", "Settings"]

_log = structlog.get_logger(__name__)

_STOP_GRACE_S = 1.0
_FORGET_EVERY_S = 3600.0


@dataclass(frozen=True)
class Settings:
    """How a control plane is to run."""

    listen: str
    """Address to serve at: "host:port" on loopback, or "unix:/path"."""
    state: Path
    """Folder of everything that it must not forget."""
    centre: str
    """Name of the centre."""
    join_token_file: Path
    """Holds the secret by which nodes join; made if it is not there."""
    prediction_budget_s: float = 2.0
    tracing: Tracing = Tracing.WHEN_NEEDED
    costs: Costs = COSTS
    """Of a slice that is too small, and of one that is larger than it had to be."""
    """A submission waits for its prediction at most this long."""
    patience_s: float = 60.0
    """A waiting job lets itself be overtaken for this long."""
    release_patience_s: float = 5.0
    """A job ends without its node's confirmation after this long."""
    collect_patience_s: float = 30.0
    """Results that a node in contact keeps refusing are given up after this long."""
    idle: CentrePolicy = field(default_factory=CentrePolicy)
    """When unused shares are taken back."""
    session_memory_mib: int = 0
    """Memory of the share of a session that asks for none; 0 is the smallest slice there is."""
    federation_listen: str = ""
    """Address at which peers are served, with mutual TLS: "host:port"; "" serves none."""
    federation_address: str = ""
    """Where peers reach that; "" is where it listens."""
    lease_s: float = 900.0
    """Length of the leases that are asked for, and the longest that are given."""
    lease_margin_s: float = 30.0
    """Time that a peer gets to end what its lease no longer covers, before the job starts elsewhere."""
    keep_guests_s: float = 7 * 86400.0
    """Results of what peers had run here are kept for this long."""


class Centre:
    """A running control plane. Make one with `start`."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._tasks: list[asyncio.Task[None]] = []
        self._lasting = Lasting()

    @classmethod
    async def start(
        cls,
        settings: Settings,
        *,
        prediction: Prediction | None = None,
        connect: Callable[[str], NodeClient] = GrpcNodeClient,
    ) -> Centre:
        """Starts a control plane on its state, and takes up every attempt where the last one left it.

        Args:
            settings: how it is to run.
            prediction: says what code needs; the trained predictor if not given.
            connect: opens a connection to a node at an address.

        Raises:
            OSError: the state is in use or cannot be written, or the address is taken.
            ValueError: the address is not private.
        """
        centre = cls(settings)
        settings.state.mkdir(parents=True, exist_ok=True)
        settings.state.chmod(0o700)
        centre._lock = _locked(settings.state / "lock")
        centre._feed = feed = Feed()
        centre._store = store = await SqliteStore.open(settings.state / "puhui.db", feed)
        centre._prediction = prediction or OnnxPrediction(
            settings.prediction_budget_s, settings.tracing, settings.costs
        )
        bundles = Bundles(settings.state / "bundles", store, centre._lasting)
        results = Results(settings.state / "results")
        reservations = Reservations(lambda: centre._shares_changed())
        centre._nodes = nodes = Nodes(
            store,
            settings.centre,
            join_token(settings.join_token_file),
            connect,
            reservations,
            lambda: centre._scheduler.wake(),
        )
        centre._warm = warm = WarmShares(settings.centre, store, nodes, reservations)
        centre._scheduler = scheduler = Scheduler(store, nodes, reservations, warm, feed, settings.patience_s)
        centre._federation = federation = await Federation.open(settings, store, nodes, scheduler)
        wants = Wants(feed)
        around = Surroundings(
            settings.centre,
            store,
            nodes,
            reservations,
            bundles,
            results,
            feed,
            wants,
            scheduler.add,
            scheduler.remove,
            settings.idle.warm_for,
            settings.release_patience_s,
            settings.collect_patience_s,
            federation.reach,
            federation.offered,
        )
        centre._attempts = Attempts(around, scheduler.put_back)
        centre._reservations = reservations
        await federation.connect()
        await centre._take_up()
        pages = Pages(await store.centre_id())
        centre._dry_runs = dry_runs = DryRuns(settings.centre, nodes.sandboxes)
        nodes.dry_runs = lambda: dry_runs.living
        submission = Submission(
            settings.centre,
            store,
            bundles,
            nodes,
            centre._prediction,
            centre._lasting,
            settings.idle,
            scheduler.add,
            settings.session_memory_mib,
            federation.offered,
            dry_runs,
        )
        centre._runs = runs = Runs(settings.centre, store, feed, nodes, scheduler, wants, centre._lasting)
        await runs.take_up()
        logs = LogReader(settings.centre, store, feed, nodes, results, federation.reach)
        cancelling = Cancelling(store, scheduler, centre._attempts)
        centre._jobs = job_service = JobService(
            store,
            feed,
            bundles,
            results,
            nodes,
            scheduler,
            cancelling,
            submission,
            logs,
            pages,
            centre._lasting,
            runs,
            Resumption(store, feed, centre._lasting),
            federation.why_here,
            federation.elsewhere,
        )
        everywhere = CarriedJobService(settings.centre, job_service, store, feed, federation.reach)
        centre._server = server = RpcServer(settings.listen)
        server.add("puhui.v1.JobService", add_JobServiceServicer_to_server, everywhere)
        server.add(
            "puhui.v1.FleetService",
            add_FleetServiceServicer_to_server,
            FleetService(settings.centre, store, nodes, scheduler, pages),
        )
        inside = Inside(feed, bundles, results, logs, centre._attempts, cancelling, centre._lasting, everywhere)
        await federation.join(inside, server)
        port = await server.start()
        centre.address = settings.listen if not port else f"{settings.listen.rpartition(':')[0]}:{port}"
        centre._tasks.append(asyncio.create_task(scheduler.run(centre._attempts), name="scheduler"))
        centre._tasks.append(asyncio.create_task(warm.run(), name="warm shares"))
        centre._tasks.append(asyncio.create_task(centre._forget(), name="forget requests"))
        _log.info("serving", address=centre.address, centre=settings.centre)
        return centre

    address: str
    """Where it serves."""
    _lock: int
    _feed: Feed
    _store: SqliteStore
    _prediction: Prediction
    _dry_runs: DryRuns
    _nodes: Nodes
    _scheduler: Scheduler
    _warm: WarmShares
    _runs: Runs
    _jobs: JobService
    _attempts: Attempts
    _reservations: Reservations
    _server: RpcServer
    _federation: Federation

    async def _take_up(self) -> None:
        """Goes on where the last control plane was when it ended."""
        held = await self._store.reservations()
        self._reservations.load(held)
        await self._nodes.start()
        driven: set[tuple[str, int]] = set()
        for record in await self._store.unfinished_jobs():
            if record.state in PLACED_STATES and record.attempt.peer:
                continue  # see below
            if record.state in PLACED_STATES:
                driven.add((record.id, len(record.job.attempts)))
                self._attempts.drive(record, adopt=True)
            else:
                self._scheduler.add(record)
        for reservation in held:
            if reservation.key not in driven and not reservation.is_warm:
                self._attempts.drive(await self._require(reservation.job_id), reservation.attempt, adopt=True)
        for forward in await self._store.forwards():
            self._attempts.drive(await self._require(forward.job_id), forward.attempt, adopt=True)
        if driven or held:
            _log.info("taking up attempts", running=len(driven), held=len(held), queued=self._scheduler.queued)

    def _shares_changed(self) -> None:
        self._scheduler.wake()
        self._warm.wake()

    async def _require(self, job_id: str) -> JobRecord:
        record = await self._store.job(job_id)
        if record is None:
            raise RuntimeError(f"the store holds a reservation of {job_id}, but no such job")
        return record

    async def _forget(self) -> None:
        while True:
            try:
                await self._store.forget_requests(now() - KEPT_S)
            except Exception as error:  # noqa: BLE001 - old request ids do no harm; a full disk may have room again
                _log.error("old request ids are not forgotten yet", exc_info=error)
            await asyncio.sleep(_FORGET_EVERY_S)

    async def stop(self) -> None:
        """Stops serving. Containers run on; the next start goes on where this one was."""
        await self._server.stop(_STOP_GRACE_S)
        await self._federation.leave()
        await self._lasting.finish()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._runs.stop()
        await self._attempts.stop()
        await self._federation.close()
        await self._dry_runs.close()
        await self._nodes.stop()
        await self._prediction.close()
        await self._store.close()
        os.close(self._lock)


def join_token(path: Path) -> str:
    """Returns the join token in a file; makes both if there is no such file.

    Raises:
        OSError: it cannot be read or made.
        ValueError: it is empty.
    """
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        token = path.read_text().strip()
        if not token:
            raise ValueError(f"{path} is empty; remove it, and a new join token is made") from None
        return token
    token = secrets.token_urlsafe(32)
    with os.fdopen(handle, "w") as file:
        file.write(token + "\n")
    return token


def _locked(path: Path) -> int:
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(handle)
        raise OSError(f"{path.parent} is in use by another control plane") from error
    return handle
