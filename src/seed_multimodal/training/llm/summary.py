"""The readable results of a run: its resolved configuration, and at the end a summary with the data it used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from seed_multimodal.data.stream.mixture import add_counts
from seed_multimodal.disk import disk_reason, replace_text
from seed_multimodal.errors import CheckpointError


def save_config(home: Path, config: Mapping[str, Any]) -> None:
    """Write the resolved configuration into the output folder.

    Raises:
        CheckpointError: the folder cannot be made or written.
    """
    from omegaconf import OmegaConf

    try:
        home.mkdir(parents=True, exist_ok=True)
        replace_text(home / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(dict(config))))
    except OSError as error:
        raise CheckpointError(f"{home}: the output folder cannot be written: {disk_reason(error)}.") from error


def join_reports(reports: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The data reports of all processes (`LlmBatches.report`) as one: counts added, the first named records kept."""
    joined: dict[str, Any] = {"tokens": 0, "positions": 0, "sources": {}}
    for report in reports:
        joined["tokens"] += report["tokens"]
        joined["positions"] += report["positions"]
        for name, source in report["sources"].items():
            into = joined["sources"].setdefault(name, {"sequences": 0, "tokens": 0, "epochs": 0.0, "skipped": {},
                                                       "too_long": {}})
            add_counts(into, source)
    joined["fill"] = joined["tokens"] / joined["positions"] if joined["positions"] else 1.0
    return joined


def summary_lines(record: Mapping[str, Any]) -> list[str]:
    """The summary at the end of a run: steps, tokens, sources, skipped records, output folder."""
    data = record["data"]
    lines = [f"{record['steps']} steps in {record['seconds']:.0f} s, {record['tokens']:,.0f} tokens in "
             f"{data['fill'] * 100:.1f} % filled rows; the last loss was {record['loss']:.4g}."
             if record.get("loss") is not None else f"{record['steps']} steps in {record['seconds']:.0f} s; no log "
             "line was due (trainer.logging_steps)."]
    for name, source in data["sources"].items():
        lines.append(f"  {name}: {source['sequences']:,} sequences, {source['tokens']:,} tokens, "
                     f"{source['epochs']:.2f} epochs")
        for group, words in (("skipped", "skipped"), ("too_long", "too long")):
            for reason, entry in source[group].items():
                where = "; ".join(entry["first"])
                lines.append(f"    {entry['count']:,} {words} ({reason}): {where}"
                             f"{' …' if entry['count'] > len(entry['first']) else ''}")
        if not source["sequences"]:
            lines.append("    warning: nothing of it was used; " + (
                "see the records above" if source["skipped"] or source["too_long"] else "it was not drawn"))
    lines.append(f"  checkpoint: {record['checkpoint']}")
    return lines
