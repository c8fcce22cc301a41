"""Accepting a job: from a request to a stored job with a size (steps S1 and S2)."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from controlplane import happenings
from controlplane.bundles import Bundles
from controlplane.dry_runs import DryRuns
from controlplane.entrypoint import find_entrypoint
from controlplane.idempotency import earlier_answer, request_of, reused
from controlplane.idle_policy import CentrePolicy, resolve
from controlplane.jobs import transition
from controlplane.lasting import Lasting
from controlplane.nodes import Nodes
from controlplane.parsing import Parsing
from controlplane.prediction import Code, Prediction
from controlplane.profile_outlook import Pace
from controlplane.records import BundleRecord, JobRecord, Request
from controlplane.sizing import size, size_of_session
from controlplane.spec import require_known_peers, require_offered, require_valid
from controlplane.store import RequestReused, Store
from puhui.rpc.bundle import pack_files
from puhui.rpc.errors import Refusal
from puhui.rpc.identity import new_id
from puhui.rpc.moment import now, seconds, timestamp
from puhui.v1 import job_pb2, job_service_pb2, prediction_pb2

__all__ = ["Need", "Submission"]

_LONGEST_BUDGET_S = 120.0
_LEAST_BUDGET_S = 1.0
"""What is left for reading the code when its dry run has taken all the time."""
_MOST_INLINE_BYTES = 2**20
_DEFAULT_TENANT = "default"


@dataclass(frozen=True)
class Need:
    """What a piece of code needs, and where it is."""

    bundle: BundleRecord | None
    """None for a session without code."""
    archive: Path
    prediction: prediction_pb2.Prediction | None
    """None for a session: what will run in it is not known yet."""
    sizing: prediction_pb2.Sizing
    policy: job_pb2.IdlePolicy
    """When its unused share is taken back."""
    spec: job_pb2.JobSpec
    """What was asked for, with what is usual where nothing was said."""
    fingerprint: str = ""
    """What tells this code, and what it is asked to do, from other code; "" when nothing is to be learnt from it."""
    paces: Mapping[tuple[str, str], Pace] = field(default_factory=dict)
    """How fast it is expected to be, by GPU model and profile; only of what is asked about and not submitted."""


def _budget_s(request: job_service_pb2.PredictJobRequest) -> float | None:
    """Returns the longest wait for a prediction that was asked for, in seconds; None when none was.

    Raises:
        Refusal: INVALID_ARGUMENT with BUDGET_OUT_OF_RANGE.
    """
    if not request.HasField("budget"):
        return None
    wanted_s = seconds(request.budget)
    if not 0 < wanted_s <= _LONGEST_BUDGET_S:
        raise Refusal(
            grpc.StatusCode.INVALID_ARGUMENT,
            "BUDGET_OUT_OF_RANGE",
            f"a prediction may take more than 0 s and at most {_LONGEST_BUDGET_S:g} s; "
            "leave the budget out for the centre's own",
        )
    return wanted_s


class Submission:
    """Accepts jobs for one centre.

    Args:
        centre: its name.
        store: where jobs are stored.
        bundles: where their code is.
        nodes: whose GPUs decide what sizes there are.
        prediction: says what code needs.
        lasting: carries through what was begun for a client that has gone.
        policy: when unused shares are taken back.
        accepted: told of every new job once it is stored.
        session_memory_mib: memory of the share of a session that asks for none; 0 is the smallest slice there is.
        peers: the peers there are now, by name, each with the profiles that it has.
        dry_runs: conducts dry runs.
    """

    def __init__(
        self,
        centre: str,
        store: Store,
        bundles: Bundles,
        nodes: Nodes,
        prediction: Prediction,
        lasting: Lasting,
        policy: CentrePolicy,
        accepted: Callable[[JobRecord], None],
        session_memory_mib: int,
        peers: Callable[[], Mapping[str, Collection[str]]],
        dry_runs: DryRuns,
    ) -> None:
        self._centre = centre
        self._store = store
        self._bundles = bundles
        self._nodes = nodes
        self._prediction = prediction
        self._lasting = lasting
        self._policy = policy
        self._accepted = accepted
        self._session_memory_mib = session_memory_mib
        self._peers = peers
        self._dry_runs = dry_runs
        self._parsing = Parsing(lasting)

    async def submit(self, request: job_service_pb2.SubmitJobRequest) -> JobRecord:
        """Accepts a job, or finds the one that the same request made before.

        Raises:
            Refusal: it cannot be accepted; nothing was stored.
            OSError: the disk is full; nothing was stored.
        """
        noted = request_of("SubmitJob", request, request.request_id)
        earlier = await earlier_answer(self._store, noted)
        if earlier is not None:
            return earlier
        spec = _with_defaults(request.spec)
        async with self._need(spec, request) as need:
            at = now()
            job = job_pb2.Job(
                id=new_id("j"),
                centre=self._centre,
                spec=spec,
                bundle_id=need.bundle.id if need.bundle is not None else "",
                idle_policy=need.policy,
                state=job_pb2.JOB_STATE_QUEUED,
                create_time=timestamp(at),
            )
            record, submitted = transition(JobRecord(job, fingerprint=need.fingerprint), happenings.Submitted(), at)
            record, predicted = transition(record, happenings.Predicted(need.prediction, need.sizing), at)
            try:
                return await self._lasting.do(self._keep(need, record, (submitted, predicted), noted))
            except RequestReused as error:
                raise reused(request.request_id) from error

    async def _keep(
        self, need: Need, record: JobRecord, events: tuple[job_pb2.JobEvent, ...], noted: Request | None
    ) -> JobRecord:
        if need.bundle is None:
            stored = await self._store.add_job(record, events, noted)
        else:
            async with self._bundles.placed(need.bundle.id, need.archive):
                stored = await self._store.add_job(record, events, noted, need.bundle)
        if stored.id == record.id:
            self._accepted(stored)
        return stored

    async def predict(self, request: job_service_pb2.PredictJobRequest) -> Need:
        """Returns what would be needed. Stores nothing.

        Raises:
            Refusal: a job like this would not be accepted.
            OSError: the disk is full.
        """
        async with self._need(_with_defaults(request.spec), request, _budget_s(request)) as need:
            return need

    @contextlib.asynccontextmanager
    async def _need(
        self,
        spec: job_pb2.JobSpec,
        request: job_service_pb2.SubmitJobRequest | job_service_pb2.PredictJobRequest,
        budget_s: float | None = None,
    ) -> AsyncIterator[Need]:
        require_valid(spec)
        peers = self._peers()
        require_known_peers(spec.peers, peers)
        policy = resolve(spec, self._policy)
        geometries = self._nodes.geometries()
        elsewhere = {} if spec.peers.here_only else peers
        require_offered(spec.resources, geometries, {profile for has in elsewhere.values() for profile in has})
        if spec.kind == job_pb2.JOB_KIND_SESSION:
            async with self._session_code(request) as (bundle, path):
                sizing = size_of_session(spec.resources, geometries, self._session_memory_mib)
                yield Need(bundle, path, None, sizing, policy, spec)
            return
        async with self._code(request) as (bundle, path):
            entrypoint = find_entrypoint(spec.command, bundle.sizes)
            sources = await self._bundles.sources(path)
            unparsed = await self._parsing.require(entrypoint, bundle.sizes, sources.files)
            inputs = sum(data.size_bytes for data in spec.inputs)
            code = Code(
                sources.files, bundle.sizes, spec.command, inputs, spec.env, spec.image, sources.digests
            )  # fmt: skip
            asked_only = isinstance(request, job_service_pb2.PredictJobRequest)
            fingerprint, paces = await asyncio.gather(
                self._prediction.fingerprint(code), self._prediction.paces(code, geometries if asked_only else ())
            )
            # Whoever gives time for it has the code dry-run; others have what was found then.
            step = self._dry_runs.known(spec.tenant, fingerprint)
            if step is None and budget_s is not None:
                started = time.monotonic()
                step = await self._dry_runs.of(spec.tenant, fingerprint, code, bundle, path, budget_s)
                budget_s = max(budget_s - (time.monotonic() - started), _LEAST_BUDGET_S)
            prediction = await self._prediction.of(code, budget_s, step)
            if fingerprint:
                observed = await self._store.observations(spec.tenant, fingerprint)
                prediction = self._prediction.with_history(prediction, observed)
            prediction.reason = unparsed + prediction.reason
            sizing = size(spec.resources, prediction, geometries)
            yield Need(bundle, path, prediction, sizing, policy, spec, fingerprint, paces)

    @contextlib.asynccontextmanager
    async def _session_code(
        self, request: job_service_pb2.SubmitJobRequest | job_service_pb2.PredictJobRequest
    ) -> AsyncIterator[tuple[BundleRecord | None, Path]]:
        """Yields the bundle of a session and its archive, or None: work arrives as runs, and may bring its code."""
        which = request.WhichOneof("code")
        if which is None or not (request.inline.files if which == "inline" else request.bundle_id):
            yield None, Path()
            return
        async with self._code(request) as code:
            yield code

    @contextlib.asynccontextmanager
    async def _code(
        self, request: job_service_pb2.SubmitJobRequest | job_service_pb2.PredictJobRequest
    ) -> AsyncIterator[tuple[BundleRecord, Path]]:
        """Yields the bundle and its archive: a temporary file when it came inside the request."""
        which = request.WhichOneof("code")
        if which == "bundle_id":
            bundle = await self._bundles.require(request.bundle_id)
            yield bundle, self._bundles.path(bundle.id)
            return
        if which != "inline" or not request.inline.files:
            raise Refusal(
                grpc.StatusCode.INVALID_ARGUMENT,
                "CODE_MISSING",
                "a job needs code: name a bundle that was uploaded with PutBundle, or put files into `inline`",
            )
        files = {name: text.encode() for name, text in request.inline.files.items()}
        total = sum(len(text) for text in files.values())
        if total > _MOST_INLINE_BYTES:
            raise Refusal(
                grpc.StatusCode.INVALID_ARGUMENT,
                "INLINE_TOO_LARGE",
                "inline code is at most 1 MiB; upload it with PutBundle instead",
                size_bytes=str(total),
            )
        inline = await self._bundles.write_inline(await asyncio.to_thread(pack_files, files))
        try:
            yield inline.record, inline.path
        finally:
            self._bundles.drop_inline(inline)


def _with_defaults(spec: job_pb2.JobSpec) -> job_pb2.JobSpec:
    full = job_pb2.JobSpec()
    full.CopyFrom(spec)
    full.DiscardUnknownFields()  # nobody has looked at those
    full.kind = full.kind or job_pb2.JOB_KIND_BATCH
    full.tenant = full.tenant or _DEFAULT_TENANT
    return full
