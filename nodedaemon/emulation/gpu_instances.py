"""GPU instances: what fits where. Decisions only; nothing here touches a file or a process."""

from nodedaemon.emulation.geometry import CardModel, GpuInstanceProfile, Placement, known
from nodedaemon.emulation.refusal import Code, Refusal
from nodedaemon.emulation.state import Gpu, GpuInstance, Node


def require_mig(gpu: Gpu) -> None:
    """Refuse with NOT_SUPPORTED while MIG mode is off."""
    if not gpu.mig:
        raise Refusal(Code.NOT_SUPPORTED)


def profile_with_id(gpu: Gpu, profile_id: int, otherwise: Code) -> GpuInstanceProfile:
    """Return the profile with this id, or refuse with the given code."""
    profile = gpu.card.profile(profile_id)
    if profile is None:
        raise Refusal(otherwise)
    return profile


def free_placements(gpu: Gpu, profile: GpuInstanceProfile) -> list[Placement]:
    """Return where one more instance of the profile could sit now, by rising start.

    Raises:
        Refusal: NOT_SUPPORTED, when the profile's placements are not recorded.
    """
    placements = known(profile.placements)
    if _limit(gpu, profile) == 0:
        return []
    taken = [instance.placement for instance in gpu.instances]
    return [p for p in placements if not any(p.overlaps(t) for t in taken)]


def remaining_capacity(gpu: Gpu, profile: GpuInstanceProfile) -> int:
    """Return how many more instances of the profile fit.

    All placements of one profile have the same size, so taking them by rising start wherever they
    do not overlap gives the largest set.
    """
    end, count = 0, 0
    for placement in free_placements(gpu, profile):
        if placement.start >= end:
            end, count = placement.start + placement.size, count + 1
    return min(count, _limit(gpu, profile))


def _limit(gpu: Gpu, profile: GpuInstanceProfile) -> int:
    """How many more the counted resources allow: the profile's own maximum, and the OFA engines.

    A card has one optical flow engine to give. That is why a ``+me`` profile exists once, and why
    two different ``+me`` profiles exclude each other.
    """
    same = sum(instance.profile_id == profile.id for instance in gpu.instances)
    limit = profile.max_instances - same
    if profile.ofa:
        used = sum(_ofa(gpu.card, instance) for instance in gpu.instances)
        limit = min(limit, (gpu.card.ofa_engines - used) // profile.ofa)
    return max(limit, 0)


def _ofa(card: CardModel, instance: GpuInstance) -> int:
    profile = card.profile(instance.profile_id)
    return (profile.ofa or 0) if profile else 0


def create(node: Node, gpu: Gpu, profile: GpuInstanceProfile, wanted: Placement | None) -> GpuInstance:
    """Add a GPU instance.

    Args:
        node: Gives the serial.
        gpu: The card, MIG mode on.
        profile: What to create.
        wanted: Where, or None for the driver's own choice, which is the last place that is free,
            as seen on hardware (the first 3g of an empty A100 sits at 4, not at 0).

    Raises:
        Refusal: INVALID_ARGUMENT for a placement that the profile never has,
            INSUFFICIENT_RESOURCES when the place or the last instance is taken, NOT_SUPPORTED when
            the recordings do not tell enough of the profile.
    """
    for cell in (profile.memory_mib, profile.sm, profile.copy_engines, profile.decoders):
        known(cell)
    if wanted is not None and wanted not in known(profile.placements):
        raise Refusal(Code.INVALID_ARGUMENT)
    free = free_placements(gpu, profile)
    if not free or (wanted is not None and wanted not in free):
        raise Refusal(Code.INSUFFICIENT_RESOURCES)
    placement = free[-1] if wanted is None else wanted
    instance = GpuInstance(_free_id(gpu, placement), node.next_serial(), profile.id, placement.start, placement.size)
    gpu.instances.append(instance)
    return instance


def _free_id(gpu: Gpu, placement: Placement) -> int:
    """Return the lowest free id of the placement's class.

    Recorded ranges: whole card 0, halves 1-2, quarters 3-6, eighths 7-14.
    """
    parts = gpu.card.memory_slices // placement.size
    taken = {instance.id for instance in gpu.instances}
    free = (i for i in range(parts - 1, 2 * parts - 1) if i not in taken)
    number = next(free, None)
    if number is None:
        raise Refusal(Code.INSUFFICIENT_RESOURCES)
    return number
