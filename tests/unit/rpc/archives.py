"""Archives as an attacker would make them."""

from __future__ import annotations

import gzip
import io
import tarfile
from collections.abc import Iterable


def entry(name: str, kind: bytes = tarfile.REGTYPE, target: str = "", size: int = 0) -> tarfile.TarInfo:
    """Returns a header that says what it is told to say."""
    header = tarfile.TarInfo(name)
    header.type, header.linkname, header.size = kind, target, size
    return header


def archive(entries: Iterable[tuple[tarfile.TarInfo, bytes]], form: int = tarfile.PAX_FORMAT) -> bytes:
    """Returns a gzip-compressed tar archive of exactly these entries."""
    plain = io.BytesIO()
    with tarfile.open(fileobj=plain, mode="w", format=form) as tar:
        for header, content in entries:
            if content:
                header.size = len(content)
            tar.addfile(header, io.BytesIO(content) if content else None)
    return gzip.compress(plain.getvalue(), mtime=0)


def files(**contents: bytes) -> bytes:
    """Returns an archive of regular files."""
    return archive((entry(name), content) for name, content in contents.items())
