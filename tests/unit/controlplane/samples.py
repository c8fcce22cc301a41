"""Cards, nodes and jobs for the tests of the control plane. The card is an H100 80GB as its driver reports it."""

from __future__ import annotations

from controlplane import happenings
from controlplane.fleet import Geometry, GpuView, Use, geometry_of
from controlplane.jobs import transition
from controlplane.records import JobRecord
from puhui.rpc.moment import timestamp
from puhui.v1 import card_pb2, job_pb2, node_pb2, prediction_pb2

H100 = "NVIDIA H100 80GB HBM3"
H100_PROFILES = (
    ("1g.10gb", 19, 9984, 1, 7, 1, (0, 1, 2, 3, 4, 5, 6)),
    ("1g.10gb+me", 20, 9984, 1, 1, 1, (0, 1, 2, 3, 4, 5, 6)),
    ("1g.20gb", 15, 20096, 1, 4, 2, (0, 2, 4, 6)),
    ("2g.20gb", 14, 20096, 2, 3, 2, (0, 2, 4)),
    ("3g.40gb", 9, 40448, 3, 2, 4, (0, 4)),
    ("4g.40gb", 5, 40448, 4, 1, 4, (0,)),
    ("7g.80gb", 0, 81152, 7, 1, 8, (0,)),
)


def gpu(uuid: str = "GPU-0", index: int = 0) -> card_pb2.Gpu:
    return card_pb2.Gpu(
        uuid=uuid,
        index=index,
        model=H100,
        memory_mib=81559,
        mig_mode=card_pb2.MIG_MODE_ENABLED,
        emulated=True,
        profiles=[
            card_pb2.Profile(
                name=name,
                profile_id=number,
                memory_mib=memory,
                compute_slices=compute,
                max_instances=most,
                placements=[card_pb2.Placement(start=start, size=size) for start in starts],
            )
            for name, number, memory, compute, most, size, starts in H100_PROFILES
        ],
    )


GEOMETRY: Geometry = geometry_of(gpu())


def view(uuid: str = "GPU-0", uses: tuple[Use, ...] = (), *, usable: bool = True, node: str = "n-1") -> GpuView:
    return GpuView(node, node, uuid, int(uuid.rpartition("-")[2]), True, GEOMETRY, uses, usable)


def inventory(name: str = "node-1", gpus: int = 1) -> node_pb2.NodeInventory:
    return node_pb2.NodeInventory(
        name=name,
        gpus=[gpu(f"GPU-{name}-{index}", index) for index in range(gpus)],
        runtime=node_pb2.Runtime(kind=node_pb2.RUNTIME_KIND_PROCESS),
        revision=1,
    )


def queued(job_id: str = "j-000000000000", at: float = 1000.0, **spec: object) -> JobRecord:
    """A job that was just accepted."""
    wanted = job_pb2.JobSpec(command=["python3", "x.py"], tenant="default", **spec)  # type: ignore[arg-type]
    return JobRecord(
        job_pb2.Job(
            id=job_id,
            centre="here",
            spec=wanted,
            bundle_id="sha256:" + "0" * 64,
            state=job_pb2.JOB_STATE_QUEUED,
            create_time=timestamp(at),
        )
    )


def first_events(record: JobRecord, at: float = 1000.0) -> tuple[JobRecord, list[job_pb2.JobEvent]]:
    sizing = prediction_pb2.Sizing(origin=prediction_pb2.SIZING_ORIGIN_MEMORY, required_mib=9000)
    record, submitted = transition(record, happenings.Submitted(), at)
    record, predicted = transition(record, happenings.Predicted(None, sizing), at)
    return record, [submitted, predicted]


def attempt(start: int = 0, size: int = 1, token: int = 1, profile: str = "1g.10gb") -> job_pb2.Attempt:
    return job_pb2.Attempt(
        fencing_token=token,
        node_id="n-1",
        gpu_uuid="GPU-0",
        gpu_model=H100,
        profile=profile,
        placement=card_pb2.Placement(start=start, size=size),
    )


def container(exit_code: int | None = None, **fields: object) -> node_pb2.Container:
    made = node_pb2.Container(id="c-1", state=node_pb2.CONTAINER_STATE_RUNNING, **fields)  # type: ignore[arg-type]
    if exit_code is not None:
        made.state = node_pb2.CONTAINER_STATE_EXITED
        made.exit_code = exit_code
    return made
