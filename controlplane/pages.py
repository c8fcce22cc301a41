"""Page tokens: they belong to one centre and one filter, and nobody can make one up."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac

import grpc
from google.protobuf.message import Message

from puhui.rpc.errors import Refusal

__all__ = ["Page", "Pages", "page_size"]

_DEFAULT_SIZE = 50
_MOST_SIZE = 500
# Half of what a message may be.
_MOST_BYTES = 4 * 2**20
_SEAL_BYTES = 12


def page_size(asked: int) -> int:
    """Returns how many entries a page has that was asked for with `asked` (0: as many as usual)."""
    return min(asked or _DEFAULT_SIZE, _MOST_SIZE)


class Page:
    """A page that is being filled: it is full by number of entries, or by their size in bytes.

    Args:
        size: number of entries.
        most_bytes: their size together; a single entry may be larger.
    """

    def __init__(self, size: int, most_bytes: int = _MOST_BYTES) -> None:
        self._entries = size
        self._bytes = most_bytes
        self._empty = True

    def takes(self, entry: Message) -> bool:
        """Returns whether there is room for one more entry, and takes the room."""
        self._entries -= 1
        self._bytes -= entry.ByteSize()
        fits = self._entries >= 0 and (self._bytes >= 0 or self._empty)
        self._empty = False
        return fits


class Pages:
    """Makes and reads the page tokens of a centre.

    Args:
        centre_id: the centre's random id, the key of the seal.
    """

    def __init__(self, centre_id: str) -> None:
        self._key = centre_id.encode()

    def token(self, of: bytes, after: str) -> str:
        """Returns the token of the page that follows the entry `after`.

        Args:
            of: what is listed: the list's name and filter.
            after: position of the last entry of the page before.
        """
        return base64.urlsafe_b64encode(self._seal(of, after) + after.encode()).decode().rstrip("=")

    def after(self, of: bytes, token: str) -> str:
        """Returns the position after which a page begins.

        Raises:
            Refusal: INVALID_ARGUMENT with PAGE_TOKEN_INVALID.
        """
        try:
            raw = base64.urlsafe_b64decode(token + "=" * (-len(token) % 4))
            seal, after = raw[:_SEAL_BYTES], raw[_SEAL_BYTES:].decode()
        except (binascii.Error, ValueError):
            seal, after = b"", ""
        if not hmac.compare_digest(seal, self._seal(of, after)):
            raise Refusal(
                grpc.StatusCode.INVALID_ARGUMENT,
                "PAGE_TOKEN_INVALID",
                "this page token is not of this list, filter and centre; begin again without one",
            )
        return after

    def _seal(self, of: bytes, after: str) -> bytes:
        digest = hmac.new(self._key, digestmod=hashlib.sha256)
        digest.update(hashlib.sha256(of).digest())
        digest.update(after.encode())
        return digest.digest()[:_SEAL_BYTES]
