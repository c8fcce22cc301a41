"""What calls into libraries mean: torch, timm, torchvision, transformers, argparse, typer, click."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Final

from predictor_onnx import catalog
from predictor_onnx.static import (
    command_line,
    files,
    layers,
    loaders,
    named_models,
    objects,
    ops,
    tensors,
    trainers,
    transformer_config,
)
from predictor_onnx.static.command_line import Parser
from predictor_onnx.static.datasets import DATASETS, dataset, image_size
from predictor_onnx.static.operands import argument, dtype_of
from predictor_onnx.static.values import (
    UNKNOWN,
    External,
    Function,
    Native,
    Optimizer,
    Record,
    Tensor,
    Value,
    is_module,
    tensor_of,
)

if TYPE_CHECKING:
    from predictor_onnx.static.evaluator import Evaluator

Kwargs = dict[str, Value]
Call = Callable[[str, list[Value], Kwargs], Value]

#: Values kept per trained parameter, beside the gradient.
OPTIMIZER_STATES: Final[dict[str, float]] = {
    "SGD": 0.0, "Adam": 2.0, "AdamW": 2.0, "NAdam": 2.0, "RAdam": 2.0, "Adamax": 2.0, "Lamb": 2.0,
    "LAMB": 2.0, "RMSprop": 1.0, "Adagrad": 1.0, "Adadelta": 2.0, "Lion": 1.0, "Muon": 1.0,
    "ASGD": 1.0, "Rprop": 2.0, "LBFGS": 10.0, "Adafactor": 0.05, "SparseAdam": 2.0,
    "Adam8bit": 0.5, "AdamW8bit": 0.5, "PagedAdamW8bit": 0.0, "FusedAdam": 2.0,
}  # fmt: skip
_TRUE: Final = frozenset(["torch.cuda.is_available", "torch.cuda.is_bf16_supported"])
_WRAPPERS: Final = frozenset([
    "compile", "DataParallel", "DistributedDataParallel", "DDP", "tqdm", "trange", "to_device", "deepcopy",
    "script", "FullyShardedDataParallel", "FSDP", "cast", "field_validator", "weight_norm", "spectral_norm",
    "cycle",
])  # fmt: skip
_TRAINERS: Final = ("Trainer", "Seq2SeqTrainer", "SFTTrainer")
_TRAINING_ARGUMENTS: Final = ("TrainingArguments", "Seq2SeqTrainingArguments", "SFTConfig")
#: Calls that run another program, or code that is not in the syntax tree.
_STARTERS: Final = frozenset([
    "subprocess.run", "subprocess.call", "subprocess.check_call", "subprocess.check_output", "subprocess.Popen",
    "os.system", "os.execvp", "os.execv", "os.popen", "runpy.run_path", "runpy.run_module", "exec", "eval",
    "importlib.import_module", "__import__",
])  # fmt: skip
_GRAD_OFF: Final = frozenset(["no_grad", "inference_mode"])


class Library:
    """Answers calls to names outside the bundle; what it does not know is UNKNOWN."""

    def __init__(self, ev: Evaluator) -> None:
        self.ev = ev
        self._special: dict[str, Call] = {
            "ArgumentParser": lambda n, a, k: Parser(), "DataLoader": lambda n, a, k: loaders.loader(ev, a, k),
            "TensorDataset": lambda n, a, k: Record("TensorDataset", {"tensors": a}),
            "Subset": lambda n, a, k: Record("Subset", {"dataset": a[0]}),
            "random_split": self._random_split, "device": self._device, "autocast": self._autocast,
            "set_grad_enabled": self._set_grad, "GradScaler": self._scaler,
            "Parameter": self._parameter, "create_model": self._timm, "from_pretrained":
            self._pretrained, "checkpoint": self._checkpoint, "checkpoint_sequential":
            self._checkpoint_sequential, "field": self._field, "replace": lambda n, a, k: a[0],
            "Option": lambda n, a, k: command_line.typer_option(a, k),
 "Argument": lambda n, a, k: command_line.typer_option(a, k), "option": lambda n, a, k: command_line.click_option(a, k),
 "argument": lambda n, a, k: command_line.click_option(a, k), "Typer": self._typer,
            "run": self._typer_run,
            "main": self._hydra, "Fire": self._typer_run, "spawn": self._spawn, "pipeline": self._pipeline,
            "command": lambda n, a, k: Record("command", {}),
            "group": lambda n, a, k: Record("command", {}), "partial": self._partial, "exit": self._exit,
            **{name: (lambda n, a, k: trainers.training_arguments(ev, a, k)) for name in _TRAINING_ARGUMENTS},
            **{name: (lambda n, a, k: trainers.trainer(ev, a, k)) for name in _TRAINERS},
            "Accelerator": lambda n, a, k: trainers.accelerator(ev, a, k),
            "get_model": self._torchvision, "load": lambda n, a, k: UNKNOWN,
            "log_softmax": self._functional, "Sequential": self._layer,
        }  # fmt: skip

    def attribute(self, path: str) -> Value:
        """A dotted name; constants get their value."""
        if path == "sys.argv":
            return ["main.py", *self.ev.argv]
        if path == "math.pi":
            return 3.141592653589793
        return External(path)

    def star(self, module: str) -> dict[str, Value]:
        """Names that ``from <module> import *`` is known to bring."""
        if module == "torch.nn":
            names = [*layers.KINDS, "Module", "Parameter"]
            return {name: External(f"torch.nn.{name}") for name in names}
        if module == "math":
            return {name: External(f"math.{name}") for name in ("sqrt", "ceil", "floor", "log")}
        return {}

    def call(self, path: str, args: list[Value], kwargs: Kwargs) -> Value:
        """``path(*args, **kwargs)``."""
        owner, _, name = path.rpartition(".")
        if path in _TRUE:
            return True
        if path == "torch.cuda.device_count":
            return 1
        if path in _STARTERS:
            return self.ev.start_program(args[0] if args else kwargs.get("args", UNKNOWN))
        if path in files.CALLS:
            return files.call(self.ev, path, args, kwargs)
        for matches, answer in (
            (name in _GRAD_OFF, lambda: Record("no_grad")),
            (name in self._special, lambda: self._special[name](path, args, kwargs)),
            (name in OPTIMIZER_STATES, lambda: self._optimizer(name, kwargs)),
            (owner.endswith("nn") or name in transformer_layers_kinds(),
             lambda: objects.build_layer(self.ev, name, args, kwargs)),
            (name in DATASETS, lambda: dataset(name, args, kwargs, self.ev.hints)),
            ("torchvision" in path or owner == "models", lambda: self._vision(path, args, kwargs)),
            (name in _WRAPPERS and bool(args), lambda: args[0]),
            (owner in {"numpy", "np", "torch", "numpy.random", "np.random"} and (
                name in tensors.CREATORS), lambda: tensors.create(self.ev, name, args, kwargs)),
        ):  # fmt: skip
            if matches:
                return answer()
        return self._other(path, name, args, kwargs)

    def _other(self, path: str, name: str, args: list[Value], kwargs: Kwargs) -> Value:
        if name in ops.OPS and args:
            return self._functional(path, args, kwargs)
        if name in tensors.CREATORS and path.startswith(("torch.", "numpy.")):
            return tensors.create(self.ev, name, args, kwargs)
        if name.endswith("Config"):
            return self._config(name, kwargs)
        if args and isinstance(args[0], Record) and args[0].kind == "config":
            return self._from_config(name, args[0])
        if name in {"namedtuple", "SimpleNamespace", "Namespace", "EasyDict", "DictConfig"}:
            given = {**(args[0] if args and isinstance(args[0], dict) else {}), **kwargs}
            for key, value in given.items():
                self.ev.hints.note(str(key), value)
            return Record("namespace", given)
        return Record("call", {"path": path}) if path.startswith("torchvision.transforms") else UNKNOWN

    def _functional(self, path: str, args: list[Value], kwargs: Kwargs) -> Value:
        name = path.rpartition(".")[2]
        if not args:
            args = [kwargs.get("input", UNKNOWN)]
        first = args[0]
        tensor = isinstance(first, Tensor) or name in {"cat", "stack", "concat", "einsum"}
        if not tensor and not any(isinstance(arg, Tensor) for arg in args):
            return UNKNOWN
        if not tensor and name not in {"where", "matmul", "add", "mul", "div", "sub"}:
            return UNKNOWN
        return ops.OPS[name](self.ev, args, kwargs)

    # --- torch

    def _layer(self, path: str, args: list[Value], kwargs: Kwargs) -> Value:
        return objects.build_layer(self.ev, path.rpartition(".")[2], args, kwargs)

    def _random_split(self, path: str, args: list[Value], kwargs: Kwargs) -> Value:
        parts = args[1] if len(args) > 1 and isinstance(args[1], list) else [1, 1]
        return [Record("Subset", {"dataset": args[0]}) for _ in parts]

    def _device(self, path: str, args: list[Value], kwargs: Kwargs) -> Value:
        name = args[0] if args and isinstance(args[0], str) else "cuda"
        return Record("device", {"type": name.partition(":")[0]})

    def _autocast(self, path: str, args: list[Value], kwargs: Kwargs) -> Value:
        enabled = kwargs.get("enabled", True)
        given = next((a for a in (*args, *kwargs.values()) if isinstance(a, External)), None)
        device = args[0] if args else kwargs.get("device_type")
        dtype = dtype_of(given, "float16")
        off = enabled is False or device == "cpu" or dtype == "float32"
        return Record("autocast", {"dtype": None if off else dtype})

    def _set_grad(self, path: str, args: list[Value], kwargs: Kwargs) -> Value:
        return Record("no_grad" if args and args[0] is False else "grad")

    def _scaler(self, path: str, args: list[Value], kwargs: Kwargs) -> Value:
        self.ev.rec.grad_scaler = kwargs.get("enabled", True) is not False
        return Record("scaler")

    def _parameter(self, path: str, args: list[Value], kwargs: Kwargs) -> Value:
        given = args[0] if args else UNKNOWN
        shape = given.shape if isinstance(given, Tensor) else (None,)
        grad = kwargs.get("requires_grad", True) is not False
        return tensor_of(shape, grad=grad, parameter=True)

    def _optimizer(self, name: str, kwargs: Kwargs) -> Value:
        states = OPTIMIZER_STATES[name]
        momentum = kwargs.get("momentum", 0)
        if name in {"SGD", "RMSprop"} and momentum != 0:
            states += 1
        if kwargs.get("amsgrad") is True:
            states += 1
        self.ev.optimizers.append(Optimizer(name, states))
        return self.ev.optimizers[-1]

    def _checkpoint(self, path: str, args: list[Value], kwargs: Kwargs) -> Value:
        inner = args[1:]
        with self.ev.rec.recomputed([arg for arg in inner if isinstance(arg, Tensor)]):
            return self.ev.call(args[0], inner, {})

    def _checkpoint_sequential(self, path: str, args: list[Value], kwargs: Kwargs) -> Value:
        return self._checkpoint(path, [args[0], *args[2:3]], kwargs)

    # --- named models

    def _named(self, library: str, name: Value, settings: Kwargs, dtype: str = "float32") -> Value:
        model: Value = None
        if isinstance(name, str):
            model = named_models.layer(library, name, settings, dtype)
        if model is None:
            self.ev.note_unknown_model(library, name)
            return UNKNOWN
        self.ev.models.append(model)
        return model

    def _timm(self, path: str, args: list[Value], kwargs: Kwargs) -> Value:
        size = kwargs.get("img_size")
        if isinstance(size, int):
            self.ev.hints.note("img_size", size)
        return self._named("timm", argument(args, kwargs, 0, "model_name", UNKNOWN), kwargs)

    def _torchvision(self, path: str, args: list[Value], kwargs: Kwargs) -> Value:
        return self._named("torchvision", args[0] if args else kwargs.get("name"), kwargs)

    def _vision(self, path: str, args: list[Value], kwargs: Kwargs) -> Value:
        name = path.rpartition(".")[2]
        if "transforms" in path:
            return image_size(name, args, kwargs)
        if catalog.find("torchvision", name) is not None:
            return self._named("torchvision", name, kwargs)
        if "models" in path and name.islower():
            self.ev.note_unknown_model("torchvision", name)
        return UNKNOWN

    def _pretrained(self, path: str, args: list[Value], kwargs: Kwargs) -> Value:
        owner = path.rpartition(".")[0].rpartition(".")[2]
        if any(word in owner for word in ("Tokenizer", "Processor", "Config", "Extractor")):
            return UNKNOWN
        name = args[0] if args else kwargs.get("pretrained_model_name_or_path", UNKNOWN)
        dtype = dtype_of(kwargs.get("torch_dtype", kwargs.get("dtype")))
        if not isinstance(name, str):
            return UNKNOWN
        model = named_models.layer("transformers", name, {}, dtype)
        claimed = catalog.parameters_in_name(name)
        if model is None and claimed is not None:
            width = max(64, round((claimed / 400) ** (1 / 3) / 8) * 64)
            values = {"hidden_size": width, "num_hidden_layers": max(1, int(claimed / 12 / width**2))}
            made = transformer_config.entry(values, "Llama", "LM")
            model = named_models.make(f"transformers/{name}", {**made, "params": claimed}, {}, dtype)
        if model is None:
            self.ev.note_unknown_model("transformers", name)
            return UNKNOWN
        self.ev.models.append(model)
        return model

    def _config(self, name: str, kwargs: Kwargs) -> Value:
        for key, value in kwargs.items():
            self.ev.hints.note(key, value)
        return Record("config", {**kwargs, "__class__": name})

    def _from_config(self, name: str, config: Record) -> Value:
        family = transformer_config.family_of(str(config.attrs.get("__class__", "")))
        if family is None:
            return UNKNOWN
        made = transformer_config.entry(config.attrs, family, name)
        model = named_models.make(f"transformers/{name}", made, {})
        self.ev.models.append(model)
        return model

    def record_method(self, owner: Record, name: str) -> Value:
        """A method of a library object."""
        if owner.kind in {"file", "path"}:
            return files.attribute(self.ev, owner, name)
        rec = self.ev.rec

        def step(args: list[Value], kwargs: Kwargs) -> Value:
            rec.optimizer_steps += 1
            return None

        def train(args: list[Value], kwargs: Kwargs) -> Value:
            return trainers.train(self.ev, owner, args, kwargs)

        def backward(args: list[Value], kwargs: Kwargs) -> Value:
            return rec.finish_step()

        table: dict[tuple[str, str], Callable[[list[Value], Kwargs], Value]] = {
            ("scaler", "scale"): lambda a, k: a[0], ("scaler", "step"): step,
            ("accelerator", "prepare"): lambda a, k: tuple(a) if len(a) > 1 else a[0],
            ("accelerator", "backward"): backward,
            ("accelerator", "autocast"): lambda a, k: Record("autocast", {"dtype": rec.autocast}),
            ("Trainer", "train"): train, ("Trainer", "fit"): train,
            ("typer", "command"): lambda a, k: Record("command", {"app": owner}),
        }  # fmt: skip
        call = table.get((owner.kind, name))
        return UNKNOWN if call is None else Native(name, call)

    # --- command lines and dataclasses

    def _field(self, path: str, args: list[Value], kwargs: Kwargs) -> Value:
        factory = kwargs.get("default_factory")
        default = self.ev.call(factory, [], {}) if factory is not None else UNKNOWN
        return Record("field", {"default": kwargs.get("default", default)})

    def _typer(self, path: str, args: list[Value], kwargs: Kwargs) -> Value:
        return Record("typer")

    def _typer_run(self, path: str, args: list[Value], kwargs: Kwargs) -> Value:
        if args and isinstance(args[0], Function):
            return self.ev.run_command(args[0])
        return UNKNOWN

    def _hydra(self, path: str, args: list[Value], kwargs: Kwargs) -> Value:
        folder, name = argument(args, kwargs, 0, "config_path", None), argument(args, kwargs, 1, "config_name", None)
        if not path.startswith("hydra.") or not isinstance(name, str):
            return UNKNOWN
        parts = [self.ev.path.rpartition("/")[0], folder or "", f"{name.removesuffix('.yaml')}.yaml"]
        return Record("configured", {"main": files.configuration(self.ev, "/".join(p for p in parts if p))})

    def _spawn(self, path: str, args: list[Value], kwargs: Kwargs) -> Value:
        """``torch.multiprocessing.spawn(function, args)``: the function gets its rank first."""
        given = argument(args, kwargs, 1, "args", ())
        if not path.endswith("multiprocessing.spawn") or not isinstance(given, tuple):
            return UNKNOWN
        return self.ev.call(args[0] if args else kwargs.get("fn"), [0, *given], {})

    def _pipeline(self, path: str, args: list[Value], kwargs: Kwargs) -> Value:
        """``transformers.pipeline``: a model that is only ever called without gradients."""
        name = argument(args, kwargs, 1, "model", UNKNOWN)
        if not path.startswith("transformers."):
            return UNKNOWN
        if isinstance(name, str):
            model = self._pretrained("transformers.AutoModel.from_pretrained", [name], kwargs)
        else:
            model = name
        if not is_module(model):
            if not isinstance(name, str):
                task = argument(args, kwargs, 0, "task", "")
                self.ev.note_unknown_model("transformers", f"behind pipeline {task!r}")
            return UNKNOWN

        def run(given: list[Value], named: Kwargs) -> Value:
            self.ev.hints.note("batch_size", named.get("batch_size", kwargs.get("batch_size", 1)))
            with self.ev.rec.without_grad():
                self.ev.call(model, [], {})
            return UNKNOWN

        return Native("pipeline", run)

    def _partial(self, path: str, args: list[Value], kwargs: Kwargs) -> Value:
        target, first = args[0], args[1:]
        return Native("partial", lambda a, k: self.ev.call(target, [*first, *a], {**kwargs, **k}))

    def _exit(self, path: str, args: list[Value], kwargs: Kwargs) -> Value:
        return UNKNOWN

    # --- with

    def enter(self, manager: Value, stack: ExitStack) -> Value:
        """Enter a ``with`` item; the stack leaves it again."""
        rec = self.ev.rec
        if isinstance(manager, Record):
            if manager.kind == "no_grad":
                stack.enter_context(rec.without_grad())
            elif manager.kind == "autocast":
                stack.enter_context(rec.in_autocast(manager.attrs["dtype"]))
        return manager


def transformer_layers_kinds() -> frozenset[str]:
    """Names of the transformer classes of ``torch.nn``, however they were imported."""
    from predictor_onnx.static import transformer_layers

    return transformer_layers.KINDS | frozenset({"MultiheadAttention"})
