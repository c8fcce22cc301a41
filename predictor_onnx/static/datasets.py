"""Shapes of well-known datasets and of what image transforms make of them."""

from __future__ import annotations

from typing import Final

from predictor_onnx.static.context import Hints
from predictor_onnx.static.operands import argument
from predictor_onnx.static.values import UNKNOWN, Record, Value

#: channels and native side, None where the files decide.
DATASETS: Final[dict[str, tuple[int, int | None]]] = {
    "CIFAR10": (3, 32), "CIFAR100": (3, 32), "SVHN": (3, 32), "MNIST": (1, 28),
    "FashionMNIST": (1, 28), "KMNIST": (1, 28), "EMNIST": (1, 28), "STL10": (3, 96),
    "ImageFolder": (3, None), "ImageNet": (3, None), "FakeData": (3, 224), "Food101": (3, None),
    "OxfordIIITPet": (3, None), "Flowers102": (3, None), "CelebA": (3, None),
    "StanfordCars": (3, None), "Caltech101": (3, None), "Places365": (3, 256),
}  # fmt: skip
#: Samples for training and for testing, as their makers give them.
_SAMPLES: Final[dict[str, tuple[int, int]]] = {
    "CIFAR10": (50_000, 10_000), "CIFAR100": (50_000, 10_000), "MNIST": (60_000, 10_000),
    "FashionMNIST": (60_000, 10_000), "KMNIST": (60_000, 10_000), "SVHN": (73_257, 26_032),
    "STL10": (5_000, 8_000), "Food101": (75_750, 25_250),
}  # fmt: skip
#: Those of them that are asked by ``split`` and not by ``train``.
_BY_SPLIT: Final = frozenset(["SVHN", "STL10", "Food101"])
_SIZING: Final = frozenset(["Resize", "RandomResizedCrop", "CenterCrop", "RandomCrop", "FiveCrop"])


def image_size(name: str, args: list[Value], kwargs: dict[str, Value]) -> Value:
    """A transform, reduced to the image side that it leaves."""
    if name == "Compose":
        steps = args[0] if args and isinstance(args[0], (list, tuple)) else []
        found = [s.attrs.get("size") for s in steps if isinstance(s, Record)]
        known = [size for size in found if size is not None]
        return Record("transform", {"size": known[-1] if known else None})
    if name in _SIZING:
        size = argument(args, kwargs, 0, "size", None)
        if isinstance(size, (list, tuple)) and size:
            size = size[0]
        return Record("transform", {"size": size if isinstance(size, int) else None})
    return Record("transform", {"size": None})


def dataset(name: str, args: list[Value], kwargs: dict[str, Value], hints: Hints) -> Value:
    """A dataset of images, by the shape of one sample."""
    channels, side = DATASETS[name]
    transform = kwargs.get("transform", UNKNOWN)
    if transform is UNKNOWN:
        transform = next((a for a in args if isinstance(a, Record) and a.kind == "transform"), None)
    if name == "FakeData":
        size = argument(args, kwargs, 1, "image_size", (3, 224, 224))
        if isinstance(size, (list, tuple)) and all(isinstance(s, int) for s in size):
            return Record("ImageDataset", {"shape": tuple(size), "length": _length(name, args, kwargs)})
    if isinstance(transform, Record) and isinstance(transform.attrs.get("size"), int):
        side = transform.attrs["size"]
    side = side if side is not None else hints.image
    return Record("ImageDataset", {"shape": (channels, side, side), "length": _length(name, args, kwargs)})


def _length(name: str, args: list[Value], kwargs: dict[str, Value]) -> int | None:
    """Samples of a dataset; None where its files, or a setting that is not known, decide."""
    if name == "FakeData":
        size = argument(args, kwargs, 0, "size", 1000)
        return size if isinstance(size, int) else None
    if name not in _SAMPLES:
        return None
    if name in _BY_SPLIT:
        part = {"train": 0, "test": 1}.get(str(argument(args, kwargs, 1, "split", "train")))
    else:
        train = argument(args, kwargs, 1, "train", True)
        part = int(not train) if isinstance(train, bool) else None
    return None if part is None else _SAMPLES[name][part]
