"""The model card of a nano system.

    python -m seed_multimodal.evaluation.card --model pretrained/nano --work runs/full

All of it is read from files that the runs wrote: the stages' records and settings in the work folder, the report card,
the data set's manifest.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from seed_multimodal.disk import read_json_object, replace_text, writing
from seed_multimodal.entry import DONE, run_program
from seed_multimodal.errors import DataError
from seed_multimodal.evaluation import machine
from seed_multimodal.weights import count_parameters

STAGES = ("vae", "clip", "stage1", "stage2", "tokenizer", "unet", "unet2", "vae2", "pretrain", "sft")
HIDDEN = ("stage", "steps", "batch_size", "seconds", "parameters", "leg", "checkpoint", "processes", "accumulate",
          "begun")
NEEDED = ("stage", "seconds")


def write_card(model: Path, work: Path, data: Path, command: str, earlier: Sequence[Path] = (),
               note: str = "") -> Path:
    """Write `model/README.md` from the records in `work`, `model/report/report.md` and `data/manifest.json`.

    Args:
        command: how the run was started, as a reader would type it.
        note: what a reader must know about this run, in sentences.
        earlier: work folders of the runs whose weights this one started from; their records are listed first.

    Raises:
        DataError: a stage's record is missing or unreadable.
    """
    run = [stage for stage in STAGES if _file(work, stage).is_file()]
    if not run:
        raise DataError(f"{work}: no stage has left a record (NAME.done.json) in this work folder.")
    skipped = [stage for stage in STAGES if stage not in run]
    records = [_record(_file(work, stage), *NEEDED) for stage in run]
    before = [{**_record(_file(leg, stage), *NEEDED), "leg": number} for number, leg in enumerate(earlier, 1)
              for stage in STAGES if _file(leg, stage).is_file()]
    records = [{**record, **({"leg": len(earlier) + 1} if earlier else {})} for record in records]
    first: dict[tuple[Any, ...], dict[str, Any]] = {}
    for record in [*before, *records]:  # a later run has earlier records, too: each is listed with the run that made it
        first.setdefault((record["stage"], record.get("steps"), record["seconds"]), record)
    text = "\n".join([
        *_opening(model), *_parts_table(model), *_training(list(first.values()), work, command, skipped),
        *([note, ""] if note else []),
        *_data(data), *_report(model), *_limits()])
    file = model / "README.md"
    with writing(file, DataError):
        replace_text(file, text.rstrip() + "\n")
    return file


def _file(work: Path, stage: str) -> Path:
    """A stage's record; those of the LAVIS application lie in a folder of their own."""
    own = work / stage / f"{stage}.done.json"
    return own if own.is_file() else work / f"{stage}.done.json"


def _record(file: Path, *needed: str) -> dict[str, Any]:
    if not file.is_file():
        raise DataError(f"{file}: there is no such record.")
    record = read_json_object(file, DataError)
    missing = next((key for key in needed if key not in record), None)
    if missing is not None:
        raise DataError(f"{file}: an incomplete record: it has no key {missing!r}.")
    return record


def _opening(model: Path) -> list[str]:
    weights = sum(file.stat().st_size for file in model.rglob("*.safetensors")) / 1e6
    return ["# SEED nano", "",
            "The smallest complete SEED system: 64 px pictures of emoji-like drawings become 32 codes, a small LLaMA "
            "reads and writes them, and an unCLIP decoder draws them again. Trained from scratch by the script in this "
            "repository; it knows nothing about photographs.", "",
            f"Weights: {weights:.1f} MB of float16 safetensors. Licence: Apache-2.0 (the pictures it learned from: "
            "`data/nano64/NOTICE.md`).", ""]


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
        measured = ", ".join(f"{key} {value}" for key, value in record.items() if key not in HIDDEN)
        name = f"{record['stage']} (leg {record['leg']})" if "leg" in record else record["stage"]
        amount = f"{record['steps']} × {record['batch_size']}" if "steps" in record else "–"
        lines.append(f"| {name} | {amount} | {record['seconds']:.0f} | "
                     f"{record.get('parameters', 0):,} | {measured} |")
    settings = (work / "config.yaml").read_text(encoding="utf-8") if (work / "config.yaml").is_file() else ""
    if skipped:
        lines += ["", f"Not run: {', '.join(skipped)}."]
    return [*lines, "", "<details><summary>Resolved settings</summary>", "", "```yaml", settings.rstrip(), "```", "",
            "</details>", ""]


def _data(data: Path) -> list[str]:
    manifest = _record(data / "manifest.json", "counts", "records", "size", "styles")
    counts = manifest["counts"]["pictures"]
    return ["## Data", "", f"`{data.name}`: {manifest['records']} drawings at {manifest['size']} px in the styles "
            f"{', '.join(manifest['styles'])} ({', '.join(f'{k} {v}' for k, v in counts.items())}). Trained on `train` "
            "only; the judge, a measuring instrument, saw all splits. "
            "Artwork, rendered: Twemoji (© Twitter, Inc. and other contributors, CC BY 4.0), Noto Emoji (Google, "
            "Apache-2.0), Fluent Emoji (Microsoft, MIT); words: emojibase (MIT) from Unicode CLDR (Unicode License "
            "v3). Full notices: `data/nano64/NOTICE.md`.", ""]


def _report(model: Path) -> list[str]:
    file = model / "report" / "report.md"
    if not file.is_file():
        return ["## Report", "", "Not measured yet.", ""]
    lines = file.read_text(encoding="utf-8").splitlines()
    shifted = [f"#{line}" if line.startswith("#") else line for line in lines]
    local = [line.replace("](", "](report/") if "](http" not in line else line for line in shifted]
    return [*local, ""]


def _limits() -> list[str]:
    return ["## Limits", "", "Knows about 1,500 things in three drawing styles; names of things it has not seen are "
            "guesses. English only. Pictures are 64 px and blurred by the 32-code bottleneck. Not for any decision "
            "about people.", ""]


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the card; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m seed_multimodal.evaluation.card", description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("pretrained/nano"))
    parser.add_argument("--work", type=Path, default=Path("runs/full"), help="the work folder of the speed run")
    parser.add_argument("--data", type=Path, default=Path("data/nano64"))
    parser.add_argument("--command", default="bash scripts/nano_speedrun.sh", help="how the run was started")
    parser.add_argument("--earlier", type=Path, nargs="*", default=[], help="work folders of the runs it started from")
    parser.add_argument("--note", default="", help="what a reader must know about this run")

    def work(options: argparse.Namespace) -> int:
        file = write_card(options.model, options.work, options.data, options.command, options.earlier, options.note)
        print(f"Wrote {file}.")
        return DONE

    return run_program(parser, work, arguments, "card")


if __name__ == "__main__":
    raise SystemExit(main())
