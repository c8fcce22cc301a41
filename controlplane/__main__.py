"""The command `puhui-controlplane`."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated

import typer

from controlplane.centre import Centre, Settings
from controlplane.idle_policy import SHORTEST_IDLE_AFTER_S, CentrePolicy, TenantPolicy, TenantsFileError, read_tenants
from controlplane.prediction import COSTS, Costs, Tracing
from puhui.rpc.logs import configure_logs
from puhui.rpc.notify import notify_ready, notify_stopping
from puhui.rpc.quantities import parse_duration, parse_percent, parse_size, to_mib

__all__ = ["app", "main"]

_SHORTEST_LEASE_S = 3.0
_LONGEST_LEASE_S = 86400.0

app = typer.Typer(
    name="puhui-controlplane",
    help="The control plane of one Puhui centre.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


@app.callback()
def _commands() -> None:
    """The control plane of one Puhui centre."""


def _variable(name: str) -> str:
    return f"PUHUI_CONTROLPLANE_{name}"


@app.command()
def serve(
    state: Annotated[
        Path, typer.Option(envvar=_variable("STATE"), help="Folder of everything that must not be forgotten.")
    ],
    listen: Annotated[
        str, typer.Option(envvar=_variable("LISTEN"), help="Loopback address, host:port or unix:/path.")
    ] = "127.0.0.1:7070",
    centre: Annotated[str, typer.Option(envvar=_variable("CENTRE"), help="Name of the centre.")] = "local",
    join_token_file: Annotated[
        Path | None,
        typer.Option(
            envvar=_variable("JOIN_TOKEN_FILE"),
            help="Secret by which nodes join; made if it is not there. STATE/join-token if not given.",
        ),
    ] = None,
    prediction_budget: Annotated[
        float,
        typer.Option(
            envvar=_variable("PREDICTION_BUDGET"), min=0.01, help="Seconds that a submission waits for its prediction."
        ),
    ] = 2.0,
    tracing: Annotated[
        Tracing,
        typer.Option(
            envvar=_variable("TRACING"),
            help="When the process begins that traces networks that have a name; it needs the extra `trace`.",
        ),
    ] = Tracing.WHEN_NEEDED,
    oom_cost: Annotated[
        float,
        typer.Option(
            envvar=_variable("OOM_COST"),
            min=0.01,
            max=1e6,
            help="What a slice that is too small costs, where one a size too large costs 1.",
        ),
    ] = COSTS.out_of_memory,
    patience: Annotated[
        float,
        typer.Option(
            envvar=_variable("PATIENCE"), min=0.0, help="Seconds that a waiting job lets smaller ones overtake it."
        ),
    ] = 60.0,
    release_patience: Annotated[
        float,
        typer.Option(
            envvar=_variable("RELEASE_PATIENCE"),
            min=0.1,
            help="Seconds after which a job ends although its node has not confirmed the release.",
        ),
    ] = 5.0,
    idle_after: Annotated[
        str,
        typer.Option(envvar=_variable("IDLE_AFTER"), help="A session that has not used its share for so long is idle."),
    ] = "5m",
    batch_idle_after: Annotated[
        str, typer.Option(envvar=_variable("BATCH_IDLE_AFTER"), help="The same of a batch job.")
    ] = "15m",
    idle_below: Annotated[
        str, typer.Option(envvar=_variable("IDLE_BELOW"), help="A share with less utilization than this is not used.")
    ] = "1%",
    start_grace: Annotated[
        str,
        typer.Option(
            envvar=_variable("START_GRACE"), help="A batch job that has used no share yet is busy for so long."
        ),
    ] = "10m",
    longest_idle_after: Annotated[
        str, typer.Option(envvar=_variable("LONGEST_IDLE_AFTER"), help="No job keeps an unused share for longer.")
    ] = "24h",
    never_allowed: Annotated[
        bool,
        typer.Option(
            envvar=_variable("NEVER_ALLOWED"), help="Whether a job may keep its share however long it is unused."
        ),
    ] = True,
    warm_for: Annotated[
        str,
        typer.Option(
            envvar=_variable("WARM_FOR"),
            help="A slice that was taken back is kept for its tenant for so long; 0s is not.",
        ),
    ] = "60s",
    session_memory: Annotated[
        str,
        typer.Option(
            envvar=_variable("SESSION_MEMORY"),
            help="Memory of the share of a session that asks for none, such as 10GB; the smallest slice if not given.",
        ),
    ] = "",
    tenants: Annotated[
        Path | None,
        typer.Option(
            envvar=_variable("TENANTS"), help="TOML file with defaults by tenant, a table [tenants.NAME] each."
        ),
    ] = None,
    federation_listen: Annotated[
        str,
        typer.Option(
            envvar=_variable("FEDERATION_LISTEN"),
            help="Address at which peers are served, host:port, with mutual TLS; without it this centre only sends.",
        ),
    ] = "",
    federation_address: Annotated[
        str,
        typer.Option(
            envvar=_variable("FEDERATION_ADDRESS"), help="Where peers reach that; where it listens if not given."
        ),
    ] = "",
    lease: Annotated[
        str,
        typer.Option(
            envvar=_variable("LEASE"),
            help="A peer ends a forwarded job that has not been renewed for so long; so does this centre with theirs.",
        ),
    ] = "15m",
    lease_margin: Annotated[
        str,
        typer.Option(
            envvar=_variable("LEASE_MARGIN"),
            help="After the lease a job starts elsewhere only when so much more time has passed.",
        ),
    ] = "30s",
    keep_guests: Annotated[
        str,
        typer.Option(envvar=_variable("KEEP_GUESTS"), help="Results of what peers had run here are kept for so long."),
    ] = "7d",
    log_level: Annotated[
        str, typer.Option(envvar=_variable("LOG_LEVEL"), help="debug, info, warning or error.")
    ] = "info",
) -> None:
    """Serves a centre until SIGTERM or SIGINT."""
    try:
        configure_logs(log_level)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--log-level") from error
    policy = CentrePolicy(
        session_idle_after_s=_parsed("--idle-after", _idle_after, idle_after),
        batch_idle_after_s=_parsed("--batch-idle-after", _idle_after, batch_idle_after),
        idle_below_percent=_parsed("--idle-below", _some_percent, idle_below),
        start_grace_s=_parsed("--start-grace", parse_duration, start_grace),
        longest_idle_after_s=_parsed("--longest-idle-after", _idle_after, longest_idle_after),
        never_allowed=never_allowed,
        warm_s=_parsed("--warm-for", parse_duration, warm_for),
        tenants=_tenants(tenants),
    )
    settings = Settings(
        listen=listen,
        state=state,
        centre=centre,
        join_token_file=join_token_file or state / "join-token",
        prediction_budget_s=prediction_budget,
        tracing=tracing,
        costs=Costs(out_of_memory=oom_cost),
        patience_s=patience,
        release_patience_s=release_patience,
        idle=policy,
        session_memory_mib=to_mib(int(_parsed("--session-memory", parse_size, session_memory)))
        if session_memory
        else 0,
        federation_listen=federation_listen,
        federation_address=federation_address,
        lease_s=_parsed("--lease", _lease, lease),
        lease_margin_s=_parsed("--lease-margin", parse_duration, lease_margin),
        keep_guests_s=_parsed("--keep-guests", parse_duration, keep_guests),
    )
    try:
        asyncio.run(_serve(settings))
    except (OSError, ValueError) as error:
        typer.echo(f"puhui-controlplane: {error}", err=True)
        raise typer.Exit(1) from error


def _some_percent(text: str) -> float:
    percent = parse_percent(text)
    if not percent > 0:
        raise ValueError(f"{text}: nothing is below 0%; write 1% or 0.5%")
    return percent


def _parsed(option: str, parse: Callable[[str], float], text: str) -> float:
    try:
        return parse(text)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=option) from error


def _idle_after(text: str) -> float:
    length_s = parse_duration(text)
    if length_s < SHORTEST_IDLE_AFTER_S:
        raise ValueError(f"{text} is shorter than three samples; {SHORTEST_IDLE_AFTER_S:g}s is the shortest")
    return length_s


def _lease(text: str) -> float:
    length_s = parse_duration(text)
    if not _SHORTEST_LEASE_S <= length_s <= _LONGEST_LEASE_S:
        raise ValueError(f"{text}: a lease is from {_SHORTEST_LEASE_S:g}s to 24h; 15m is good for most networks")
    return length_s


def _tenants(path: Path | None) -> Mapping[str, TenantPolicy]:
    if path is None:
        return {}
    try:
        return read_tenants(path.read_text())
    except (OSError, UnicodeDecodeError, TenantsFileError) as error:
        raise typer.BadParameter(f"{path}: {error}", param_hint="--tenants") from error


async def _serve(settings: Settings) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    centre = await Centre.start(settings)
    notify_ready(centre.address)
    await stop.wait()
    notify_stopping()
    await centre.stop()


def main() -> None:
    """Runs the command."""
    app()


if __name__ == "__main__":
    main()
