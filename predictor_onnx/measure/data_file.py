"""Writes the data file row by row, so that neither a crash nor a power cut costs more than the row in hand."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

from predictor_onnx.measure.rows import Header, MeasuredRow, RowsRefusedError, header_of, read


class DataFile:
    """A file of measured rows, open for more of them."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def append(self, row: MeasuredRow) -> None:
        """Write a row to disk, and come back when it is there.

        Raises:
            OSError: it could not be written.
        """
        self._line(row.to_json())

    def _line(self, text: str) -> None:
        self._file.write(text.encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())


@contextmanager
def begin(path: Path, header: Header) -> Iterator[DataFile]:
    """A new file with its header.

    Raises:
        RowsRefusedError: there is a file already.
        OSError: it could not be written.
    """
    try:
        file = path.open("xb")
    except FileExistsError as error:
        raise RowsRefusedError(
            f"{path} is there already: give another --output, or continue it with --resume."
        ) from error
    with file:
        made = DataFile(file)
        made._line(header.to_json())
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
        yield made


@contextmanager
def resume(path: Path, header: Header) -> Iterator[tuple[DataFile, tuple[MeasuredRow, ...]]]:
    """A file that was begun, and the rows it has; a last line that was cut is taken off.

    Args:
        path: the file.
        header: what is at hand now; all but its date must be what the file was begun with.

    Raises:
        RowsRefusedError: there is no such file, it is damaged, or was measured on or with something else.
        OSError: it could not be written.
    """
    if path.suffix == ".gz":
        raise RowsRefusedError(f"{path.name} is compressed; unpack it to continue it.")
    _take_off_cut_line(path)
    known = read(path)
    if replace(known.header, date=header.date) != header:
        names = [
            name for name in vars(header) if name != "date" and getattr(header, name) != getattr(known.header, name)
        ]
        raise RowsRefusedError(
            f"{path.name} was measured with another {', '.join(names)}; rows of two machines or settings are never in "
            "one file: give another --output."
        )
    with path.open("ab") as file:
        yield DataFile(file), known.rows


def _take_off_cut_line(path: Path) -> None:
    try:
        with path.open("r+b") as file:
            content = file.read()
            whole = content.rfind(b"\n") + 1
            if whole and whole < len(content):
                # Other people's files are left alone: only one of ours is cut.
                header_of(content[: content.index(b"\n")].decode())
                file.truncate(whole)
                os.fsync(file.fileno())
    except (OSError, ValueError) as error:
        raise RowsRefusedError(f"{path.name} cannot be continued: {error}. Begin a file without --resume.") from error
