"""What a program would download: well-known data sets get samples of the right shape, weights are taken as loaded."""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

#: Of each data set: how many samples it trains and tests with, the shape of its array, and its classes.
_SIZES: Final[Mapping[str, tuple[int, int, tuple[int, ...], int]]] = {
    "MNIST": (60_000, 10_000, (28, 28), 10),
    "FashionMNIST": (60_000, 10_000, (28, 28), 10),
    "KMNIST": (60_000, 10_000, (28, 28), 10),
    "CIFAR10": (50_000, 10_000, (32, 32, 3), 10),
    "CIFAR100": (50_000, 10_000, (32, 32, 3), 100),
}
#: ImageNet: its training images, its classes, and the side of an image before it is cropped.
_IMAGES, _IMAGE_CLASSES, _SIDE = 1_281_167, 1000, 256

#: What a library defines is there for as long as the library is.
_KEPT: list[Any] = []


class AbsentState(dict[Any, Any]):
    """Saved state that is not there: it has whatever is asked of it, and loading it changes nothing."""

    def __missing__(self, _: Any) -> Any:
        return AbsentState()

    def get(self, key: Any, default: Any = None) -> Any:
        """What is there, or nothing that bears everything."""
        return super().get(key, AbsentState() if default is None else default)

    def __index__(self) -> int:
        return 0

    def __float__(self) -> float:
        return 0.0

    def __add__(self, other: Any) -> Any:
        return other

    __radd__ = __add__


def changes() -> dict[str, Callable[[types.ModuleType], None]]:
    """What is changed in which module once it is imported."""
    return {
        "torchvision.datasets": _datasets,
        "torchvision.extension": _ops,
        "torch.hub": _hub,
        "torchvision.models._api": _torchvision_weights,
        "timm.models._builder": _timm_weights,
    }


def _ops(_: types.ModuleType) -> None:
    """A torchvision that was built for another torch lacks its compiled ops; their names must exist."""
    import torch

    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            library = torch.library.Library("torchvision", "FRAGMENT")
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            _KEPT.append(library)


def _datasets(module: types.ModuleType) -> None:
    for name, (train, test, shape, classes) in _SIZES.items():
        if hasattr(module, name):
            _synthetic(getattr(module, name), train, test, shape, classes)
    for name in ("ImageFolder", "ImageNet"):
        if hasattr(module, name):
            _synthetic_images(getattr(module, name))


def _synthetic(dataset: Any, train: int, test: int, shape: tuple[int, ...], classes: int) -> None:
    real = dataset.__init__

    def made(self: Any, root: Any = None, train_: bool = True, transform: Any = None,
             target_transform: Any = None, download: bool = False, **named: Any) -> None:  # fmt: skip
        in_training = bool(named.pop("train", train_))
        try:
            real(self, root, train=in_training, transform=transform, target_transform=target_transform, download=False)
        except (RuntimeError, OSError):
            _fill(self, root, transform, target_transform)
            count = train if in_training else test
            self.train = in_training
            self.data, self.targets = _samples(dataset, count, shape, classes)
            self.classes = [str(one) for one in range(classes)]
            if not isinstance(getattr(dataset, "class_to_idx", None), property):
                self.class_to_idx = {name: at for at, name in enumerate(self.classes)}

    dataset.__init__ = made


def _fill(self: Any, root: Any, transform: Any, target_transform: Any) -> None:
    from torchvision.datasets import VisionDataset

    VisionDataset.__init__(self, root or ".", transform=transform, target_transform=target_transform)


def _samples(dataset: Any, count: int, shape: tuple[int, ...], classes: int) -> tuple[Any, Any]:
    """Grey images, in no more memory than one."""
    import torch
    from torch.utils._python_dispatch import _disable_current_modes

    with torch._C.DisableTorchFunction(), _disable_current_modes():
        images = torch.full(shape, 128, dtype=torch.uint8).expand(count, *shape)
        labels = torch.arange(count) % classes
        return (images, labels) if len(shape) == 2 else (images.numpy(), labels.tolist())


def _synthetic_images(dataset: Any) -> None:
    real = dataset.__init__

    def made(self: Any, root: Any, *args: Any, **named: Any) -> None:
        if Path(root).is_dir():
            real(self, root, *args, **named)
            return
        transform = named.get("transform", args[0] if args and callable(args[0]) else None)
        _fill(self, root, transform, named.get("target_transform"))
        self.classes = [str(one) for one in range(_IMAGE_CLASSES)]
        self.class_to_idx = {name: at for at, name in enumerate(self.classes)}
        self.samples = self.imgs = _Images()
        self.targets = [0]
        self.loader = _grey

    dataset.__init__ = made


class _Images:
    def __len__(self) -> int:
        return _IMAGES

    def __getitem__(self, at: int) -> tuple[str, int]:
        return "", at % _IMAGE_CLASSES


def _grey(_: str) -> Any:
    from PIL import Image

    return Image.new("RGB", (_SIDE, _SIDE), (128, 128, 128))


def _hub(module: Any) -> None:
    module.load_state_dict_from_url = lambda *_, **__: AbsentState()


def _torchvision_weights(module: Any) -> None:
    module.load_state_dict_from_url = lambda *_, **__: AbsentState()
    module.WeightsEnum.get_state_dict = lambda *_, **__: AbsentState()


def _timm_weights(module: Any) -> None:
    module.load_pretrained = lambda *_, **__: None


def change_loaded() -> None:
    """Change what torch has imported of itself already."""
    import sys

    for name, change in changes().items():
        if name in sys.modules:
            change(sys.modules[name])
