"""How far a transfer has come, on a terminal; on anything else, nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from rich.progress import BarColumn, DownloadColumn, Progress, Task, TextColumn, TransferSpeedColumn
from rich.text import Text

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
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True), _Speed())
    with Progress(*columns, console=screen.err, transient=True) as bar:
        # While the size is not known there is nothing to show.
        task = bar.add_task(f"{label:<10}", total=None, visible=False)
        yield lambda done, total: bar.update(task, completed=done, total=total, visible=total > 0)


class _Speed(TransferSpeedColumn):
    def render(self, task: Task) -> Text:
        """Returns the speed; nothing while there is none to tell."""
        return super().render(task) if task.finished_speed or task.speed else Text()
