"""The model card of nano, nano-x or nano-lavit.

    python -m seed_nano.report.card --model pretrained/nano --work runs/full

All of it is read from files that the runs wrote: the stages' records and settings in the work folder, the report card,
the data set's manifest.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from seed_multimodal.disk import read_json_object, replace_text, writing
from seed_multimodal.entry import DONE, run_program
from seed_multimodal.errors import DataError
from seed_multimodal.evaluation import machine
from seed_multimodal.hub import locate_system
from seed_multimodal.systems.open_system import kind_of
from seed_multimodal.weights import count_parameters
from seed_nano.world.splits import SHARES
from seed_nano.world.things import HELD_OUT, NAMES

HIDDEN = ("stage", "steps", "batch_size", "seconds", "parameters", "checkpoint", "processes", "accumulate", "begun",
          "adapter", "pixels", "samples_per_step", "data")
NEEDED = ("stage", "seconds")


@dataclass(frozen=True)
class Line:
    """A line of trainings and what it makes."""

    title: str
    about: str  # after the size of its pictures
    stages: tuple[str, ...]
    script: str = "nano_speedrun.sh"
    work: str = "runs/full"


LINES = {
    "seed_llama": Line(
        "SEED nano", "The smallest complete SEED system: a {side}picture of a scene of emoji-like drawings becomes 32 "
        "codes, a small LLaMA reads and writes them among its words, and an unCLIP decoder draws them again.",
        ("vae", "clip", "stage1", "stage2", "tokenizer", "unet", "unet2", "pretrain", "sft", "judge")),
    "seed_x": Line(
        "SEED nano-x", "A tiny SEED-X: a small LLaMA reads and writes {side}pictures of scenes of emoji-like drawings "
        "as features, finds things by boxes and edits with the picture at hand, through an SDXL-class decoder.",
        ("tower", "layout", "first", "second", "sft"), "nano_x_speedrun.sh",
        "runs/nano_x-full"),
    "lavit": Line(
        "LaVIT nano", "A tiny LaVIT: a {side}picture of a scene of emoji-like drawings becomes as many tokens as there "
        "is to see, a small LLaMA reads them and writes them, and an SDXL-class decoder draws them again, in two "
        "ratios.", ("reader", "tokenizer", "narrow", "layout", "pixels", "language"), "nano_lavit_speedrun.sh",
        "runs/nano_lavit-full"),
}


def write_card(model: Path, work: Path | None, data: Path, command: str = "", note: str = "") -> Path:
    """Write `model/README.md` from the records in `work`, `model/report/report.md` and `data/manifest.json`.

    Args:
        model: the system's folder, or the name of one that ships.
        work: of the run; None: where the system's own script works.
        command: how the run was started, as a reader would type it; "": by that script.
        note: what a reader must know about this run, in sentences.

    Raises:
        DataError: a stage's record is missing or unreadable.
    """
    model, line = locate_system(model) or model, LINES[kind_of(model)]
    work, command = work or Path(line.work), command or f"bash scripts/{line.script}"
    run = [stage for stage in line.stages if _file(work, stage).is_file()]
    if not run:
        raise DataError(f"{work}: no stage has left a record (NAME.done.json) in this work folder.")
    records = [_record_of(_file(work, stage), stage) for stage in run]
    skipped = [stage for stage in line.stages if stage not in run]
    text = "\n".join([
        *_opening(model, line), *_parts_table(model), *_training(records, work, command, skipped),
        *([note, ""] if note else []), *_data(data), *_report(model), *_limits()])
    file = model / "README.md"
    with writing(file, DataError):
        replace_text(file, text.rstrip() + "\n")
    return file


def _system(model: Path) -> dict[str, Any]:
    file = model / "system.json"
    return read_json_object(file, DataError) if file.is_file() else {}


def _file(work: Path, stage: str) -> Path:
    """A stage's record; those of the applications lie in folders of their own."""
    own = (work / stage / name for name in (f"{stage}.done.json", "summary.json"))
    return next((file for file in own if file.is_file()), work / f"{stage}.done.json")


def _record_of(file: Path, stage: str) -> dict[str, Any]:
    if file.name != "summary.json":
        return _record(file, *NEEDED)
    record = _record(file, "seconds")
    return {**record, "stage": stage, "batch_size": record.get("samples_per_step", "packed rows")}


def _record(file: Path, *needed: str) -> dict[str, Any]:
    if not file.is_file():
        raise DataError(f"{file}: there is no such record.")
    record = read_json_object(file, DataError)
    missing = next((key for key in needed if key not in record), None)
    if missing is not None:
        raise DataError(f"{file}: an incomplete record: it has no key {missing!r}.")
    return record


def _opening(model: Path, line: Line) -> list[str]:
    weights = sum(file.stat().st_size for file in model.rglob("*.safetensors")) / 1e6
    side = _system(model).get("image_size")
    about = line.about.format(side=f"{side} px " if side else "")
    return [f"# {line.title}", "", f"{about} Trained from scratch by the script in this repository on scenes that are "
            "made as they are needed; it knows nothing about photographs.", "",
            f"Weights: {weights:.1f} MB of float16 safetensors. Licence: Apache-2.0 (the drawings it learned from: "
            "`data/nano/NOTICE.md`).", ""]


def _parts_table(model: Path) -> list[str]:
    lines = ["| part | parameters | MB |", "| --- | ---: | ---: |"]
    for file in sorted(model.rglob("*.safetensors")):
        size = file.stat().st_size / 1e6
        lines.append(f"| `{file.parent.relative_to(model)}` | {count_parameters(file):,} | {size:.2f} |")
    return [*lines, ""]


def _training(records: list[dict[str, Any]], work: Path, command: str, skipped: list[str]) -> list[str]:
    facts = machine.hardware("cuda" if torch.cuda.is_available() else "cpu")
    found = machine.versions()
    total = sum(r["seconds"] for r in records)
    lines = ["## Training", "", f"Command: `{command}` (settings as resolved below). Commit: `{machine.commit()}`. "
             f"Hardware: {facts['cpu']}, {facts['cores']} cores, {facts['memory_gib']} GiB, "
             f"{facts.get('gpu', 'no GPU')}. Versions: {', '.join(f'{k} {v}' for k, v in found.items())}. "
             f"Sum of the stages: {total / 60:.0f} minutes (some ran side by side, one core each).", "",
             "| stage | steps × batch | seconds | parameters | measured at its end |",
             "| --- | --- | ---: | ---: | --- |"]
    for record in records:
        measured = ", ".join(_said(key, value) for key, value in record.items() if key not in HIDDEN and value != {})
        amount = f"{record['steps']} × {record['batch_size']}" if "steps" in record else "–"
        parameters = f"{record['parameters']:,}" if "parameters" in record else "–"
        lines.append(f"| {record['stage']} | {amount} | {record['seconds']:.0f} | {parameters} | {measured} |")
    settings = (work / "config.yaml").read_text(encoding="utf-8") if (work / "config.yaml").is_file() else ""
    if skipped:
        lines += ["", f"Not run: {', '.join(skipped)}."]
    return [*lines, "", "<details><summary>Resolved settings</summary>", "", "```yaml", settings.rstrip(), "```", "",
            "</details>", ""]


def _said(key: str, value: Any) -> str:
    if isinstance(value, Mapping):
        return f"{key}: " + " / ".join(_said(str(inner), part) for inner, part in value.items())
    if isinstance(value, float):
        value = f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"
    return f"{key} {value}"


def _data(data: Path) -> list[str]:
    manifest = _record(data / "manifest.json", "things", "styles", "sources")
    shares = ", ".join(f"{split} {share:.0%}" for split, share in SHARES.items())
    artwork = "; ".join(f"{source['credit']} ({source['licence']})" for source in manifest["sources"])
    return ["## Data", "", f"`{data.name}`: scenes of {manifest['things']} things in the styles "
            f"{', '.join(manifest['styles'])}, of which {len(HELD_OUT)} things are never trained on; held out by hash, "
            f"too: {shares} of all scenes, pairs of things, things on a background, things in a number and things in a "
            "style. Every training sample is a function of (seed, number); nothing held out is trained on in any form "
            "(`python -m seed_nano.world check`). The judge, a measuring instrument, saw all of it. Artwork, "
            f"rendered: {artwork}. Full notices: `data/nano/NOTICE.md`.", ""]


def _report(model: Path) -> list[str]:
    file = model / "report" / "report.md"
    if not file.is_file():
        return ["## Report", "", "Not measured yet.", ""]
    lines = file.read_text(encoding="utf-8").splitlines()
    shifted = [f"#{line}" if line.startswith("#") else line for line in lines]
    local = [line.replace("](", "](report/") if "](http" not in line else line for line in shifted]
    return [*local, ""]


def _limits() -> list[str]:
    return ["## Limits", "", f"Knows {len(NAMES)} things in three drawing styles, ten backgrounds and eight layouts, "
            "and the sentences about them; a thing it has never seen it can only rebuild roughly. English only. Not "
            "for any decision about people.", ""]


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the card; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m seed_nano.report.card", description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("pretrained/nano"))
    parser.add_argument("--work", type=Path, help="the work folder of the speed run (default: that of the system's own "
                        "script, runs/full of nano)")
    parser.add_argument("--data", type=Path, default=Path("data/nano"))
    parser.add_argument("--command", default="", help="how the run was started (default: by the system's own script)")
    parser.add_argument("--note", default="", help="what a reader must know about this run")

    def work(options: argparse.Namespace) -> int:
        file = write_card(options.model, options.work, options.data, options.command, options.note)
        print(f"Wrote {file}.")
        return DONE

    return run_program(parser, work, arguments, "card")


if __name__ == "__main__":
    raise SystemExit(main())
