"""What a daemon and its containers may leave on a host."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Collection
from pathlib import Path

from tests.integration.node.conftest import podman


def processes_about(words: Collection[str]) -> list[str]:
    """Returns the processes that have one of these words on their command line or in their environment."""
    wanted, found = [word.encode() for word in words], []
    for folder in Path("/proc").glob("[0-9]*"):
        if int(folder.name) == os.getpid():
            continue
        try:
            command = (folder / "cmdline").read_bytes()
            told = command + b"\0" + (folder / "environ").read_bytes()
        except OSError:
            continue  # it has ended, or it is of another user and none of ours
        if any(word in told for word in wanted):
            found.append(f"{folder.name} {command.replace(bytes(1), b' ').decode(errors='replace')}")
    return found


def mounts_about(words: Collection[str]) -> list[str]:
    """Returns the mounts of this host, and of the rootless namespace, that have one of these words in them."""
    here = Path("/proc/self/mountinfo").read_text()
    inside = podman("unshare", "cat", "/proc/self/mountinfo")
    return [line for line in (here + inside).splitlines() if any(word in line for word in words)]


def unfinished(journal: Path) -> dict[str, list[tuple[object, ...]]]:
    """Returns what the journal of a daemon that has ended still means to do or to keep."""
    wanted = {
        "slices": "SELECT id, job_id, stage, notice FROM slices WHERE stage != 'destroyed'",
        "containers": "SELECT job_id, stage, container_id FROM containers",
        "execs": "SELECT id, job_id, stage FROM execs",
    }
    connection = sqlite3.connect(journal)
    try:
        found = {table: connection.execute(query).fetchall() for table, query in wanted.items()}
    finally:
        connection.close()
    return {table: rows for table, rows in found.items() if rows}
