"""The command `puhui-controlplane`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.daemons import daemon


def serve(state: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "controlplane", "serve", "--state", str(state), *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def test_what_cannot_be_served_ends_with_a_sentence(tmp_path: Path) -> None:
    public = serve(tmp_path / "a", "--listen", "0.0.0.0:0")
    assert public.returncode == 1
    assert "loopback or a unix socket only" in public.stderr
    assert "Traceback" not in public.stderr
    assert serve(tmp_path / "b", "--log-level", "loud").returncode == 2
    (tmp_path / "empty").write_text("")
    empty = serve(tmp_path / "c", "--listen", "127.0.0.1:0", "--join-token-file", str(tmp_path / "empty"))
    assert empty.returncode == 1
    assert "is empty; remove it" in empty.stderr


def test_a_second_one_on_the_same_state_or_address_ends(tmp_path: Path) -> None:
    with daemon("controlplane", ["--listen", "127.0.0.1:0", "--state", str(tmp_path / "a")], tmp_path / "log") as one:
        same_state = serve(tmp_path / "a", PUHUI_CONTROLPLANE_LISTEN="127.0.0.1:0")
        assert same_state.returncode == 1
        assert "in use by another control plane" in same_state.stderr
        same_address = serve(tmp_path / "b", PUHUI_CONTROLPLANE_LISTEN=one.address)
        assert same_address.returncode == 1
        assert "is another daemon running there?" in same_address.stderr
        assert one.stop() == 0
    assert (tmp_path / "a" / "join-token").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o700


def test_an_idle_policy_that_cannot_be_is_refused(tmp_path: Path) -> None:
    short = serve(tmp_path / "a", "--idle-after", "200ms")
    assert short.returncode == 2
    assert "three samples" in short.stderr
    (tmp_path / "tenants.toml").write_text('[tenants.lab]\nidle = "5m"\n')
    unknown = serve(tmp_path / "a", "--tenants", str(tmp_path / "tenants.toml"))
    assert unknown.returncode == 2
    assert "tenants.lab.idle" in unknown.stderr
