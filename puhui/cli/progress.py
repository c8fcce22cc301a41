"""How far a transfer has come, on a terminal; on anything else, nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from puhui.cli.terminal import terminal
from puhui.client.archives import Progress as Listener

__all__ = ["transfer_bar"]


@contextlib.contextmanager
def transfer_bar(label: str) -> Iterator[Listener | None]:
    """Shows a bar on stderr while the block runs, and yields what moves it; None where there is no terminal."""
    screen = terminal()
    if screen.as_json or not screen.err.is_terminal:
        yield None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn())
    with Progress(*columns, console=screen.err, transient=True) as bar:
        task = bar.add_task(f"{label:<10}", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
