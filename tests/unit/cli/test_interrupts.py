"""No signal strikes in the midst of what must be done wholly, and none is lost."""

import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from puhui.cli.interrupts import Interrupts

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@pytest.fixture
def interrupts() -> Iterator[Interrupts]:
    before = {number: signal.getsignal(number) for number in SIGNALS}
    caught = Interrupts()
    caught.catch()
    yield caught
    signal.set_wakeup_fd(-1)
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_strikes_at_once(interrupts: Interrupts, number: signal.Signals) -> None:
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), number)


def test_it_waits_until_what_is_held_is_done(interrupts: Interrupts) -> None:
    done = []
    with pytest.raises(KeyboardInterrupt), interrupts.held():  # noqa: PT012 - what comes after the signal matters
        os.kill(os.getpid(), signal.SIGTERM)
        done.append("wholly")
    assert done == ["wholly"]
    interrupts.check()  # it has struck, and does not again


def test_one_that_another_thread_got_wakes_the_main_thread(interrupts: Interrupts) -> None:
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    ready, wait = threading.Event(), threading.Event()

    def other() -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
        ready.set()
        wait.wait(60)

    thread = threading.Thread(target=other)
    thread.start()
    try:
        ready.wait(60)
        sender = subprocess.Popen([sys.executable, "-c", f"import os; os.kill({os.getpid()}, {signal.SIGTERM})"])
        with pytest.raises(KeyboardInterrupt):  # noqa: PT012 - either of the two raises it
            assert select.select([interrupts], [], [], 60)[0]
            interrupts.check()
        sender.wait()
    finally:
        wait.set()
        thread.join()
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def test_one_that_struck_where_nothing_can_be_raised_is_not_lost(interrupts: Interrupts) -> None:
    class Ending:
        def __del__(self) -> None:
            try:
                os.kill(os.getpid(), signal.SIGTERM)
            except KeyboardInterrupt:
                swallowed.append(True)  # as the interpreter does with whatever a __del__ raises

    swallowed: list[bool] = []
    ending = Ending()
    del ending
    assert swallowed == [True]
    assert select.select([interrupts], [], [], 0)[0] == [interrupts]
    with pytest.raises(KeyboardInterrupt):
        interrupts.check()
