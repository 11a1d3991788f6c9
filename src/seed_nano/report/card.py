"""The model card of a trained system: its parts, the records of its stages, its settings and its report.

    python -m seed_nano.report.card --model pretrained/nano --work runs/nano
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from seed_multimodal.disk import read_json_object, writing
from seed_multimodal.entry import DONE, run_program
from seed_multimodal.errors import DataError
from seed_multimodal.evaluation import machine
from seed_multimodal.weights import count_parameters
from seed_nano.report.write import table

HIDDEN = ("stage", "steps", "batch_size", "seconds", "parameters", "checkpoint", "processes", "accumulate", "begun",
          "adapter", "pixels", "samples_per_step", "data")
CARD = """\
---
license: apache-2.0
library_name: seed_multimodal
language: en
---

# {name}

Scenes of emoji-like things: images become tokens, a small LLaMA reads and writes them. Trained from scratch on scenes
made as they are needed; knows nothing about photographs. English only; not for decisions about people. Artwork:
`data/nano/NOTICE.md`.

{note}

{weights}
## Training

Commit `{commit}`.

{stages}
```yaml
{settings}
```

{report}"""


def write_card(model: Path, work: Path, note: str = "") -> Path:
    """Write `model/README.md`; `note`: what a reader must know about this run. Raises DataError: no records."""
    files = sorted([*work.glob("*.done.json"), *work.glob("*/*.done.json"), *work.glob("*/summary.json")],
                   key=lambda file: file.stat().st_mtime)
    if not files:
        raise DataError(f"{work}: no stage has left a record (NAME.done.json) in this work folder.")
    weights = [(f"`{file.parent.relative_to(model)}`", f"{count_parameters(file):,}",
                f"{file.stat().st_size / 1e6:.2f}") for file in sorted(model.rglob("*.safetensors"))]
    stages = [_row({"stage": file.parent.name, **read_json_object(file, DataError)}) for file in files]
    report = re.sub("^#", "##", _text(model / "report" / "report.md"), flags=re.MULTILINE).replace("](", "](report/")
    with writing(model / "README.md", DataError):
        ModelCard(CARD.format(
            name=model.resolve().name, note=note, weights=table(("part", "parameters", "MB"), weights),
            commit=machine.commit(), settings=_text(work / "config.yaml").rstrip(), report=report,
            stages=table(("stage", "steps × batch", "seconds", "measured at its end"), stages),
        )).save(model / "README.md")
    return model / "README.md"


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8") if file.is_file() else ""


def _row(record: Mapping[str, Any]) -> tuple[str, ...]:
    batch = record.get("batch_size", record.get("samples_per_step", "packed rows"))
    return (str(record["stage"]), f"{record['steps']} × {batch}" if "steps" in record else "–",
            f"{record.get('seconds', 0):.0f}", ", ".join(
                f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
                for key, value in record.items() if key not in HIDDEN))


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the card; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m seed_nano.report.card", description="Write a model card.")
    parser.add_argument("--model", type=Path, default=Path("pretrained/nano"))
    parser.add_argument("--work", type=Path, required=True, help="the run's work folder")
    parser.add_argument("--note", default="", help="what a reader must know about this run")

    def work(options: argparse.Namespace) -> int:
        print(f"Wrote {write_card(options.model, options.work, options.note)}.")
        return DONE

    return run_program(parser, work, arguments, "card")


if __name__ == "__main__":
    raise SystemExit(main())
