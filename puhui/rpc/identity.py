"""Ids and digests."""

from __future__ import annotations

import hashlib
import re
import secrets
from pathlib import Path

__all__ = ["DIGEST_PATTERN", "digest_of", "new_id", "request_digest"]

_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"  # Crockford's base 32: nothing to mistake

DIGEST_PATTERN = re.compile(r"sha256:[0-9a-f]{64}")
"""What a bundle id or an artifact digest looks like."""


def new_id(prefix: str) -> str:
    """Returns `prefix`, "-" and 12 random characters: 60 bits, enough for one centre for ever."""
    return f"{prefix}-" + "".join(secrets.choice(_ALPHABET) for _ in range(12))


def digest_of(path: Path) -> str:
    """Returns "sha256:" and the hex digest of a file's bytes.

    Raises:
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        return "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()


def request_digest(request: bytes) -> str:
    """Returns the digest by which a repeated request is told from another with the same id."""
    return hashlib.sha256(request).hexdigest()
