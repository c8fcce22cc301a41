"""Somebody else at the same cards: makes slices of its own, and destroys its own or, by hand, one of the daemon's.

Run as a process of its own. Each line of its input is a JSON object with one deed, and each line that it prints is what
came of it.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import pynvml

from nodedaemon.driver import Driver
from nodedaemon.driver_facts import DriverError, GpuInstance, Span
from nodedaemon.emulation import EmulatedDriver, installed, parse_cards

_TRIES = 20
_MOST = 3


class Outsider:
    """Whoever runs nvidia-smi on the node."""

    def __init__(self, driver: Driver, seed: int) -> None:
        self._driver = driver
        self._chance = random.Random(seed)
        self._mine: dict[str, tuple[str, int]] = {}

    def do(self, deed: dict[str, Any]) -> Any:
        """Does one deed, and returns what came of it."""
        if deed["do"] == "meddle":
            return self.meddle()
        if deed["do"] == "destroy":
            return self.destroy_by_hand(deed["gpu"], deed["gi"], deed["uuid"])
        return self.own()

    def meddle(self) -> str:
        """Makes a slice, or destroys one of its own."""
        if self._mine and (len(self._mine) >= _MOST or self._chance.random() < 0.4):
            uuid = self._chance.choice(sorted(self._mine))
            gpu, gi = self._mine[uuid]
            if self._destroy(gpu, gi):
                del self._mine[uuid]
                return f"destroyed {uuid}"
            return f"could not destroy {uuid}"
        gpu = self._chance.choice([one.uuid for one in self._driver.gpus() if one.uuid])
        profile = self._chance.choice([one for one in self._driver.profiles(gpu) if one.name.startswith("1g")])
        span = self._chance.choice(profile.placements)
        try:
            gi = self._driver.create_gpu_instance(gpu, profile.profile_id, Span(span.start, span.size))
        except DriverError as error:
            return f"no room: {error}"
        try:
            self._driver.create_compute_instance(gpu, gi, profile.compute_slices)
        except DriverError as error:
            assert self._destroy(gpu, gi), "what is half made goes again"
            return f"rolled back: {error}"
        made = self._instance(gpu, gi)
        assert made is not None, "nobody touches what is not theirs"
        uuid = made.compute_instances[0].uuid
        self._mine[uuid] = (gpu, gi)
        return f"made {uuid}"

    def destroy_by_hand(self, gpu: str, gi: int, uuid: str) -> bool:
        """Destroys a slice of the daemon. Says whether it is gone: one that somebody holds stays."""
        found = self._instance(gpu, gi)
        if found is None or uuid not in [one.uuid for one in found.compute_instances]:
            return False
        return self._destroy(gpu, gi)

    def own(self) -> list[list[Any]]:
        """Returns what it has: GPU, GPU instance and UUID of each, as the driver lists them."""
        found: list[tuple[str, int, str]] = []
        for gpu, gi in self._mine.values():
            instance = self._instance(gpu, gi)
            found += [(gpu, gi, one.uuid) for one in (instance.compute_instances if instance else [])]
        assert sorted(uuid for _, _, uuid in found) == sorted(self._mine), "nobody touches what is not theirs"
        return [list(one) for one in sorted(found)]

    def _instance(self, gpu: str, gi: int) -> GpuInstance | None:
        for _ in range(_TRIES):
            try:
                return self._driver.instance(gpu, gi)
            except DriverError:
                continue  # a fault that was meant for anybody
        raise AssertionError("the driver does not answer")

    def _destroy(self, gpu: str, gi: int) -> bool:
        for _ in range(_TRIES):
            instance = self._instance(gpu, gi)
            if instance is None:
                return True
            try:
                for one in instance.compute_instances:
                    self._driver.destroy_compute_instance(gpu, gi, one.id)
                self._driver.destroy_gpu_instance(gpu, gi)
            except DriverError as error:
                if error.code == pynvml.NVML_ERROR_IN_USE:
                    return False
        return self._instance(gpu, gi) is None


def main(state: str, cards: str, seed: str) -> None:
    """Does what its input asks for, to the end of it."""
    with installed(EmulatedDriver(Path(state), parse_cards(cards))):
        driver = Driver()
        outsider = Outsider(driver, int(seed))
        for line in sys.stdin:
            sys.stdout.write(json.dumps(outsider.do(json.loads(line))) + "\n")
            sys.stdout.flush()
        driver.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
