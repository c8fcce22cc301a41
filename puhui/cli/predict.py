"""`puhui predict`."""

from __future__ import annotations

from typing import Annotated

import typer

from puhui.cli.chart import memory_chart
from puhui.cli.connection import connect
from puhui.cli.facts import facts_line
from puhui.cli.job_options import JobOptions, json_flag, server_option, takes_job_options
from puhui.cli.progress import transfer_bar
from puhui.cli.run import note_code
from puhui.cli.terminal import Mistake, terminal
from puhui.cli.words import overruled_line, prediction_line, readable
from puhui.rpc.quantities import parse_duration
from puhui.v1 import prediction_pb2

__all__ = ["add_commands"]


def add_commands(app: typer.Typer) -> None:
    """Adds `predict`."""
    app.command("predict", context_settings={"allow_interspersed_args": False})(takes_job_options(_predict))


def _predict(
    options: JobOptions,
    json: Annotated[bool, json_flag] = False,
    server: Annotated[str | None, server_option] = None,
    budget: Annotated[
        str, typer.Option("--budget", metavar="TIME", help="Longest wait for the prediction, such as 30s; up to 2m.")
    ] = "",
) -> None:
    """Say what slice a script would get, and why. Nothing is run."""
    try:
        budget_s = parse_duration(budget) if budget else None
    except ValueError as error:
        raise Mistake("USAGE", f"--budget: {error}") from error
    request = options.request()
    with connect(server) as centre:
        note_code(request, options)
        with transfer_bar("uploading") as progress:
            answer = centre.predict(request.spec, request.directory, progress, budget_s=budget_s)
        if terminal().as_json:
            terminal().json(answer)
            return
    chosen = answer.sizing.choices[0].gpu_model if answer.sizing.choices else ""
    profiles = [one for one in answer.profiles if not chosen or one.gpu_model == chosen]
    prediction = answer.prediction
    said = overruled_line(prediction, answer.sizing.origin) or prediction_line(prediction)
    # What the user asked for is what the slices are measured by.
    prediction.required_mib = answer.sizing.required_mib or prediction.required_mib
    if prediction.tier:
        terminal().show(f"predicted  {said}")
        sized = prediction.tier != prediction_pb2.PREDICTION_TIER_NO_ACCELERATOR
        facts = facts_line(prediction.facts) if sized else ""
        if facts:
            terminal().show(f"from       {facts}")
        terminal().show("")
        terminal().show(memory_chart(prediction, profiles))
        terminal().show("")
    terminal().show(f"slice      {readable(answer.sizing.reason)}")
    terminal().show(f"now        {readable(answer.message)}")
