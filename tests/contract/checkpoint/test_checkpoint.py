"""What everything that checkpoints processes keeps to, on real processes."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from nodedaemon.checkpoint import CheckpointError, Move, Process, living, start_time
from nodedaemon.checkpoint_emulated import EmulatedCheckpoints

# Reads its card for each line of its input, in its second thread; says whether its memory is what it was.
_WORKING = """
import os, sys, threading
card = os.open(sys.argv[1], os.O_RDONLY)
kept = os.open(sys.argv[1], os.O_RDONLY)
os.set_inheritable(kept, True)
memory = os.urandom(1 << 20)
was = hash(memory)
def work():
    for line in sys.stdin:
        read = os.read(card, 64)
        os.lseek(card, 0, 0)
        inherited = [os.get_inheritable(card), os.get_inheritable(kept)]
        print(read.decode(), os.getpid(), hash(memory) == was, *inherited, flush=True)
print('up', flush=True)
worker = threading.Thread(target=work)
worker.start()
worker.join()
"""


@dataclass
class Worker:
    """A process that holds a card."""

    popen: subprocess.Popen[str]
    said: list[str] = field(default_factory=list)

    @property
    def process(self) -> Process:
        return Process(self.popen.pid, start_time(self.popen.pid))

    def ask(self) -> None:
        assert self.popen.stdin is not None
        self.popen.stdin.write("\n")
        self.popen.stdin.flush()

    async def answer(self) -> str:
        assert self.popen.stdout is not None
        async with asyncio.timeout(20):
            return (await asyncio.to_thread(self.popen.stdout.readline)).strip()

    def holds(self, node: Path) -> bool:
        entries = Path(f"/proc/{self.popen.pid}/fd").iterdir()
        return any(entry.resolve() == node for entry in entries)


@pytest.fixture
def checkpoints(tmp_path: Path) -> EmulatedCheckpoints:
    return EmulatedCheckpoints(os.getuid(), os.getgid(), tmp_path / "records")


@pytest.fixture
def nodes(tmp_path: Path) -> tuple[Path, Path]:
    old, new = tmp_path / "nvidia-cap1", tmp_path / "nvidia-cap2"
    old.write_text("old")
    new.write_text("new")
    return old, new


@pytest.fixture
def worker(nodes: tuple[Path, Path]) -> Iterator[Worker]:
    with subprocess.Popen(
        [sys.executable, "-c", _WORKING, str(nodes[0])], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as popen:
        assert popen.stdout is not None
        assert popen.stdout.readline() == "up\n"
        yield Worker(popen)
        popen.kill()


def _to(path: Path) -> list[Move]:
    return [Move("MIG-old", "MIG-new", {"nvidia-cap1": str(path)})]


async def test_a_process_lives_on_without_its_card_and_blocks_until_it_has_another(
    checkpoints: EmulatedCheckpoints, nodes: tuple[Path, Path], worker: Worker
) -> None:
    old, new = nodes
    pid = worker.popen.pid
    assert checkpoints.probe().name == "emulated"
    worker.ask()
    assert await worker.answer() == f"old {pid} True False True"
    for _ in range(2):
        await checkpoints.checkpoint(pid, [worker.process], {"nvidia-cap1": old})
        assert not worker.holds(old)
    wanted = asyncio.create_task(checkpoints.wanted(pid, [worker.process]))
    worker.ask()
    assert await wanted == worker.process
    for _ in range(2):
        await checkpoints.restore(pid, [worker.process], _to(new))
        assert worker.holds(new)
    assert await worker.answer() == f"new {pid} True False True"


async def test_what_fails_leaves_a_process_checkpointed_and_can_be_repeated(
    checkpoints: EmulatedCheckpoints, nodes: tuple[Path, Path], worker: Worker
) -> None:
    old, new = nodes
    await checkpoints.checkpoint(worker.popen.pid, [worker.process], {"nvidia-cap1": old})
    for moves in ([], _to(new.with_name("nothing"))):
        with pytest.raises(CheckpointError):
            await checkpoints.restore(worker.popen.pid, [worker.process], moves)
    worker.ask()
    assert await checkpoints.wanted(worker.popen.pid, [worker.process]) == worker.process
    await checkpoints.restore(worker.popen.pid, [worker.process], _to(old))
    assert (await worker.answer()).startswith("old ")


async def test_a_process_that_has_ended_is_none(
    checkpoints: EmulatedCheckpoints, nodes: tuple[Path, Path], worker: Worker
) -> None:
    process = worker.process
    await checkpoints.checkpoint(process.pid, [process], {"nvidia-cap1": nodes[0]})
    waiting = asyncio.create_task(checkpoints.wanted(process.pid, [process]))
    worker.popen.kill()
    worker.popen.wait()
    assert living([process]) == []
    assert await waiting is None
    await checkpoints.restore(process.pid, [process], _to(nodes[1]))
    await checkpoints.checkpoint(process.pid, [process], {"nvidia-cap1": nodes[0]})


# Says a dot for each signal. It waits with the signal let in for just as long as it waits, so none comes in between.
_HEARING = """
import ctypes, os, signal, sys
card = os.open(sys.argv[1], os.O_RDONLY)
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
nothing = (ctypes.c_ulong * 16)()
signal.signal(signal.SIGUSR1, lambda *_: os.write(1, b'.'))
os.write(1, b'u')
while True:
    ctypes.CDLL(None).sigsuspend(nothing)
"""


@pytest.fixture
def hearing(nodes: tuple[Path, Path]) -> Iterator[Worker]:
    with subprocess.Popen([sys.executable, "-c", _HEARING, str(nodes[0])], stdout=subprocess.PIPE, text=True) as popen:
        yield Worker(popen)
        popen.kill()


async def test_signals_that_come_meanwhile_are_not_lost(
    checkpoints: EmulatedCheckpoints, nodes: tuple[Path, Path], hearing: Worker
) -> None:
    assert hearing.popen.stdout is not None
    output = hearing.popen.stdout.fileno()
    process = hearing.process
    over = threading.Event()

    def send() -> int:
        """Sends signals, each once the one before was heard; returns how many."""
        sent = 0
        while os.read(output, 1) and not over.is_set():
            os.kill(process.pid, signal.SIGUSR1)
            sent += 1
        return sent

    sending = asyncio.create_task(asyncio.to_thread(send))
    for _ in range(5):
        await checkpoints.checkpoint(process.pid, [process], {"nvidia-cap1": nodes[0]})
        await checkpoints.restore(process.pid, [process], _to(nodes[0]))
    over.set()
    async with asyncio.timeout(20):
        assert await sending > 0
