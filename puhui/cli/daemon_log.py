"""Why a daemon ended, as far as its log says so."""

from __future__ import annotations

import json
import re
from pathlib import Path

__all__ = ["exit_words", "reason_in"]

_LOOKED_AT = 64 * 1024
_BOX = re.compile(r"^│\s*(.*?)\s*│$", re.MULTILINE)
_OWN_WORDS = re.compile(r"^(?:puhui-)?(?:controlplane|nodedaemon): (.+)$", re.MULTILINE)
_EXCEPTION = re.compile(r"^(?:[a-z_]\w*\.)*[A-Z]\w*(?:Error|Exception|Exit)\w*: (.+)$", re.MULTILINE)


def reason_in(log: Path, begin: int = 0) -> str:
    """Returns the reason that a log gives for its daemon's end, in one line; "" when it gives none.

    Args:
        log: the file.
        begin: byte at which the daemon that ended began to write.
    """
    try:
        text = log.read_bytes()[begin:][-_LOOKED_AT:].decode(errors="replace")
    except OSError:
        return ""
    for lines in (_OWN_WORDS.findall(text), _EXCEPTION.findall(text), _errors(text)):
        if lines:
            return _plain(str(lines[-1]))
    # A command line that was not understood is explained in a box.
    return _plain(" ".join(_BOX.findall(text)).removeprefix("Invalid value for "))


def exit_words(code: int) -> str:
    """Returns how a process ended whose exit code is `code`, as `subprocess` gives it."""
    return f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"


def _errors(text: str) -> list[str]:
    found = []
    for line in text.splitlines():
        if not line.startswith("{"):
            continue
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if entry.get("level") in ("error", "critical"):
            detail = entry.get("error") or entry.get("message")
            found.append(f"{entry.get('event', '')}: {detail}" if detail else str(entry.get("event", "")))
    return found


def _plain(line: str) -> str:
    return " ".join(line.split()).rstrip(".")
