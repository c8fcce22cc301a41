"""Which centre the commands talk to."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from puhui.cli.local_state import local_addresses
from puhui.cli.terminal import Mistake
from puhui.client import DEFAULT_ADDRESS

__all__ = ["Settings", "config_path", "server_address"]

_ADDRESS = re.compile(r"unix:.+|(\[[0-9a-fA-F:]+\]|[^:\s/]+):\d{1,5}")


class Settings(BaseModel):
    """The file ~/.config/puhui/config.yaml."""

    model_config = ConfigDict(extra="forbid")

    server: str | None = None
    """Address of the control plane, "host:port", or the name of a local centre."""


def config_path(environment: Mapping[str, str] = os.environ) -> Path:
    """Returns where the settings of this user are."""
    base = environment.get("XDG_CONFIG_HOME") or str(Path.home() / ".config")
    return Path(base, "puhui", "config.yaml")


def server_address(flag: str | None, environment: Mapping[str, str] = os.environ) -> str:
    """Returns the control plane's address: flag, then PUHUI_SERVER, then the settings, then the default.

    Raises:
        Mistake: ADDRESS_INVALID or CONFIG_INVALID.
    """
    for source, address in (("--server", flag), ("PUHUI_SERVER", environment.get("PUHUI_SERVER"))):
        if address:
            return _checked(address, source, environment)
    path = config_path(environment)
    return _checked(_read(path).server or DEFAULT_ADDRESS, str(path), environment)


def _read(path: Path) -> Settings:
    try:
        document = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        return Settings()
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise Mistake("CONFIG_INVALID", f"{path} cannot be read: {error}", file=str(path)) from error
    try:
        return Settings.model_validate(document or {})
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "the file"
        raise Mistake(
            "CONFIG_INVALID",
            f"{path}: {field}: {first['msg']}; it may hold `server: HOST:PORT` and nothing else",
            file=str(path),
            field=field,
        ) from error


def _checked(server: str, source: str, environment: Mapping[str, str]) -> str:
    if _ADDRESS.fullmatch(server):
        return server
    local = local_addresses(environment)
    if server not in local:
        names = (
            f", or the name of a local centre that runs: {', '.join(local)}"
            if local
            else "; names stand for centres of `puhui up` where PUHUI_LOCAL_STATE names the --state that they have"
        )
        raise Mistake(
            "ADDRESS_INVALID",
            f"{server!r} (from {source}) is no address; "
            f"write HOST:PORT, such as {DEFAULT_ADDRESS}, or unix:/PATH{names}",
            address=server,
        )
    return local[server]
