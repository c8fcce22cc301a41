"""The driver and its GPUs: facts by NVML, findings without it."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import TypeVar

import pynvml

from nodedaemon.doctor.findings import Ability, Finding, notice, ok, problem, unknown
from nodedaemon.driver import Driver
from nodedaemon.driver_facts import DriverError, Mig
from nodedaemon.host import has_real_gpu

__all__ = [
    "Card",
    "CardFacts",
    "ask_driver",
    "how_to_enable",
    "judge_cards",
    "look_at_cards",
    "slices_of_journal",
    "within",
]

# A sick GPU can keep NVML waiting for ever; nobody waits for a doctor that long.
_PATIENCE_S = 8.0
_CARDS = Ability.CARDS
_T = TypeVar("_T")


@dataclass(frozen=True)
class Card:
    """One GPU as NVML tells of it."""

    index: int
    model: str
    mig: Mig
    """Now."""
    pending: Mig
    """After the next reset."""
    architecture: int | None
    """nvmlDeviceArchitecture_t; None when it does not tell."""
    instances: tuple[tuple[str, int], ...] = ()
    """(UUID of the GPU, id) of every GPU instance on it."""
    trouble: str = ""
    """What it did not answer."""


@dataclass(frozen=True)
class CardFacts:
    """The driver and its GPUs."""

    loaded: bool
    """Whether the kernel has an NVIDIA driver."""
    version: str = ""
    trouble: str = ""
    """Why NVML does not answer; empty when it does."""
    cards: tuple[Card, ...] = ()
    own_slices: frozenset[tuple[str, int]] | None = None
    """GPU instances of the daemon's journal, as `Card.instances`; None when it cannot be read."""


def look_at_cards(state: Path | None) -> CardFacts:
    """Asks the driver.

    Args:
        state: the daemon's state directory, if it is known, to tell its slices from foreign ones.
    """
    if not has_real_gpu():
        return CardFacts(loaded=False)
    facts = within(_PATIENCE_S, lambda: ask_driver(state))
    if facts is None:
        return CardFacts(loaded=True, trouble=f"NVML has not answered for {_PATIENCE_S:g} s")
    return facts


def within(seconds: float, call: Callable[[], _T]) -> _T | None:
    """Returns what a call returns, or None when it takes longer. It goes on behind, and ends with this process."""
    answers: list[_T] = []
    thread = Thread(target=lambda: answers.append(call()), daemon=True)
    thread.start()
    thread.join(seconds)
    return answers[0] if answers else None


def ask_driver(state: Path | None) -> CardFacts:
    """Asks the driver, as `look_at_cards` does, for as long as it takes."""
    try:
        driver = Driver()
    except DriverError as error:
        return CardFacts(loaded=True, trouble=str(error))
    try:
        cards = tuple(_card(driver, index) for index in range(len(driver.gpus())))
        return CardFacts(True, driver.version(), "", cards, slices_of_journal(state) if state else None)
    except DriverError as error:
        return CardFacts(loaded=True, trouble=str(error))
    finally:
        driver.close()


def _card(driver: Driver, index: int) -> Card:
    gpu = driver.gpus()[index]
    architecture = pending = None
    with contextlib.suppress(pynvml.NVMLError):  # unknown is what they stay
        handle = pynvml.nvmlDeviceGetHandleByIndex(index)
        architecture = int(pynvml.nvmlDeviceGetArchitecture(handle))
        pending = int(pynvml.nvmlDeviceGetMigMode(handle)[1])
    instances: tuple[tuple[str, int], ...] = ()
    trouble = gpu.notice
    if gpu.mig is Mig.ENABLED:
        try:
            instances = tuple((gpu.uuid, one.id) for one in driver.instances(gpu.uuid))
        except DriverError as error:
            trouble = f"it does not list its slices ({error})"
    modes = {pynvml.NVML_DEVICE_MIG_ENABLE: Mig.ENABLED, pynvml.NVML_DEVICE_MIG_DISABLE: Mig.DISABLED}
    return Card(
        index, gpu.model, gpu.mig, gpu.mig if pending is None else modes[pending], architecture, instances, trouble
    )


def slices_of_journal(state: Path) -> frozenset[tuple[str, int]] | None:
    """Returns the GPU instances that a daemon's journal holds; None when it cannot be read without touching it."""
    path = state / "node.db"
    try:
        if not path.exists():
            return frozenset()
        if path.with_name("node.db-wal").exists():
            return None  # a daemon runs, or was killed: what it wrote last is not in the file yet
        with contextlib.closing(
            sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro&immutable=1", uri=True)
        ) as journal:
            rows = journal.execute("SELECT gpu_uuid, gi FROM slices WHERE stage != 'destroyed' AND gi IS NOT NULL")
            return frozenset((str(uuid), int(gi)) for uuid, gi in rows)
    except (OSError, sqlite3.Error):
        return None


def how_to_enable(card: Card) -> str:
    """Returns what to type so that a GPU can be cut.

    Ampere: the mode needs a reset and survives reboots. Hopper and later: no reset, and it is lost at a reboot, so
    the unit that is shipped for it sets it at every boot. Source: NVIDIA's MIG user guide.
    """
    if card.pending is Mig.ENABLED:
        return f"nvidia-smi -i {card.index} --gpu-reset"
    if card.architecture is not None and card.architecture >= pynvml.NVML_DEVICE_ARCH_HOPPER:
        return f"systemctl enable --now puhui-mig@{card.index}.service"
    return f"nvidia-smi -i {card.index} -mig 1"


def judge_cards(facts: CardFacts, *, emulated: bool) -> list[Finding]:
    """Says what the driver and its GPUs are good for.

    Args:
        facts: what was seen.
        emulated: emulated cards were asked for: then only that there are real ones matters.
    """
    if emulated:
        if facts.loaded:
            return [
                notice(
                    "driver",
                    "this host has a real NVIDIA driver, which emulated cards leave alone",
                    "puhui-nodedaemon doctor",
                )
            ]
        return [ok("driver", "no NVIDIA driver is loaded, and emulated cards need none")]
    if not facts.loaded:
        return [
            problem(
                "driver",
                "no NVIDIA driver is loaded on this host; emulated cards can be served without one",
                "modprobe nvidia || puhui-nodedaemon doctor --emulate H100-80GB-SXM5:2",
                _CARDS,
            )
        ]
    if facts.trouble:
        return [
            problem("driver", f"the NVIDIA driver is loaded but does not answer: {facts.trouble}", "nvidia-smi", _CARDS)
        ]
    findings = [ok("driver", f"driver {facts.version} answers and has {_count(len(facts.cards), 'GPU')}")]
    findings += [finding for card in facts.cards for finding in _judge_card(card, facts.own_slices)]
    if not any(card.mig is Mig.ENABLED and not card.trouble for card in facts.cards):
        first = next((card for card in facts.cards if card.mig is Mig.DISABLED), None)
        findings.append(
            problem(
                "mig", "no GPU of this host can be cut now", how_to_enable(first) if first else "nvidia-smi -q", _CARDS
            )
        )
    return findings


def _judge_card(card: Card, own: frozenset[tuple[str, int]] | None) -> list[Finding]:
    check, name = f"gpu{card.index}", f"GPU {card.index}, {card.model or 'of unknown model'},"
    if card.trouble:
        return [unknown(check, f"{name} cannot be used now: {card.trouble}", f"nvidia-smi -i {card.index} -q")]
    if card.mig is Mig.NOT_SUPPORTED:
        return [
            notice(check, f"{name} cannot be cut: MIG needs an A30, A100 or later data-centre GPU", "nvidia-smi -L")
        ]
    if card.mig is Mig.UNKNOWN:
        return [unknown(check, f"{name} does not say its MIG mode", f"nvidia-smi -i {card.index} -q")]
    if card.mig is Mig.DISABLED:
        return [_disabled(check, name, card)]
    findings = [_enabled(check, name, card)]
    if own is None and card.instances:
        findings.append(
            unknown(
                f"{check}-slices",
                f"GPU {card.index} has {_count(len(card.instances), 'slice')}, and whose they are is not known while a "
                "daemon holds its journal",
                f"nvidia-smi mig -i {card.index} -lgi",
            )
        )
    elif own is not None and (foreign := [one for one in card.instances if one not in own]):
        findings.append(
            notice(
                f"{check}-slices",
                f"GPU {card.index} has {_count(len(foreign), 'slice')} that this daemon did not make and never touches",
                f"nvidia-smi mig -i {card.index} -lgi",
            )
        )
    return findings


def _enabled(check: str, name: str, card: Card) -> Finding:
    if card.pending is Mig.DISABLED:
        return notice(
            check,
            f"{name} can be cut until its next reset, which turns MIG mode off",
            f"nvidia-smi -i {card.index} -mig 1",
        )
    return ok(check, f"{name} can be cut: MIG mode is on")


def _disabled(check: str, name: str, card: Card) -> Finding:
    if card.pending is Mig.ENABLED:
        text = f"{name} has MIG mode pending: reset it while nothing uses it, or reboot"
    elif card.architecture is None:
        text = f"{name} cannot be cut now: MIG mode is off"
    elif card.architecture >= pynvml.NVML_DEVICE_ARCH_HOPPER:
        text = (
            f"{name} cannot be cut now: MIG mode is off; it needs no reset but is lost at a reboot, so a unit sets it"
        )
    else:
        text = f"{name} cannot be cut now: MIG mode is off; it needs a reset or a reboot, and then stays"
    return notice(check, text, how_to_enable(card))


def _count(number: int, word: str) -> str:
    return f"{number} {word}" if number == 1 else f"{number} {word}s"
