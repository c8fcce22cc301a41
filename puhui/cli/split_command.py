"""Command lines that end in a command of the user's own: `puhui exec SESSION -- python3 train.py -v`."""

from __future__ import annotations

import typer
from typer._click.core import Context
from typer.core import TyperCommand

from puhui.cli.terminal import Mistake

__all__ = ["SplitCommand", "command_of"]

_REST = "puhui.rest"


class SplitCommand(TyperCommand):
    """Reads no option behind `--`: what stands there is the user's command."""

    def parse_args(self, ctx: Context, args: list[str]) -> list[str]:
        """Parses what stands before `--` and puts the rest aside."""
        own, rest = (args, []) if "--" not in args else (args[: args.index("--")], args[args.index("--") + 1 :])
        ctx.meta[_REST] = rest
        return super().parse_args(ctx, own)


def command_of(context: typer.Context, words: list[str] | None, example: str) -> list[str]:
    """Returns the user's command: what stands behind `--`, or else the words that no option took.

    Args:
        context: of the command line.
        words: what no option took.
        example: a command line, for whoever wrote none.

    Raises:
        Mistake: there are both.
    """
    rest: list[str] = context.meta[_REST]
    if words and rest:
        raise Mistake("USAGE", f"{words[0]} stands before the --; write the whole command behind it: {example}")
    return rest or list(words or ())
