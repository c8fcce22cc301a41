"""How a report is shown: a table for people, one object for programs."""

from __future__ import annotations

import json
import textwrap
from typing import IO

from rich.console import Console
from rich.text import Text

from nodedaemon.doctor.examination import Report
from nodedaemon.doctor.findings import Level

__all__ = ["as_json", "print_table"]

_STYLES = {Level.OK: "green", Level.NOTICE: "yellow", Level.PROBLEM: "bold red", Level.UNKNOWN: "magenta"}
_PLAIN_WIDTH = 120
_LEAST_WIDTH = 40
_MARGIN = " " * 26


def as_json(report: Report) -> str:
    """Returns a report as one JSON object."""
    return json.dumps(
        {
            "can_serve": report.verdict.can_serve,
            "verdict": report.verdict.text,
            "emulated": report.emulated,
            "findings": [
                {
                    "section": section.title,
                    "check": finding.check,
                    "level": finding.level,
                    "text": finding.text,
                    "command": finding.command,
                    "needed_for": list(finding.needed_for),
                }
                for section in report.sections
                for finding in section.findings
            ],
        },
        indent=2,
        ensure_ascii=False,
    )


def print_table(report: Report, file: IO[str]) -> None:
    """Writes a report for a person; in colour only to a terminal."""
    console = Console(file=file, highlight=False, no_color=None if file.isatty() else True)
    width = (console.width if file.isatty() else _PLAIN_WIDTH) - len(_MARGIN)
    for section in report.sections:
        console.print(Text(section.title, style="bold"))
        for finding in section.findings:
            line, *more = textwrap.wrap(finding.text, max(width, _LEAST_WIDTH), break_on_hyphens=False)
            row = Text(f"{finding.level.value:9}", style=_STYLES[finding.level])
            console.print(row.append(f"{finding.check:16} {line}", style="default"), soft_wrap=True)
            for line in more:
                console.print(Text(_MARGIN + line), soft_wrap=True)
            if finding.command:
                # Never broken over lines, so that it can be copied.
                console.print(Text(_MARGIN).append(f"→ {finding.command}", style="cyan"), soft_wrap=True)
        console.print()
    style = "bold green" if report.verdict.can_serve else "bold red"
    console.print(Text(report.verdict.text, style=style), soft_wrap=True)
