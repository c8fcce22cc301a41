"""Switching MIG mode, resetting a card, rebooting the node. Decisions only."""

from nodedaemon.emulation.geometry import Architecture
from nodedaemon.emulation.refusal import Code
from nodedaemon.emulation.state import Gpu, Node


def set_mode(gpu: Gpu, *, enabled: bool) -> Code:
    """Ask for a mode.

    Returns:
        The activation status: SUCCESS when the mode is as asked, RESET_REQUIRED on Ampere, where it
        stays pending until the card is reset, IN_USE while instances exist on later cards.
    """
    gpu.mig_pending = enabled
    if gpu.mig == enabled:
        return Code.SUCCESS
    if gpu.card.architecture is Architecture.AMPERE:
        return Code.RESET_REQUIRED
    if gpu.instances:
        return Code.IN_USE
    gpu.mig = enabled
    return Code.SUCCESS


def reset(gpu: Gpu) -> None:
    """Reset one card: its instances are gone and the pending mode holds."""
    gpu.instances.clear()
    gpu.mig = gpu.mig_pending


def reboot(node: Node) -> None:
    """Reboot the node.

    No instance survives. Ampere keeps MIG mode over a reboot; later cards come up with it off.
    """
    for gpu in node.gpus:
        if gpu.card.architecture is not Architecture.AMPERE:
            gpu.mig_pending = False
        reset(gpu)
