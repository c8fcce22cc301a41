"""Modules that a dry run does without: trackers of experiments say nothing, and some libraries change on import."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

#: They report to servers and start processes; nothing that they give back matters to a step.
TRACKERS: Final = (
    "wandb", "mlflow", "comet_ml", "neptune", "clearml", "swanlab", "aim", "tensorboardX", "tensorboard",
    "torch.utils.tensorboard", "boto3", "botocore", "pynvml", "nvidia_smi",
)  # fmt: skip


class Inert:
    """Bears whatever is done to it, and gives itself back."""

    def __call__(self, *_: Any, **__: Any) -> Any:
        """Give itself back."""
        return self

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name.endswith("__"):
            raise AttributeError(name)
        return self

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def __iter__(self) -> Iterator[Any]:
        return iter(())

    def __getitem__(self, _: Any) -> Any:
        return self

    def __setitem__(self, *_: Any) -> None:
        pass

    def __len__(self) -> int:
        return 0

    def __bool__(self) -> bool:
        return True

    def __float__(self) -> float:
        return 0.0

    def __index__(self) -> int:
        return 0

    def __str__(self) -> str:
        return ""


class _InertModule(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name.endswith("__"):
            raise AttributeError(name)
        return Inert()


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds inert modules, and changes others once they are there."""

    def __init__(self, changes: Mapping[str, Callable[[types.ModuleType], None]]) -> None:
        self._changes = changes
        self._asked: set[str] = set()

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if any(name == one or name.startswith(one + ".") for one in TRACKERS):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        if name not in self._changes or name in self._asked:
            return None
        self._asked.add(name)
        found = importlib.machinery.PathFinder.find_spec(name, path, target)
        if found is not None and found.loader is not None:
            found.loader = _Changing(found.loader, self._changes[name])
        return found

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _InertModule(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        """It has no code."""


class _Changing(importlib.abc.Loader):
    def __init__(self, loader: Any, change: Callable[[types.ModuleType], None]) -> None:
        self._loader, self._change = loader, change

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType | None:
        made: types.ModuleType | None = self._loader.create_module(spec)
        return made

    def exec_module(self, module: types.ModuleType) -> None:
        self._loader.exec_module(module)
        self._change(module)


def install(changes: Mapping[str, Callable[[types.ModuleType], None]]) -> None:
    """From now on trackers are inert, and each named module is changed when it is imported."""
    sys.meta_path.insert(0, _Finder(changes))
