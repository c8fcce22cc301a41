"""A job that does not fit on its slice, over real daemons and the real command: it ends well without anybody's help."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.centre import RunningCentre, running_centre

# What PyTorch prints, without a GPU to print it on.
SCRIPT = """\
import os
import sys

if int(os.environ["PUHUI_SLICE_MEMORY_MIB"]) < 15_000:
    sys.exit("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 12.00 GiB. GPU 0 has a total capacity of")
print("fits on", os.environ["PUHUI_SLICE_PROFILE"])
"""


def puhui(centre: RunningCentre, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "puhui.cli", *arguments],
        cwd=folder,
        env={**os.environ, "PUHUI_SERVER": centre.address, "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_it_goes_on_with_the_next_size_up_and_the_next_job_begins_with_it(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(SCRIPT)
    with running_centre("H100-80GB-SXM5:1", runtime="process") as centre:
        first = puhui(centre, tmp_path, "run", "train.py")
        assert (first.returncode, first.stdout) == (0, "fits on 1g.20gb\n"), first.stderr
        said = " ".join(first.stderr.split())
        assert "it ran out of device memory on 1g.10gb" in said
        assert "it is tried again from its beginning on the next size up, 1g.20gb" in said
        (tmp_path / "train.py").write_text("# Now with a comment.\n" + SCRIPT)
        predicted = json.loads(puhui(centre, tmp_path, "predict", "--json", "train.py").stdout)
        assert "an earlier run of this code did not come to its end" in json.dumps(predicted)
        again = puhui(centre, tmp_path, "run", "train.py")
        assert (again.returncode, again.stdout) == (0, "fits on 1g.20gb\n"), again.stderr
        assert "ran out" not in again.stderr
        kept = puhui(centre, tmp_path, "run", "--profile", "1g.10gb", "train.py")
        assert kept.returncode == 1
        assert "the profile that was asked for, which is kept; ask for 1g.20gb" in " ".join(kept.stderr.split())
