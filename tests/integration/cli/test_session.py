"""Sessions and what is run in them, with the real program."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import termios
from collections.abc import Iterator

import pytest

from puhui.v1 import job_pb2
from tests.integration.cli.program import Puhui
from tests.unit.cli.small_centre import RunningCentre


@pytest.fixture
def session(puhui: Puhui) -> str:
    ended = puhui("session", "start", "--name", "den")
    assert ended.code == 0, ended.err
    return ended.out.strip()


def test_a_session_is_started_used_listed_and_stopped(puhui: Puhui, running: RunningCentre, code_folder: str) -> None:
    ended = puhui("session", "start", code_folder, "--name=den", "--memory=4GiB", "--env=A=b", "--", "jupyter", "-x")
    assert ended.code == 0, ended.err
    session = ended.out.strip()
    assert f"{code_folder}: 1 file" in ended.err
    assert "puhui exec den -- COMMAND runs something in it; puhui session stop den ends it" in ended.err
    spec = running.centre.kept[session].job.spec
    assert (spec.kind, list(spec.command), dict(spec.env)) == (
        job_pb2.JOB_KIND_SESSION,
        ["jupyter", "-x"],
        {"A": "b"},
    )
    assert spec.resources.memory_mib == 4096
    assert session in puhui("session", "ls").out
    stopped = puhui("session", "stop", "den")
    assert (stopped.code, stopped.out) == (0, "")
    assert stopped.err == f"session {session} is stopped (its state is `cancelled`, as that of every one)\n"
    assert "no session lives" in puhui("session", "ls").err
    assert session in puhui("session", "ls", "--all").out
    assert "had ended before" in puhui("session", "stop", session).err


def test_a_session_needs_neither_code_nor_a_command(puhui: Puhui, running: RunningCentre) -> None:
    document = puhui("session", "start", "--json").json
    assert document["state"] == "JOB_STATE_RUNNING"
    assert (document["bundle_id"], document["spec"]["command"], document["spec"]["idle"]) == ("", [], None)


def test_an_idle_policy_is_asked_for(puhui: Puhui, running: RunningCentre) -> None:
    options = "--idle-after=5m --idle-below=0.5% --start-grace=90s --reclaim=stop --warn-signal --on-reclaim-limit=1m"
    document = puhui("session", "start", "--json", *options.split(), "--on-reclaim", "sh -c 'save it'").json
    assert document["spec"]["idle"] == {
        "idle_after": "300s",
        "idle_below_percent": 0.5,
        "reclaim_mode": "RECLAIM_MODE_STOP",
        "start_grace": "90s",
        "warn_signal": True,
        "on_reclaim": ["sh", "-c", "save it"],
        "on_reclaim_limit": "60s",
    }


def test_where_it_may_run_is_asked_for(puhui: Puhui, running: RunningCentre) -> None:
    options = "--no-here-only --max-wait=10m --peer-label region=eu --not-peer-label region=us"
    document = puhui("session", "start", "--json", *options.split()).json
    assert document["spec"]["peers"] == {
        "here_only": False,
        "preferred_peers": [],
        "max_wait": "600s",
        "required_labels": {"region": "eu"},
        "forbidden_labels": {"region": "us"},
    }
    document = puhui("session", "start", "--json", "--prefer", "east", "--prefer", "west").json
    assert document["spec"]["peers"]["preferred_peers"] == ["east", "west"]


def test_exec_is_the_command_and_nothing_else(puhui: Puhui, session: str) -> None:
    for word in (session, session[:9], "den"):
        ended = puhui("exec", word, "--", "echo", "普", "-v")
        assert (ended.code, ended.out, ended.err) == (0, "普 -v\n", "and an error\n"), word
    assert puhui("exec", session, "exit", "7").code == 7
    assert puhui("exec", session, "--", "exit", "300").code == 255
    ended = puhui("exec", "den", "--env", "A=1", "-w", "/srv", "--", "env")
    assert ended.out == "A=1\n/srv\n"
    lines = puhui("exec", "den", "--json", "--", "echo", "a").lines
    assert [next(iter(line)) for line in lines] == ["run", "run", "log", "log", "exit_code"]
    assert puhui("exec", "den", "--", "cat", given=b"a\0b" * 100_000).out == "listening\n" + "a\0b" * 100_000


def test_waiting_and_moving_are_said_aside(puhui: Puhui, running: RunningCentre, session: str) -> None:
    told = [
        ("RESUMING", "a share is being scheduled for it"),
        ("WAITING_FOR_SLICE", "2nd in the queue; no GPU has 12288 MiB free"),
        ("WAITING_FOR_SLICE", "2nd in the queue; no GPU has 12288 MiB free"),
        ("SESSION_MOVES", "its node has no room, so the session moves to two"),
        ("SHARE_RESERVED", "1g.10gb reserved"),
    ]
    running.centre.before_start = [job_pb2.JobEvent(reason=reason, message=message) for reason, message in told]
    ended = puhui("exec", "den", "--", "exit", "0")
    assert (ended.code, ended.out) == (0, "")
    assert ended.err.splitlines() == [
        "waiting    2nd in the queue; no GPU has 12288 MiB free",
        "moving     its node has no room, so the session moves to two",
    ]


@pytest.mark.parametrize(
    ("arguments", "code", "reason", "said"),
    [
        (["exec", "nobody", "--", "ls"], 125, "JOB_NOT_FOUND", "no job is called nobody"),
        (["exec", "j-aaaaaaaaaaaa", "--", "ls"], 125, "JOB_NOT_FOUND", "no job j-aaaaaaaaaaaa"),
        (["exec", "gone", "--", "ls"], 125, "JOB_ENDED", "has ended"),
        (["exec", "twin", "--", "ls"], 125, "JOB_AMBIGUOUS", "could be any of 2 jobs"),
        (["exec", "den"], 2, "USAGE", "say what to run: puhui exec SESSION -- python3 train.py"),
        (["exec", "den", "--"], 2, "USAGE", "say what to run"),
        (["exec", "den", "ls", "--", "ls"], 2, "USAGE", "write the whole command behind it"),
        (["exec", "den", "-t", "--", "ls"], 2, "USAGE", "-t needs a terminal"),
        (["exec", "den", "--env", "x", "--", "ls"], 2, "USAGE", "KEY=VALUE"),
        (["exec"], 2, "USAGE", "Missing argument 'SESSION'"),
        (["session", "start", "--idle-below", "0%"], 2, "USAGE", "nothing is below 0%"),
        (["session", "start", "--idle-after", "x"], 2, "USAGE", "write 90s"),
        (["session", "start", "--reclaim", "gently"], 2, "USAGE", "checkpoint"),
        (["session", "start", "nowhere"], 2, "DIRECTORY_NOT_FOUND", "is no folder"),
        (["session", "stop", "batch"], 1, "NOT_A_SESSION", "is a batch job"),
        (["suspend", "nobody"], 1, "JOB_NOT_FOUND", "no job is called nobody"),
        (["suspend", "den", "--hardest", "never"], 2, "USAGE", "never"),
        (["runs", ""], 2, "USAGE", "give a job"),
    ],
)
def test_what_cannot_be_is_said_in_a_sentence(
    puhui: Puhui, running: RunningCentre, arguments: list[str], code: int, reason: str, said: str
) -> None:
    needed = arguments[1] if len(arguments) > 1 else ""
    for name in {"twin": ["twin", "twin"]}.get(needed, [needed] if needed in ("den", "gone") else []):
        assert puhui("session", "start", "--name", name).code == 0
    if needed == "gone":
        assert puhui("session", "stop", "gone").code == 0
    if "batch" in arguments:
        (puhui.home / "code").mkdir()
        (puhui.home / "code/x.py").write_text("")
        assert puhui("submit", "--name=batch", "--label=course=hang", "code/x.py").code == 0
    ended = puhui(
        *(arguments[:2] if arguments[0] == "session" else arguments[:1]),
        "--json",
        *arguments[1 + (arguments[0] == "session") :],
    )
    plain = puhui(*arguments)
    assert (plain.code, plain.out) == (code, "")
    if "-t" not in arguments:
        assert (ended.code, ended.error["reason"]) == (code, reason)
        assert said in ended.error["message"]
    assert said in plain.err
    assert plain.err.startswith("error: ")
    assert plain.err.count("\n") == 1


def test_shares_are_taken_and_given(puhui: Puhui, running: RunningCentre, session: str) -> None:
    assert "has no share now" in puhui("suspend", "den", "--hardest", "stop").err
    assert running.centre.suspended[0].hardest == job_pb2.RECLAIM_MODE_STOP
    listed = puhui("ps").out
    assert "idle" in listed
    assert "  its share was taken back (detach)\n" in listed
    assert "puhui explain" in puhui("resume", "den").err
    assert "  2nd in the queue\n" in puhui("ps").out
    explained = puhui("explain", "den").out
    assert "3 in the queue" in explained
    assert "in about 1m30s" in explained
    assert "nothing was run" in puhui("runs", "den").err
    puhui("exec", "den", "--", "exit", "7")
    shown = puhui("runs", "den").out
    assert "exit 7" in shown
    assert "exit code 7" in shown
    assert "exit 7: exit code 7" in " ".join(puhui("get", session).out.split())


class OnTerminal:
    """The program on a terminal of its own."""

    def __init__(self, puhui: Puhui, *arguments: str) -> None:
        self.terminal, self.other_end = pty.openpty()
        self.resize(91, 31)
        self.before = termios.tcgetattr(self.other_end)
        self.seen = b""

        def take() -> None:
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)

        self.process: subprocess.Popen[bytes] = puhui.start(
            *arguments,
            stdin=self.other_end,
            stdout=self.other_end,
            stderr=self.other_end,
            start_new_session=True,
            preexec_fn=take,
        )

    def resize(self, columns: int, rows: int) -> None:
        fcntl.ioctl(self.terminal, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def type(self, data: bytes) -> None:
        os.write(self.terminal, data)

    def until(self, wanted: bytes) -> None:
        while wanted not in self.seen:
            assert select.select([self.terminal], [], [], 20)[0], self.seen
            self.seen += os.read(self.terminal, 65536)

    def ends(self) -> int:
        code = self.process.wait(20)
        assert termios.tcgetattr(self.other_end) == self.before, "the terminal is not as it was"
        return code


@pytest.fixture
def on_terminal(puhui: Puhui, session: str) -> Iterator[OnTerminal]:
    it = OnTerminal(puhui, "exec", "den", "-t", "--", "cat")
    yield it
    if it.process.poll() is None:
        it.process.kill()
        it.process.wait()
    os.close(it.terminal)
    os.close(it.other_end)


def test_a_terminal_is_lent_and_given_back(on_terminal: OnTerminal, running: RunningCentre) -> None:
    on_terminal.until(b"size 91 31")
    assert not termios.tcgetattr(on_terminal.other_end)[3] & termios.ECHO
    on_terminal.type(b"\x03\x1a\x11keys")
    on_terminal.until(b"\x03\x1a\x11keys")
    on_terminal.resize(120, 50)
    on_terminal.until(b"size 120 50")
    on_terminal.type(b"\x04")
    on_terminal.until(b"\x04")
    assert on_terminal.ends() == 0
    (run,) = running.centre.runs.values()
    assert (run.start.terminal_size.columns, run.start.terminal_size.rows) == (91, 31)
    assert run.signals == []


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_the_terminal_is_given_back_when_the_program_is_ended(
    on_terminal: OnTerminal, running: RunningCentre, number: int, code: int
) -> None:
    on_terminal.until(b"size 91 31")
    on_terminal.process.send_signal(number)
    on_terminal.until(b"signal")
    assert on_terminal.ends() == code
    (run,) = running.centre.runs.values()
    assert run.signals == [number]


def test_ctrl_c_while_it_waits_gives_up(puhui: Puhui, running: RunningCentre, session: str) -> None:
    running.centre.before_start = [job_pb2.JobEvent(reason="WAITING_FOR_SLICE", message="1st in the queue")]
    running.shut_gate()
    it = OnTerminal(puhui, "exec", "den", "-t", "--", "cat")
    it.until(b"1st in the queue")
    it.type(b"\x03")
    it.until(b"given up")
    assert it.ends() == 130
    os.close(it.terminal)
    os.close(it.other_end)


def test_ctrl_c_goes_to_the_command_and_twice_hangs_up(puhui: Puhui, running: RunningCentre, session: str) -> None:
    process = puhui.start("exec", "den", "--", "cat", stdin=subprocess.PIPE)
    assert process.stdout is not None
    seen = b""
    for wanted in (b"listening\n", b"signal 2\n", b"signal 1\n"):
        while not seen.endswith(wanted):
            seen += os.read(process.stdout.fileno(), 4096)
        if wanted != b"signal 1\n":
            process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 129
    assert err == b""


def test_nobody_reads_any_more(puhui: Puhui, running: RunningCentre, session: str) -> None:
    process = puhui.start("exec", "den", "--", "cat", stdin=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdin is not None
    assert os.read(process.stdout.fileno(), 4096) == b"listening\n"
    process.stdout.close()
    process.stdin.write(b"word")
    process.stdin.flush()
    assert process.wait(20) == 141
    assert process.stderr is not None
    process.stdin.close()
    process.stderr.close()
    (run,) = running.centre.runs.values()
    assert run.signals == [signal.SIGHUP]
