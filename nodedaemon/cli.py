"""The commands of `puhui-nodedaemon`."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from nodedaemon.daemon import CannotServeError, Settings
from nodedaemon.daemon import serve as serve_until
from nodedaemon.doctor import Asked, as_json, examine, print_table
from nodedaemon.doctor.cards import CardFacts, look_at_cards
from nodedaemon.emulation import UnknownCardError, parse_cards
from nodedaemon.emulation_commands import app as emulation_commands
from nodedaemon.podman_account import PodmanAccount, PodmanUnusableError
from nodedaemon.prepare import Host, PrepareError
from nodedaemon.prepare import prepare as prepare_host
from puhui.rpc.logs import configure_logs

__all__ = ["app"]

app = typer.Typer(name="puhui-nodedaemon", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
app.add_typer(emulation_commands)


@app.callback()
def _about() -> None:
    """Runs one GPU node: cuts slices and runs containers on them."""


@app.command()
def serve(
    state: Annotated[Path, typer.Option(envvar="PUHUI_NODE_STATE", help="Directory for all that this daemon keeps.")],
    listen: Annotated[
        str, typer.Option(envvar="PUHUI_NODE_LISTEN", help="HOST:PORT on loopback, or unix:/PATH.")
    ] = "127.0.0.1:7071",
    name: Annotated[str, typer.Option(envvar="PUHUI_NODE_NAME", help="Name of this node; empty is the host's.")] = "",
    control_plane: Annotated[
        str | None, typer.Option(envvar="PUHUI_NODE_CONTROL_PLANE", help="HOST:PORT of the control plane to join.")
    ] = None,
    join_token_file: Annotated[
        Path | None, typer.Option(envvar="PUHUI_NODE_JOIN_TOKEN_FILE", help="File with the centre's join token.")
    ] = None,
    emulate: Annotated[
        str | None,
        typer.Option(envvar="PUHUI_NODE_EMULATE", help='Emulated cards, such as "H100-80GB-SXM5:2,A100-80GB:1".'),
    ] = None,
    runtime: Annotated[
        str, typer.Option(envvar="PUHUI_NODE_RUNTIME", help="auto, podman, or process (emulated cards only).")
    ] = "auto",
    podman_user: Annotated[
        str,
        typer.Option(envvar="PUHUI_NODE_PODMAN_USER", help="User that owns the containers of a daemon run by root."),
    ] = "puhui",
    image: Annotated[
        str, typer.Option(envvar="PUHUI_NODE_IMAGE", help="Image of containers that ask for none.")
    ] = "localhost/puhui/base:latest",
    allow_root_processes: Annotated[
        bool,
        typer.Option(
            "--allow-root-processes",
            envvar="PUHUI_NODE_ALLOW_ROOT_PROCESSES",
            help="DANGEROUS, for tests only: let the process runtime run submitted code as root.",
        ),
    ] = False,
    log_level: Annotated[
        str, typer.Option(envvar="PUHUI_NODE_LOG_LEVEL", help="debug, info, warning or error.")
    ] = "info",
) -> None:
    """Serves this node until SIGTERM. Containers live on."""
    try:
        configure_logs(log_level)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    settings = Settings(
        listen=listen,
        state=state.absolute(),
        name=name or socket.gethostname(),
        control_plane=control_plane,
        join_token_file=join_token_file,
        emulate=emulate,
        runtime=runtime,
        podman_user=podman_user,
        image=image,
        allow_root_processes=allow_root_processes,
    )
    try:
        asyncio.run(_serve(settings))
    except CannotServeError as error:
        _fail(str(error))


async def _serve(settings: Settings) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    await serve_until(settings, stop)


@app.command()
def doctor(
    state: Annotated[
        Path,
        typer.Option(
            envvar="PUHUI_NODE_STATE", readable=False, help="State directory that the daemon has, or is to have."
        ),
    ] = Path("/var/lib/puhui/node"),
    emulate: Annotated[
        str | None,
        typer.Option(envvar="PUHUI_NODE_EMULATE", help="Ask for emulated cards, such as H100-80GB-SXM5:2."),
    ] = None,
    podman_user: Annotated[
        str,
        typer.Option(envvar="PUHUI_NODE_PODMAN_USER", help="User that owns the containers of a daemon run by root."),
    ] = "puhui",
    image: Annotated[
        str, typer.Option(envvar="PUHUI_NODE_IMAGE", help="Image of containers that ask for none.")
    ] = "localhost/puhui/base:latest",
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Tells what works on this host and what to do about the rest. Changes nothing. Exits 1 if it cannot serve."""
    try:
        cards = parse_cards(emulate) if emulate else ()
    except UnknownCardError as error:
        raise typer.BadParameter(str(error), param_hint="--emulate") from error
    report = examine(Asked(state.absolute(), podman_user, image, cards))
    if json_output:
        sys.stdout.write(as_json(report) + "\n")
    else:
        print_table(report, sys.stdout)
    raise typer.Exit(0 if report.verdict.can_serve else 1)


@app.command()
def prepare(
    user: Annotated[str, typer.Option(help="The daemon's user.")] = "puhui",
    emulated: Annotated[
        bool,
        typer.Option(
            "--emulated", help="The node serves emulated cards, so it needs no driver. So does $PUHUI_NODE_EMULATE."
        ),
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only tell what would be done.")] = False,
    root: Annotated[Path, typer.Option(hidden=True, help="Where /dev, /proc, /run and /etc are.")] = Path("/"),
) -> None:
    """Prepares this host, as root: cap nodes, permissions, runtime directories. Never touches MIG mode."""
    emulated = emulated or bool(os.environ.get("PUHUI_NODE_EMULATE"))
    host = Host.real(lambda: look_at_cards(None))
    if root != Path("/"):
        host = replace(host, root=root, nvidia_modprobe=None, cards=lambda: CardFacts(loaded=False))
    trouble = False
    try:
        for done in prepare_host(host, user, emulated=emulated, dry_run=dry_run):
            sys.stdout.write(f"{'! ' if done.trouble else '+ ' if done.changed else '  '}{done.text}\n")
            trouble = trouble or done.trouble
    except PrepareError as error:
        _fail(str(error))
    raise typer.Exit(1 if trouble else 0)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def podman(
    context: typer.Context,
    podman_user: Annotated[
        str, typer.Option(envvar="PUHUI_NODE_PODMAN_USER", help="User that owns the containers, when run by root.")
    ] = "puhui",
) -> None:
    """Runs podman as the daemon does: same user, same storage. Put its arguments behind `--`."""
    try:
        account = PodmanAccount.find(podman_user)
        account.revive()
    except (PodmanUnusableError, OSError, subprocess.SubprocessError) as error:
        _fail(str(error))
    os.chdir("/")
    command = account.command("podman", *context.args)
    os.execvpe(command[0], command, account.environment())  # noqa: S606 - this process becomes podman


def _fail(message: str) -> NoReturn:
    sys.stderr.write(f"puhui-nodedaemon: {message}\n")
    raise typer.Exit(1)
