"""A gRPC client that knows nothing of Puhui: `buf curl`, by reflection."""

from __future__ import annotations

import base64
import hashlib
import json
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest
from google.rpc.error_details_pb2 import ErrorInfo

from puhui.rpc.bundle import pack_files
from tests.centre import RunningCentre, running_centre

CODE = """
import os, pathlib
print("learned something")
pathlib.Path(os.environ["PUHUI_OUTPUTS"], "answer.txt").write_text("42")
"""


@pytest.fixture(scope="module")
def centre() -> Iterator[RunningCentre]:
    with running_centre() as running:
        yield running


def curl(*arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["buf", "curl", "--protocol", "grpc", "--http2-prior-knowledge", *arguments],
        capture_output=True,
        text=True,
        check=check,
        timeout=60,
    )


def call(address: str, method: str, request: dict[str, Any]) -> list[dict[str, Any]]:
    """Calls a method and returns its responses: one, or those of a stream."""
    done = curl("-d", json.dumps(request), f"http://{address}/puhui.v1.{method}")
    decoder, text, found = json.JSONDecoder(), done.stdout.strip(), []
    while text:
        response, end = decoder.raw_decode(text)
        found.append(response)
        text = text[end:].strip()
    return found


def test_both_servers_list_their_services_by_reflection(centre: RunningCentre) -> None:
    controlplane = curl("--list-services", f"http://{centre.address}").stdout.split()
    node = curl("--list-services", f"http://{centre.node.address}").stdout.split()
    assert {"puhui.v1.JobService", "puhui.v1.FleetService", "puhui.v1.PeerService"} <= set(controlplane)
    assert {"grpc.health.v1.Health"} <= set(controlplane) & set(node)
    assert "puhui.v1.NodeService" in node


@pytest.mark.podman
def test_it_submits_a_job_and_reads_its_result(centre: RunningCentre) -> None:
    spec = {"name": "foreign", "command": ["python3", "main.py"], "resources": {"memory_mib": 6000}}
    [submitted] = call(
        centre.address,
        "JobService/SubmitJob",
        {"spec": spec, "inline": {"files": {"main.py": CODE}}, "requestId": "f1"},
    )
    job_id = submitted["job"]["id"]
    seen = call(centre.address, "JobService/WatchJob", {"jobId": job_id})
    reasons = [response["event"]["reason"] for response in seen]
    assert seen[-1]["job"]["state"] == "JOB_STATE_SUCCEEDED", reasons
    assert reasons.index("SLICE_CREATED") < reasons.index("CONTAINER_STARTED") < reasons.index("SLICE_DESTROYED")

    logs = call(centre.address, "JobService/ReadLogs", {"jobId": job_id})
    assert b"".join(base64.b64decode(part["chunk"]["data"]) for part in logs) == b"learned something\n"
    artifacts = call(centre.address, "JobService/GetArtifacts", {"jobId": job_id})
    assert [file["path"] for file in artifacts[0]["manifest"]["files"]] == ["answer.txt"]

    [slices] = call(centre.node.address, "NodeService/ListSlices", {}) or [{}]
    [containers] = call(centre.node.address, "NodeService/ListContainers", {}) or [{}]
    assert slices == {}
    assert containers == {}


def test_a_refusal_carries_its_reason(centre: RunningCentre) -> None:
    done = curl(
        "-d",
        '{"jobId": "j-nowhere"}',
        f"http://{centre.address}/puhui.v1.JobService/GetJob",
        check=False,
    )
    error = json.loads(done.stderr)
    assert error["code"] == "not_found"
    [detail] = error["details"]
    assert detail["type"] == "google.rpc.ErrorInfo"
    info = ErrorInfo.FromString(base64.b64decode(detail["value"] + "=="))
    assert (info.domain, info.reason, dict(info.metadata)) == ("puhui", "JOB_NOT_FOUND", {"job_id": "j-nowhere"})
    assert "j-nowhere" in error["message"]


@pytest.mark.podman
def test_a_script_drives_a_node_by_itself(centre: RunningCentre) -> None:
    """Slice, container, hot-plug, a command beside it, utilization, events: the node needs no control plane for it."""
    node = centre.node.address
    owner = {"centre": "script", "jobId": "s1", "attempt": 1, "fencingToken": 1}
    archive = pack_files({"main.py": b"import time; time.sleep(120)"})
    digest = "sha256:" + hashlib.sha256(archive).hexdigest()
    parts = [{"header": {"bundleId": digest, "sizeBytes": len(archive)}}, {"chunk": base64.b64encode(archive).decode()}]
    curl("-d", "".join(json.dumps(part) for part in parts), f"http://{node}/puhui.v1.NodeService/PutBundle")
    [inventory] = call(node, "NodeService/GetNode", {})
    gpu = inventory["node"]["gpus"][0]
    profile = next(one for one in gpu["profiles"] if one["name"] == "1g.10gb")
    request = {"owner": owner, "gpuUuid": gpu["uuid"], "profile": "1g.10gb", "placement": profile["placements"][0]}
    [made] = call(node, "NodeService/CreateSlice", {**request, "requestId": "slice"})
    uuid = made["slice"]["uuid"]
    assert (made["slice"]["state"], made["slice"]["emulated"]) == ("SLICE_STATE_IDLE", True)

    start = {"owner": owner, "command": ["python3", "main.py"], "bundleId": digest, "requestId": "container"}
    [started] = call(node, "NodeService/CreateContainer", start)
    assert "sliceUuids" not in started["container"]
    one = {"owner": owner, "sliceUuid": uuid}
    [attached] = call(node, "NodeService/AttachSlice", {**one, "requestId": "attach"})
    assert attached["container"]["sliceUuids"] == [uuid]
    look = "import os; print(len(os.listdir('/dev/nvidia-caps')), os.environ['CUDA_VISIBLE_DEVICES'])"
    said = call(node, "NodeService/Exec", {"start": {"owner": owner, "command": ["python3", "-c", look]}})
    output = b"".join(base64.b64decode(part["output"]["data"]) for part in said if "output" in part)
    assert (output.decode(), said[-1]["exitCode"]) == (f"2 {uuid}\n", 0)
    [shown] = [one for one in call(node, "NodeService/ListSlices", {})[0]["slices"] if one["uuid"] == uuid]
    assert (shown["state"], shown["containerId"]) == ("SLICE_STATE_ACTIVE", started["container"]["id"])
    call(node, "NodeService/DetachSlice", {**one, "requestId": "detach"})
    call(node, "NodeService/RemoveContainer", {"owner": owner, "discardResults": True, "requestId": "remove"})
    call(node, "NodeService/DestroySlice", {**one, "requestId": "destroy"})
    assert all(one["uuid"] != uuid for one in call(node, "NodeService/ListSlices", {})[0].get("slices", []))
