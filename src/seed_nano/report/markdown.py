"""Parts of a report in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def show(value: Any) -> str:
    """A table cell: an estimate with its interval, a plain number, or a dash."""
    if isinstance(value, Mapping) and "low" in value:
        if value["value"] is None:
            return "–"
        return f"{value['value']:.3f} ({value['low']:.2f}–{value['high']:.2f}), n {value['n']}"
    if value is None:
        return "–"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows]) + "\n"


def facts(report: Mapping[str, Any], where: str = "") -> str:
    """How a report was measured: command, date, machine (`where`: what of it was used), settings, versions.

    Keys `system` and `judge` are there where a whole system was measured.
    """
    def listed(values: Mapping[str, Any]) -> str:
        return ", ".join(f"{key} {value}" for key, value in values.items() if not isinstance(value, Mapping))

    judge = listed(report.get("judge", {}))
    lines = [f"`{report['command']}`",
             f"{report['date']}, commit {report['commit']}, {report['seconds']} s on {where}"
             + listed(report["hardware"]), "Settings: " + listed({**report["settings"], **report.get("system", {})}),
             f"Judge: {judge}" if judge else "", "Versions: " + listed(report["versions"])]
    return "".join(f"* {line}\n" for line in lines if line)
