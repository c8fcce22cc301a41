"""The centre that a command talks to."""

from __future__ import annotations

from puhui.cli.settings import server_address
from puhui.cli.terminal import terminal
from puhui.cli.words import span
from puhui.client import Centre, Trouble

__all__ = ["connect"]


def connect(server: str | None) -> Centre:
    """Returns a connection to the centre that the flag or the settings name.

    Raises:
        Mistake: what they name is no address.
    """
    return Centre(server_address(server), on_trouble=_tell)


def _tell(trouble: Trouble) -> None:
    if trouble.answered:
        if trouble.waited_s == 0:
            terminal().note(trouble.failure, "waiting")
    elif trouble.waited_s == 0:
        terminal().note(f"{trouble.address} does not answer; trying again. Jobs run on without it.", "waiting")
    elif trouble.waited_s > 30:
        terminal().note(f"{trouble.address} has not answered for {span(trouble.waited_s)}", "waiting")
