"""A measuring process without a GPU: answers as the real one would in each of the ways that one can end.

What it does hangs on the batch of the configuration; the figures are made up and go nowhere but into tests.
"""

import json
import os
import subprocess
import sys
import time

GOOD, FULL, DIES, HANGS, BABBLES, LIES, RAISES, LOSES_CARD = range(1, 9)

HEADER = {
    "date": "2026-01-02T03:04:05+00:00", "card": "NVIDIA H100 80GB HBM3", "total_mib": 81559.0,
    "mig_profile": "1g.10gb", "driver": "570.1", "cuda": "12.8", "cudnn": "91002", "torch": "2.9.0", "timm": "1.0.31",
    "transformers": "", "torchvision": "", "cudnn_benchmark": False, "expandable_segments": False, "allocator": "",
    "warm_up": 5, "schema": 1, "label": "measured",
}  # fmt: skip
READING = {
    "allocated_mib": 100.0, "reserved_mib": 120.0, "device_mib": 620.5, "device_source": "process",
    "context_mib": 480.0, "activity_percent": 41.5, "activity_source": "gpm", "tf32_products": False,
    "tf32_convolutions": True, "step_ms": 12.5, "step_p90_ms": 13.0, "throughput": 640.0, "steps": 120,
    "parameters": 1234,
}  # fmt: skip
OUTCOME = {
    "ending": "measured", "wall_s": 1.0, "reading": READING, "allocated_at_least_mib": None,
    "device_at_least_mib": None, "detail": "",
}  # fmt: skip


def say(answer: object) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


def main() -> None:
    request = json.loads(sys.stdin.readline())
    if "configuration" not in request:
        settings = request["settings"]
        seen = {name: settings[name] for name in ("cudnn_benchmark", "expandable_segments", "warm_up")}
        say({"header": {**HEADER, **seen}, "uuid": "MIG-1"})
        return
    batch = request["configuration"]["batch"]
    if batch == GOOD:
        say(OUTCOME)
    elif batch == FULL:
        say({**OUTCOME, "ending": "out-of-memory", "reading": None, "allocated_at_least_mib": 9000.0,
             "device_at_least_mib": 9500.0, "detail": "CUDA out of memory"})  # fmt: skip
    elif batch == DIES:
        os.abort()
    elif batch == HANGS:
        # A grandchild that would hold the pipe open after its parent's end.
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        with open(request["configuration"]["model"], "w") as file:  # noqa: PTH123
            file.write(f"{os.getpid()} {child.pid}")
        time.sleep(600)
    elif batch == BABBLES:
        sys.stdout.write("loading weights...\n")
    elif batch == LIES:
        say({**OUTCOME, "reading": {**READING, "step_ms": float("nan")}})
    elif batch == RAISES:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    elif batch == LOSES_CARD:
        say({"no_card": "NVML does not tell the card's memory: GPU is lost"})


if __name__ == "__main__":
    main()
