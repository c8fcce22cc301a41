"""All commands together, and what becomes of their failures."""

from __future__ import annotations

from collections.abc import Sequence

import grpc
import typer

from puhui.cli import about, fleet, jobs, local, peers, predict, results, session, shares, usage
from puhui.cli import exec as exec_command
from puhui.cli import run as run_commands
from puhui.cli.terminal import Mistake, UnreadError, terminal
from puhui.rpc.errors import Refusal

__all__ = ["app", "run"]

_FAILED, _MISTAKEN, _INTERRUPTED, _NOBODY_READS = 1, 2, 130, 141

app = typer.Typer(
    name="puhui",
    help="Virtual accelerator cards, cut to the size a piece of model code needs.",
    epilog="Begin with `puhui up`, then `puhui run train.py` in another terminal.",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _family in (local, run_commands, session, exec_command, shares, jobs, results, predict, fleet, peers, usage, about):
    _family.add_commands(app)


@app.callback(invoke_without_command=True)
def _without_command(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def _misunderstood(error: typer.TyperException) -> Mistake:
    context = getattr(error, "ctx", None)
    said = error.format_message().strip().rstrip(".")
    see = f"see `{context.command_path if context is not None else 'puhui'} --help`"
    return Mistake("USAGE", f"{said} {see.capitalize()}" if said.endswith("?") else f"{said}; {see}")


def run(arguments: Sequence[str]) -> int:
    """Runs one command line and returns the exit code of the program."""
    try:
        result = typer.main.get_command(app).main(list(arguments), prog_name="puhui", standalone_mode=False)
    except Mistake as mistake:
        terminal().fail(mistake)
        return _MISTAKEN
    except Refusal as refusal:
        terminal().fail(refusal)
        return _FAILED
    except typer.TyperException as error:
        # The command line was not understood, so nobody has seen to this flag yet.
        terminal().as_json = terminal().as_json or "--json" in arguments
        terminal().fail(_misunderstood(error))
        return error.exit_code
    except UnreadError:
        return _NOBODY_READS
    except OSError as error:
        what = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        terminal().fail(Refusal(grpc.StatusCode.UNKNOWN, "SYSTEM", what))
        return _FAILED
    except (KeyboardInterrupt, typer.Abort):
        return _INTERRUPTED
    return result if isinstance(result, int) else 0
