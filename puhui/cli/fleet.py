"""`puhui nodes`, `slices` and `capacity`."""

from __future__ import annotations

from collections import Counter
from typing import Annotated

import typer
from rich.text import Text

from puhui.cli.connection import connect
from puhui.cli.job_options import json_flag, server_option
from puhui.cli.message_json import json_of
from puhui.cli.terminal import table, terminal
from puhui.cli.words import card_name, mib, placement, plain_enum, short_uuid
from puhui.v1 import card_pb2, fleet_service_pb2, node_pb2

__all__ = ["add_commands", "cards_of", "runtime_of"]

Json = Annotated[bool, json_flag]
Server = Annotated[str | None, server_option]


def add_commands(app: typer.Typer) -> None:
    """Adds `nodes`, `slices` and `capacity`."""
    app.command("nodes")(_nodes)
    app.command("slices")(_slices)
    app.command("capacity")(_capacity)


def _nodes(json: Json = False, server: Server = None) -> None:
    """List the nodes of the centre."""
    with connect(server) as centre:
        nodes = list(centre.nodes())
    if terminal().as_json:
        terminal().json({"nodes": [json_of(node) for node in nodes]})
        return
    if not nodes:
        terminal().note("no node has joined this centre; start one with `puhui-nodedaemon serve --control-plane ...`")
        return
    shown = table("NODE", "STATE", "CARDS", "SLICES", "CONTAINERS BY", right=("SLICES",))
    for node in nodes:
        state = plain_enum(fleet_service_pb2.NodeState.Name(node.state), "NODE_STATE_")
        ready = node.state == fleet_service_pb2.NODE_STATE_READY
        shown.add_row(
            node.inventory.name or node.id,
            Text(state, style="green" if ready else "yellow"),
            "\n".join(cards_of(node.inventory)) or "none",
            str(len(node.inventory.slices)),
            runtime_of(node.inventory.runtime),
        )
    terminal().show(shown)
    for node in nodes:
        notices = [node.message, *(gpu.notice for gpu in node.inventory.gpus), *node.inventory.runtime.notices]
        for notice in dict.fromkeys(filter(None, notices)):
            terminal().note(f"{node.inventory.name}: {notice}")


def cards_of(inventory: node_pb2.NodeInventory) -> list[str]:
    """Returns the cards of a node, "2 x H100 80GB HBM3 (emulated)", one line per model."""
    models = Counter(card_name(gpu.model, gpu.emulated) for gpu in inventory.gpus)
    return [f"{number} x {model}" for model, number in models.items()]


def runtime_of(runtime: node_pb2.Runtime) -> str:
    """Returns what runs a node's containers."""
    if runtime.kind == node_pb2.RUNTIME_KIND_PROCESS:
        return "process (no isolation)"
    if runtime.kind == node_pb2.RUNTIME_KIND_PODMAN:
        return f"rootless Podman {runtime.version}".strip()
    return "unknown"


def _slices(json: Json = False, server: Server = None) -> None:
    """List the virtual cards that exist now."""
    with connect(server) as centre:
        nodes = list(centre.nodes())
    if terminal().as_json:
        slices = [{"node_id": node.id, "slice": json_of(one)} for node in nodes for one in node.inventory.slices]
        terminal().json({"slices": slices})
        return
    shown = table("SLICE", "PROFILE", "AT", "STATE", "JOB", "NODE AND CARD")
    for node in nodes:
        models = {gpu.uuid: gpu.model for gpu in node.inventory.gpus}
        for one in node.inventory.slices:
            shown.add_row(
                short_uuid(one.uuid),
                one.profile,
                placement(one.placement),
                plain_enum(card_pb2.SliceState.Name(one.state), "SLICE_STATE_"),
                one.owner.job_id or "-",
                f"{node.inventory.name} {one.gpu_index}: {card_name(models.get(one.gpu_uuid, '?'), one.emulated)}",
            )
    if shown.row_count:
        terminal().show(shown)
    else:
        terminal().note("no slices: every card is whole")


def _capacity(json: Json = False, server: Server = None) -> None:
    """Show what is free now."""
    with connect(server) as centre:
        capacity = centre.capacity()
    if terminal().as_json:
        terminal().json(capacity)
        return
    emulated = {gpu.gpu_model: gpu.emulated for gpu in capacity.gpus}
    shown = table(
        "PROFILE", "CARD", "MEMORY", "FREE", "BUSY", "IDLE", "OF", right=("MEMORY", "FREE", "BUSY", "IDLE", "OF")
    )
    for item in capacity.profiles:
        shown.add_row(
            item.profile,
            card_name(item.gpu_model, emulated.get(item.gpu_model, False)),
            mib(item.memory_mib),
            str(item.free),
            str(item.busy),
            str(item.idle),
            str(item.total),
        )
    if not shown.row_count:
        terminal().note("this centre has no card that can be cut; `puhui nodes` says why")
        return
    terminal().show(shown)
    terminal().show("")
    for gpu in capacity.gpus:
        terminal().show(_mosaic(gpu))
    terminal().show(Text("# busy  o idle  x foreign  . free", style="dim"))
    if capacity.queued_jobs:
        terminal().note(f"{capacity.queued_jobs} waiting")


def _mosaic(gpu: fleet_service_pb2.GpuCapacity) -> Text:
    line = Text(f"GPU {gpu.gpu_index}  ")
    line.append("#" * gpu.memory_slices_busy, style="green")
    line.append("o" * gpu.memory_slices_idle, style="yellow")
    line.append("x" * gpu.memory_slices_foreign, style="red")
    line.append("." * gpu.memory_slices_free)
    line.append(f"  {card_name(gpu.gpu_model, gpu.emulated)}")
    return line
