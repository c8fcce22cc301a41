"""Parses the program that a command starts, off the event loop and within limits."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

from controlplane.entrypoint import LARGEST_PARSED_BYTES, Entrypoint, require_parsable
from controlplane.lasting import Lasting

__all__ = ["Parsing"]


class Parsing:
    """Parses one program at a time: two at once would take twice the memory and be no faster.

    Args:
        lasting: lets a parse that nobody waits for any more end before the next begins.
        parse: refuses a file, given by path and content, that does not parse.
    """

    def __init__(self, lasting: Lasting, parse: Callable[[str, bytes], None] = require_parsable) -> None:
        self._lasting = lasting
        self._parse = parse
        self._turn = asyncio.Lock()

    async def require(
        self, entrypoint: Entrypoint | None, sizes: Mapping[str, int], sources: Mapping[str, bytes]
    ) -> str:
        """Refuses Python code that does not parse. Returns what to say of code that was not tried; "" if it was.

        Args:
            entrypoint: the file that the command starts, if any.
            sizes: size of every file of the bundle, in bytes, by path.
            sources: content of the files that were read, by path.

        Raises:
            Refusal: INVALID_ARGUMENT with CODE_UNPARSABLE.
        """
        if entrypoint is None or not entrypoint.python:
            return ""
        path = entrypoint.path
        if sizes[path] > LARGEST_PARSED_BYTES:
            largest = f"{LARGEST_PARSED_BYTES // 2**10} KiB"
            return f"{path} has {sizes[path]} bytes and was not parsed, as nothing over {largest} is; "
        if path in sources:
            async with self._turn:
                await self._lasting.do(asyncio.to_thread(self._parse, path, sources[path]))
        return ""
