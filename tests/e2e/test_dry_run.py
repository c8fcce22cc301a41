"""Code is dry-run in a rootless container of an image that has torch, and nothing of it is left, whoever dies."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from puhui.rpc.channel import open_blocking_channel
from puhui.v1 import prediction_pb2
from puhui.v1.job_pb2 import JobSpec
from puhui.v1.job_service_pb2 import InlineCode, PredictJobRequest
from puhui.v1.job_service_pb2_grpc import JobServiceStub
from puhui.v1.node_pb2 import NODE_EVENT_KIND_CONTAINER_REMOVED, NODE_EVENT_KIND_CONTAINER_STARTED, NodeEventKind
from puhui.v1.node_service_pb2 import WatchEventsRequest, WatchEventsResponse
from tests.daemons import open_folder
from tests.e2e.site import Site, ended, site

pytestmark = [pytest.mark.podman, pytest.mark.timeout(300)]

IMAGE = "localhost/puhui/test-torch:latest"
#: Of this environment, what `import torch` needs.
PACKAGES = (
    "torch", "torchgen", "functorch", "sympy", "mpmath", "networkx", "jinja2", "markupsafe", "fsspec", "filelock",
    "typing_extensions.py", "numpy", "numpy.libs",
)  # fmt: skip
TRAINING = """\
import torch
from torch import nn
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4096, 4096)
        self.last = nn.Linear(4096, 10)
    def forward(self, x):
        return self.last(torch.relu(self.first(x)) + x)
model = Net().cuda()
optimizer = torch.optim.Adam(model.parameters())
for step in range(10 ** 6):
    loss = model(torch.randn(512, 4096, device="cuda")).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(step, loss.item())
"""
NEVER_TRAINS = "import time, torch\nprint('up', flush=True)\nwhile True:\n    pass\n"
SPEC = JobSpec(command=["python3", "train.py"], image=IMAGE)


def podman(*arguments: str) -> None:
    """Runs podman as the daemon does."""
    subprocess.run([sys.executable, "-m", "nodedaemon", "podman", "--", *arguments], check=True, capture_output=True)


@pytest.fixture(scope="module")
def image() -> Iterator[None]:
    with open_folder() as context:
        here = Path(sysconfig.get_path("purelib"))
        for name in PACKAGES:
            if (here / name).is_dir():
                shutil.copytree(here / name, context / "packages" / name, copy_function=_linked)
            elif (here / name).exists():
                _linked(here / name, context / "packages" / name)
        (context / "Containerfile").write_text(
            "FROM localhost/puhui/base:latest\nCOPY packages /usr/local/lib/python3.11/dist-packages\n"
        )
        subprocess.run(["chmod", "-R", "a+rX", context], check=True)
        podman("build", "--quiet", "--tag", IMAGE, str(context))
        try:
            yield
        finally:
            podman("image", "rm", "--force", IMAGE)


@pytest.fixture
def place(image: None) -> Iterator[Site]:
    with site("A100-80GB:1", "--warm-for", "0s") as made:
        with made.centre() as centre:
            # What has run shows that the node is there.
            centre.wait(centre.submit(JobSpec(command=["true"]), {"x.py": b""}).id, 60)
        yield made


def _linked(source: str | Path, target: str | Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def test_a_program_of_its_own_is_dry_run_and_later_submissions_know_it(place: Site) -> None:
    with place.centre() as centre:
        code = {"train.py": TRAINING.encode()}
        read = centre.predict(SPEC, code).prediction
        assert read.tier == prediction_pb2.PREDICTION_TIER_STATIC
        answer = centre.predict(SPEC, code, budget_s=60).prediction
        assert answer.tier == prediction_pb2.PREDICTION_TIER_DRY_RUN
        assert answer.memory.p90_mib / answer.memory.p50_mib < read.memory.p90_mib / read.memory.p50_mib
        # Weights, gradients and Adam's two moments of 16.8 million numbers, and what CUDA takes.
        assert 4 * 64 < answer.memory.p50_mib < 4 * 64 + 2500
        assert place.leftovers() == (0, 0)
        job = centre.submit(SPEC, code)
        assert job.prediction.tier == prediction_pb2.PREDICTION_TIER_DRY_RUN
        ended(centre, job.id)
    assert place.leftovers() == (0, 0)


def test_a_control_plane_that_dies_meanwhile_leaves_nothing(place: Site) -> None:
    channel = open_blocking_channel(place.address)
    with place.node() as node:
        events = node.WatchEvents(WatchEventsRequest(), timeout=120, wait_for_ready=True)
        asked = PredictJobRequest(spec=SPEC, inline=InlineCode(files={"train.py": NEVER_TRAINS}))
        asked.budget.FromSeconds(100)
        answer = JobServiceStub(channel).PredictJob.future(asked, wait_for_ready=True, timeout=120)
        left = until_dry_run(events, NODE_EVENT_KIND_CONTAINER_STARTED)
        place.kill("controlplane")
        answer.cancel()  # type: ignore[no-untyped-call]
        channel.close()
        place.start("controlplane")
        while until_dry_run(events, NODE_EVENT_KIND_CONTAINER_REMOVED) != left:
            pass
        events.cancel()  # type: ignore[no-untyped-call]
    assert place.leftovers() == (0, 0)


def until_dry_run(events: Iterable[WatchEventsResponse], kind: NodeEventKind.ValueType) -> str:
    """Returns the id of the next dry run of which the node tells this."""
    return next(
        one.event.owner.job_id for one in events if one.event.kind == kind and one.event.owner.job_id.startswith("d-")
    )
