"""From submitted code to the workload of one step: evaluate the program, then describe what was recorded."""

from __future__ import annotations

from collections.abc import Sequence

from predictor_onnx.features import KINDS, MIB, Workload
from predictor_onnx.source import CodeBundle, Source, find_entrypoint
from predictor_onnx.static.evaluator import Evaluator
from predictor_onnx.static.recorder import StepProfile
from predictor_onnx.static.values import DTYPE_BYTES, Instance, Layer, Tensor, Value, parameters


def analyse(bundle: CodeBundle, argv: Sequence[str]) -> Workload:
    """Evaluate the program that ``argv`` runs and describe its step.

    Raises:
        CodeDoesNotParseError: the program, or a module of the bundle that it imports, is not Python.
    """
    source = Source(bundle)
    entry = find_entrypoint(argv, bundle)
    if entry is None:
        return Workload(notes=("the command runs no Python file of the bundle",))
    evaluator = Evaluator(source, entry.arguments)
    evaluator.run(entry)
    _run_forgotten_model(evaluator)
    # An import inside a function that was never called counts too.
    evaluator.imports |= source.imports(entry.path)
    folder = entry.path.rpartition("/")[0]
    evaluator.imports = {name for name in evaluator.imports if name and source.module_path(name, folder) is None}
    return _describe(evaluator, entry.path, tuple(source.skipped))


def _run_forgotten_model(ev: Evaluator) -> None:
    """A model that was built, but whose pass was not seen, runs once on a guessed input."""
    if ev.rec.trained is not None or ev.rec.forward_passes:
        return
    model = _main_model(ev)
    if model is None:
        return
    ev.rec.guesses += 1
    ev.rec.steps = None
    ev.budget.renew(0.5)
    ev.complete(model)
    if ev.optimizers:
        ev.rec.finish_step()


def _weight(model: Value) -> float:
    return sum(tensor.storage.nbytes for tensor in parameters(model))


def _main_model(ev: Evaluator) -> Value:
    """The heaviest network of the program."""
    return max(ev.models, key=lambda m: (_weight(m), isinstance(m, Instance)), default=None)


def _roots(ev: Evaluator) -> list[Tensor]:
    """Weights of every network that is not part of a larger one, each once."""
    found: dict[int, Tensor] = {}
    for model in ev.models:
        for tensor in parameters(model):
            found.setdefault(id(tensor.storage), tensor)
    return list(found.values())


def _used_weights(ev: Evaluator) -> list[Tensor]:
    """Weights of the networks that hold what the heaviest holds, and of those of comparable size.

    A layer that was built and thrown away (a replaced head) must not count.
    """
    instances = [m for m in ev.models if isinstance(m, Instance) or m.kind in {"Sequential", "Named"}]
    models = instances or ev.models
    found: dict[int, Tensor] = {}
    for model in models:
        for tensor in parameters(model):
            found.setdefault(id(tensor.storage), tensor)
    return list(found.values()) or _roots(ev)


def _name(model: Value) -> str:
    if isinstance(model, Layer):
        return str(model.hyper.get("name", f"nn.{model.kind}"))
    return str(model.cls.name) if isinstance(model, Instance) else ""


def _model_name(ev: Evaluator) -> str:
    named = [m for m in ev.models if isinstance(m, Layer) and m.hyper.get("entry")]
    return _name(max(named, key=_weight)) if named else _name(_main_model(ev))


def _describe(ev: Evaluator, path: str, notes: tuple[str, ...]) -> Workload:
    rec = ev.rec
    rec.finish_inference()
    weights = _used_weights(ev)
    trained = [tensor for tensor in weights if tensor.grad]
    training = rec.trained is not None or rec.optimizer_steps > 0
    step = rec.trained if rec.trained is not None else StepProfile()
    transient = max(step.backward_peak - step.saved, 0.0)
    forward_only = rec.inferred.inference_peak
    transient = max(transient, forward_only - step.saved)
    beyond = max(forward_only - max(step.saved, rec.inferred.largest_conv), 0.0)
    optimizer = ev.optimizers[-1] if ev.optimizers else None
    trained_bytes = sum(tensor.storage.nbytes for tensor in trained) if training else 0.0
    optimizer_bytes = 0.0
    if optimizer is not None and training:
        optimizer_bytes = optimizer.states * trained_bytes
    half = rec.autocast_used
    own = weights[0].dtype if weights else "float32"
    elements = float(sum(tensor.numel or 0 for tensor in weights))
    found = step if training else rec.inferred
    return Workload(
        imports=frozenset(ev.imports), entrypoint=path, model_name=_model_name(ev),
        unknown_models=tuple(dict.fromkeys(ev.unknown_models)), parameters=int(elements),
        trained_parameters=int(sum(t.numel or 0 for t in trained)) if training else 0,
        parameter_mib=sum(t.storage.nbytes for t in weights) / MIB,
        gradient_mib=trained_bytes / MIB, optimizer_mib=optimizer_bytes / MIB,
        cast_mib=elements * DTYPE_BYTES[half] / MIB if half and own == "float32" else 0.0,
        data_mib=rec.moved_bytes / MIB, activation_mib=step.saved / MIB,
        transient_mib=transient / MIB, largest_mib=found.largest / MIB,
        largest_conv_mib=found.largest_conv / MIB,
        activation_by_kind_mib=tuple(step.kinds[kind] / MIB for kind in KINDS),
        inference_mib=beyond / MIB, macs=found.macs, ops=found.ops, recurrent_steps=found.recurrent_steps,
        written_mib=found.allocated / MIB, steps=rec.steps if rec.looped else None,
        batch=_batch(ev), sequence=ev.hints.found.get("sequence"),
        image=ev.hints.found.get("image"), precision=half or own,
        optimizer=optimizer.kind if optimizer is not None else "", training=training,
        checkpointing=rec.checkpointing, guesses=rec.guesses + rec.unknown_sizes,
        unsized=_unsized(ev, weights), stopped_early=ev.stopped_early, starts_unknown=ev.starts_unknown,
        notes=notes, networks=tuple(dict.fromkeys(rec.networks)),
        assumed_batch=ev.hints.batch, step_seen=rec.trained is not None or rec.forward_passes > 0,
    )  # fmt: skip


def _unsized(ev: Evaluator, weights: list[Tensor]) -> bool:
    """Whether more than a fifth of the weights, or half of the ops, have a size that is not known."""
    open_weights = sum(1 for tensor in weights if tensor.numel is None)
    return 5 * open_weights > len(weights) or 2 * ev.rec.unsized_ops > ev.rec.all_ops > 0


def _batch(ev: Evaluator) -> int | None:
    return ev.rec.batch if ev.rec.batch is not None else ev.hints.found.get("batch")
