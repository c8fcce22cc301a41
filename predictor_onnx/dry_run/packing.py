"""Packs the dry run into one file that a Python with torch runs, and nothing else."""

from __future__ import annotations

import ast
import io
import zipfile
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Final

_PACKAGE: Final = "predictor_onnx"
_ROOT: Final = Path(__file__).parent.parent
_START: Final = f"{_PACKAGE}.dry_run.__main__"
#: What the archive begins with; the package's own front door, which needs an ONNX runtime, stays behind.
_MAIN: Final = f"import sys\n\nfrom {_START} import main\n\nsys.exit(main())\n"
#: Archives of the same files are the same: no time of day is in them.
_WHEN: Final = (1980, 1, 1, 0, 0, 0)


def modules() -> list[str]:
    """Dotted names of the modules that a dry run needs, packages without their parent."""
    found: set[str] = set()
    left = [_START]
    while left:
        name = left.pop()
        if name in found or name == _PACKAGE:
            continue
        found.add(name)
        left.append(name.rpartition(".")[0])
        left.extend(_imported(_path(name)))
    return sorted(found)


@lru_cache(maxsize=1)
def packed() -> bytes:
    """A zip archive that ``python3 -I ARCHIVE`` runs; its options are those of this package's program."""
    into = io.BytesIO()
    with zipfile.ZipFile(into, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(zipfile.ZipInfo("__main__.py", _WHEN), _MAIN)
        archive.writestr(zipfile.ZipInfo(f"{_PACKAGE}/__init__.py", _WHEN), "")
        for name in modules():
            path = _path(name)
            entry = zipfile.ZipInfo(f"{_PACKAGE}/{path.relative_to(_ROOT).as_posix()}", _WHEN)
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, path.read_bytes())
    return into.getvalue()


def _path(name: str) -> Path:
    path = _ROOT.joinpath(*name.split(".")[1:])
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def _imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith(_PACKAGE + "."):
            yield node.module
            yield from (inner for name in node.names if _path(inner := f"{node.module}.{name.name}").is_file())
        elif isinstance(node, ast.Import):
            yield from (name.name for name in node.names if name.name.startswith(_PACKAGE + "."))
