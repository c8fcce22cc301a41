"""The whole examination: what is looked at, in the order in which it is told."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from nodedaemon.checkpoint_cuda import CudaCheckpoints
from nodedaemon.checkpoint_emulated import emulated_ability
from nodedaemon.devices import CardDevices
from nodedaemon.doctor.cards import judge_cards, look_at_cards
from nodedaemon.doctor.checkpoints import judge_checkpoints
from nodedaemon.doctor.containers import judge_containers, look_at_containers
from nodedaemon.doctor.findings import Ability, Finding, Verdict, ok, problem, verdict
from nodedaemon.doctor.host import ProcessFacts, judge_host, judge_processes, look_at_host
from nodedaemon.doctor.nodes import judge_nodes, look_at_nodes
from nodedaemon.doctor.person import Person
from nodedaemon.doctor.state import judge_state, look_at_state
from nodedaemon.emulation.cards import CardSpec, models_of
from nodedaemon.emulation.store import DamagedStateError, StateStore
from nodedaemon.host import has_real_gpu
from nodedaemon.process_user import (
    ProcessesRefusedError,
    ProcessUser,
    choose_process_user,
    out_of_reach,
    require_no_real_gpu,
)

__all__ = ["Asked", "Report", "Section", "examine"]

_ROOT = Path("/")


@dataclass(frozen=True)
class Asked:
    """What a daemon on this host is to do."""

    state: Path
    user: str
    """User that owns the containers of a daemon run by root."""
    image: str
    cards: tuple[CardSpec, ...] = ()
    """Emulated cards; none means the real ones."""


@dataclass(frozen=True)
class Section:
    """Findings that belong together."""

    title: str
    findings: tuple[Finding, ...]


@dataclass(frozen=True)
class Report:
    """All that was found."""

    sections: tuple[Section, ...]
    verdict: Verdict
    emulated: bool


def examine(asked: Asked) -> Report:
    """Examines this host. Changes nothing, and leaves nothing running."""
    emulated = bool(asked.cards)
    person = Person.find(asked.user)
    user = person.name if person else asked.user
    sections = []
    # Before NVML is asked: as it starts it may have nvidia-modprobe make nodes that were missing.
    nodes = _device_findings(user, person) if has_real_gpu() and not emulated else []
    cards = judge_cards(look_at_cards(None if emulated else asked.state), emulated=emulated)
    if emulated:
        cards += _emulation(asked)
    # Real cards are cut with MIG, or not used at all.
    ability = emulated_ability() if emulated else CudaCheckpoints(mig=lambda: True).probe()
    cards.append(judge_checkpoints(ability, emulated=emulated))
    sections.append(Section("Cards", tuple(cards)))
    if nodes:
        sections.append(Section("Device files", tuple(nodes)))
    containers = judge_containers(look_at_containers(user, person, asked.image))
    sections.append(Section("Containers", tuple(containers)))
    # Plain processes only matter where containers may not work.
    if emulated and any(Ability.CONTAINERS in one.needed_for for one in containers):
        sections.append(Section("Processes", tuple(judge_processes(_processes(asked, person)))))
    may = person.may if person else None
    state = look_at_state(asked.state, user, may)
    sections.append(Section("State", tuple(judge_state(state, emulated=emulated))))
    sections.append(Section("Host", tuple(judge_host(look_at_host(asked.user, state.holder)))))
    findings = [finding for section in sections for finding in section.findings]
    return Report(tuple(sections), verdict(findings, emulated=emulated), emulated)


def _device_findings(user: str, person: Person | None) -> list[Finding]:
    cards = CardDevices(_ROOT / "dev/nvidia-caps", _ROOT / "proc/driver/nvidia-caps/mig-minors", emulated=False)
    may = person.may if person else lambda _flag, _path: None
    return judge_nodes(look_at_nodes(_ROOT, cards, user, may, by_root=os.geteuid() == 0))


def _emulation(asked: Asked) -> list[Finding]:
    models = models_of(asked.cards)
    named = ", ".join(models)
    folder = asked.state / "emulation"
    store = StateStore(folder)
    try:
        kept = [gpu.model for gpu in store.read().gpus] if store.exists() else models
    except DamagedStateError as error:
        return [problem("emulated-cards", str(error), f"mv {folder} {folder}.damaged", Ability.EMULATION)]
    except OSError:
        kept = models  # what cannot be entered is told of the state directory itself
    if kept != models:
        return [
            problem(
                "emulated-cards",
                f"{folder} has other cards ({', '.join(kept)}) than {named}: ask for those, or move it",
                f"mv {folder} {folder}.old",
                Ability.EMULATION,
            )
        ]
    return [ok("emulated-cards", f"emulated, not real: {named}")]


def _processes(asked: Asked, person: Person | None) -> ProcessFacts:
    try:
        require_no_real_gpu(emulated=True, real_gpu=has_real_gpu())
        if os.geteuid() == 0:
            user = ProcessUser(person.name, person.uid, person.gid) if person else None
            beyond = out_of_reach(user, Path("/")) if user else ""
            choose_process_user(asked.user, user, beyond, allow_root=False)
    except ProcessesRefusedError as error:
        return ProcessFacts(str(error))
    return ProcessFacts("")
