"""Text of strangers, for people to read."""

from __future__ import annotations

__all__ = ["plain_text"]


def plain_text(text: str, most: int) -> str:
    """Returns what another centre says without what would do something to a terminal."""
    return "".join(character if character.isprintable() else "?" for character in text[:most])
