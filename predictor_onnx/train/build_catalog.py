"""Rebuild ``predictor_onnx/catalog.json.gz`` from the model definitions of PyPI packages.

``python -m predictor_onnx.train.build_catalog [--output FILE]``, with the ``trace`` extra installed. torchvision's
compiled ops, which do not load beside every build of torch, are only declared here.
Nothing is downloaded: networks are built without weights on torch's meta device. What cannot be traced is listed
in the file under ``excluded`` with its reason, never dropped in silence.
"""

from __future__ import annotations

import argparse
import gzip
import inspect
import json
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from predictor_onnx.train.checkpoints import CHECKPOINTS
from predictor_onnx.train.meta_trace import KINDS, ForwardTrace, trace_forward

DEFAULT_OUTPUT = Path(__file__).parents[1] / "catalog.json.gz"
#: Two samples, because a batch norm in training mode refuses one value per channel.
_BATCH = 2
_SEQUENCES = (128, 512)
#: torchvision families whose forward pass takes boxes, pairs of frames or quantized weights.
_SKIPPED_TORCHVISION = ("raft", "rcnn", "retinanet", "fcos", "ssd", "quantized")

Entry = dict[str, Any]


def _sizes(trace: ForwardTrace) -> Entry:
    elements = 4 * _BATCH
    return {
        "saved": round(trace.saved_bytes / elements),
        "backward_peak": round(trace.backward_peak_bytes / elements),
        "inference_peak": round(trace.inference_peak_bytes / elements),
        "largest": round(trace.largest_bytes / elements),
        "largest_conv": round(trace.largest_conv_bytes / elements),
        "allocated": round(trace.allocated_bytes / elements),
        "macs": round(trace.macs / _BATCH),
        "ops": trace.ops,
        "kinds": [round(trace.saved_by_kind[kind] / elements) for kind in KINDS],
    }


def _weights(model: torch.nn.Module) -> Entry:
    parameters = list(model.parameters())
    return {
        "params": sum(p.numel() for p in parameters),
        "buffers": sum(b.numel() for b in model.buffers()),
        "tensors": len(parameters),
        "largest_param": max((p.numel() for p in parameters), default=0),
    }


def _image_entry(build: Callable[[], torch.nn.Module], size: tuple[int, ...]) -> Entry:
    try:
        with torch.device("meta"):
            model = build()
    except (NotImplementedError, RuntimeError):
        model = build().to("meta")  # a constructor that reads its own numbers
    trace = trace_forward(model, lambda m: m(torch.empty(_BATCH, *size, device="meta")))
    return {**_weights(model), "input": list(size), **_sizes(trace)}


def _timm() -> Iterator[tuple[str, Callable[[], Entry]]]:
    import timm

    for name in timm.list_models():

        def entry(name: str = name) -> Entry:
            size = tuple(timm.get_pretrained_cfg(name).input_size)
            built: list[torch.nn.Module] = []

            def build() -> torch.nn.Module:
                built.append(timm.create_model(name))
                return built[0]

            found = _image_entry(build, size)
            found["head_in"] = int(getattr(built[0], "head_hidden_size", 0)
                                   or getattr(built[0], "num_features", 0))  # fmt: skip
            found["classes"] = int(getattr(built[0], "num_classes", 0))
            return found

        yield f"timm/{name}", entry


def _torchvision() -> Iterator[tuple[str, Callable[[], Entry]]]:
    import torchvision.models as zoo

    for name in zoo.list_models():
        builder = zoo.get_model_builder(name)
        if any(word in name or word in builder.__module__ for word in _SKIPPED_TORCHVISION):
            continue
        size: tuple[int, ...] = (3, 224, 224)
        if "segmentation" in builder.__module__:
            size = (3, 520, 520)
        elif "video" in builder.__module__:
            size = (3, 16, 224, 224) if "mvit" in name or "swin" in name else (3, 16, 112, 112)
        elif name == "inception_v3":
            size = (3, 299, 299)

        def entry(name: str = name, size: tuple[int, ...] = size, builder: Any = builder) -> Entry:
            found = _image_entry(_without_weights(builder), size)
            found["classes"] = 1000
            return found

        yield f"torchvision/{name}", entry


def _without_weights(builder: Any) -> Callable[[], torch.nn.Module]:
    wanted: dict[str, Any] = {"weights": None}
    if "weights_backbone" in inspect.signature(builder).parameters:
        wanted["weights_backbone"] = None
    if "init_weights" in inspect.signature(builder).parameters:
        wanted["init_weights"] = False
    return lambda: builder(**wanted)


def _transformers() -> Iterator[tuple[str, Callable[[], Entry]]]:
    import transformers

    for name, (config_name, model_name, kind, changes) in CHECKPOINTS.items():

        def entry(
            config_name: str = config_name, model_name: str = model_name, kind: str = kind,
            changes: dict[str, Any] = changes,
        ) -> Entry:  # fmt: skip
            config = getattr(transformers, config_name)(**changes)
            with torch.device("meta"):
                model = getattr(transformers, model_name)(config)
            found = {**_weights(model), "architecture": model_name}
            if kind == "image":
                size = (3, 224, 224)
                trace = trace_forward(model, lambda m: m(pixel_values=torch.empty(_BATCH, *size, device="meta")))
                return {**found, "input": list(size), **_sizes(trace)}
            found["vocabulary"] = int(config.vocab_size)
            for length in _SEQUENCES:
                trace = trace_forward(model, _text_call(kind, length))
                found[f"at_{length}"] = _sizes(trace)
            return found

        yield f"transformers/{name}", entry


def _text_call(kind: str, length: int) -> Callable[[torch.nn.Module], object]:
    tokens = torch.zeros(_BATCH, length, dtype=torch.long, device="meta")
    more = {"decoder_input_ids": tokens} if kind == "text-to-text" else {}
    # A cache keeps keys and values that a training step does not keep.
    return lambda model: (
        model(input_ids=tokens, use_cache=False, **more) if _takes_cache(model) else model(input_ids=tokens, **more)
    )


def _takes_cache(model: torch.nn.Module) -> bool:
    return "use_cache" in inspect.signature(model.forward).parameters


def _stub_torchvision_ops() -> None:
    """Declare the compiled ops that a torchvision built for another torch cannot load."""
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _KEPT.append(library)


#: A torch library forgets its definitions when it is collected.
_KEPT: list[Any] = []


def build() -> dict[str, Any]:
    """Trace every known model; returns the catalog as it is stored."""
    _stub_torchvision_ops()
    models: dict[str, Entry] = {}
    excluded: dict[str, str] = {}
    for source in (_transformers, _torchvision, _timm):
        for name, entry in source():
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    models[name] = entry()
            except Exception as error:  # noqa: BLE001 - a model's own code may raise anything
                excluded[name] = f"{type(error).__name__}: {str(error)[:120]}"
            sys.stderr.write(f"\r{len(models)} traced, {len(excluded)} excluded  {name:<60.60}")
            sys.stderr.flush()
    sys.stderr.write("\n")
    return {
        "format": 1,
        "unit": "elements of four bytes per sample; macs per sample",
        "kinds": list(KINDS),
        "sequences": list(_SEQUENCES),
        "versions": _versions(),
        "models": models,
        "excluded": excluded,
    }


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", "timm", "torchvision", "transformers")}


def main() -> None:
    """Write the catalog; the same packages give the same bytes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT)
    output: Path = parser.parse_args().output
    text = json.dumps(build(), separators=(",", ":"), sort_keys=True)
    output.write_bytes(gzip.compress(text.encode(), mtime=0))


if __name__ == "__main__":
    main()
