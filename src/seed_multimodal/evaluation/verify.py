"""`seed verify`: what a model computes of fixed inputs, compared with a reference.

Codes, captions, answers and drawings, greedy and from seed 0, and checksums of the weights. Results
that may differ between processors are compared within a tolerance: codes by their equal share,
features by their values, drawings by thumbnails. A text is equal or not.
"""

from __future__ import annotations

import base64
import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from seed_multimodal.device import peak_memory_mib
from seed_multimodal.disk import JsonObject
from seed_multimodal.errors import (
    CheckpointError,
    CodesError,
    ConfigError,
    GenerationError,
    RequestError,
)
from seed_multimodal.evaluation.machine import circumstances
from seed_multimodal.pipelines.base import MultimodalSystem
from seed_multimodal.pipelines.config import SystemConfig
from seed_multimodal.weights.catalogue import WEIGHT_SUFFIXES, weight_files
from seed_multimodal.weights.fetch import file_sha256
from seed_multimodal.weights.find import portable_path

REFERENCE = "verify.json"  # in a system's folder
IMAGES = ("cat.jpg", "fox_and_snowman.png")
QUESTION = "What is on the left?"
CAPTION = "a fox left of a tree"
# What a system cannot do is a result, too.
INABILITIES = (CheckpointError, CodesError, ConfigError, GenerationError, RequestError)
CHECKED_SUFFIXES = (*WEIGHT_SUFFIXES, ".ckpt", ".model")
# Kind of a result → the largest mean difference between processors, and its unit.
TOLERANCES = {
    "codes": (0.1, "of the codes"),
    "features": (0.02, "of the deviation on average"),
    "thumbnail": (4.0, "of 255 between thumbnails"),
}
THUMBNAIL = 16  # pixels a side
N_FEATURES = 64  # that are recorded, evenly spaced


@dataclass(frozen=True)
class Check:
    """One row of the table.

    value: what is recorded and compared.
    text: how it is shown.
    """

    name: str
    value: JsonObject
    text: str
    seconds: float


# ---- what is computed


def run_checks(system: MultimodalSystem, images_folder: Path) -> list[Check]:
    """All rows of a system; `images_folder` has the repository's demo images."""
    checks = weight_checks(system.config)
    greedy = {"seed": 0, "do_sample": False, "num_beams": 1}
    encoded = _codes if system.abilities.draws_codes else _features
    for image in (images_folder / name for name in IMAGES):
        checks += [
            _check(f"codes of {image.name}", encoded, system.images.encode, [image]),
            _check(f"caption of {image.name}", _text, system.describe, image, **greedy),
        ]
    return [
        *checks,
        _check(f"{image.name}: {QUESTION}", _text, system.ask, image, QUESTION, **greedy),
        _check(f"reconstruction of {image.name}", _image, system.reconstruct, image, seed=0),
        _check(f"drawing of “{CAPTION}”", _image, system.draw, [CAPTION], **greedy),
    ]


def _check(
    name: str,
    record: Callable[[Any], tuple[JsonObject, str]],
    compute: Callable[..., Any],
    *arguments: object,
    **options: object,
) -> Check:
    """A row with its time; what the system cannot do becomes its value."""
    started = time.perf_counter()
    try:
        value, text = record(compute(*arguments, **options))
    except INABILITIES as error:
        value = {"error": type(error).__name__}
        text = str(error)
    return Check(name, value, text, time.perf_counter() - started)


def weight_checks(config: SystemConfig) -> list[Check]:
    """Checksums of the weights of each part that is on this disk."""
    checks: list[Check] = []
    for key, part in config.parts().items():
        path: Path | None = getattr(config, key)
        if path is None:
            continue
        files = weight_files(path, CHECKED_SUFFIXES)
        if files:
            checks.append(_check(f"weights: {part.label}", _checksum, sorted, files))
    return checks


def _checksum(files: list[Path]) -> tuple[JsonObject, str]:
    """One checksum of the names and contents of some files."""
    digest = hashlib.sha256()
    n_bytes = 0
    for file in files:
        digest.update(f"{file.name} {file_sha256(file)}\n".encode())
        n_bytes += file.stat().st_size
    sha256 = digest.hexdigest()
    return {"sha256": sha256, "bytes": n_bytes}, f"`{sha256[:12]}`, {n_bytes / 1e6:,.1f} MB"


def _codes(encoded: Sequence[Tensor]) -> tuple[JsonObject, str]:
    codes = encoded[0].flatten().tolist()
    digest = hashlib.sha256(" ".join(map(str, codes)).encode()).hexdigest()
    return {"codes": codes}, f"`{digest[:12]}`: {len(codes)} codes, {codes[0]} {codes[1]} …"


def _features(encoded: Sequence[Tensor]) -> tuple[JsonObject, str]:
    """Evenly spaced values of features, and their spread."""
    features = encoded[0]
    flat = features.detach().float().cpu().flatten()
    step = max(1, len(flat) // N_FEATURES)
    values = [round(value, 5) for value in flat[::step][:N_FEATURES].tolist()]
    shape = list(features.shape)
    value = {"features": values, "std": round(float(flat.std()), 5), "shape": shape}
    return value, f"features {shape}, deviation {value['std']:.3f}"


def _text(text: str) -> tuple[JsonObject, str]:
    return {"text": text}, f"“{text}”"


def _image(images: Sequence[Image.Image]) -> tuple[JsonObject, str]:
    """Checksum of the pixels, size and thumbnail."""
    image = images[0]
    pixels = image.convert("RGB")
    digest = hashlib.sha256(pixels.tobytes()).hexdigest()
    small = pixels.resize((THUMBNAIL, THUMBNAIL))
    value = {
        "sha256": digest,
        "size": list(image.size),
        "thumbnail": base64.b64encode(small.tobytes()).decode(),
    }
    return value, f"`{digest[:12]}`, {image.width} x {image.height}"


# ---- comparison


def compare(value: JsonObject, reference: JsonObject | None) -> str:
    """`equal`, `close: …` or `differs: …`; `none` without a reference."""
    if reference is None:
        return "none"
    if value == reference:
        return "equal"
    now, before = map(_size, (value, reference))
    for kind, (limit, unit) in TOLERANCES.items():
        if kind in value and kind in reference and now == before:
            error = _difference(kind, value[kind], reference[kind]) / reference.get("std", 1.0)
            verdict = "close" if error <= limit else "differs"
            return f"{verdict}: {error:.3g} {unit} (limit {limit:g})"
    return f"differs: “{reference['text']}”" if "text" in reference else "differs"


def _size(value: JsonObject) -> tuple[object, ...]:
    """Number of codes, shape of features, size of an image."""
    return len(value.get("codes", ())), value.get("shape"), value.get("size")


def _difference(kind: str, value: Any, reference: Any) -> float:
    """The mean difference of two results of one size; codes are equal or not."""
    if kind == "codes":
        return float(np.not_equal(value, reference).mean())
    if kind == "thumbnail":
        value, reference = (list(base64.b64decode(content)) for content in (value, reference))
    return float(np.abs(np.subtract(value, reference)).mean())


# ---- report


def report(
    system: MultimodalSystem, checks: list[Check], reference: Mapping[str, JsonObject]
) -> tuple[JsonObject, str, int]:
    """Record of a run, its table in Markdown, and the number of rows that differ.

    reference: values by name; rows that it lacks are compared with nothing.
    """
    # 1. The rows.
    lines = ["| check | result | reference | seconds |", "| --- | --- | --- | --- |"]
    n_differing = 0
    for check in checks:
        verdict = compare(check.value, reference.get(check.name))
        n_differing += verdict.startswith("differs")
        cells = [check.name, check.text, verdict, f"{check.seconds:.1f}"]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")

    # 2. What they were computed with.
    name = system.config.name
    if not system.config.found.original:
        name = portable_path(name)
    device = system.images.device
    conditions = circumstances(device)
    record: JsonObject = {
        "model": name,
        "device": str(device),
        "dtype": str(next(system.images.model.parameters()).dtype).removeprefix("torch."),
        "hardware": conditions["hardware"],
        "versions": conditions["versions"],
        "checks": {check.name: check.value for check in checks},
    }
    details = [
        f"{key} {value}" for part in ("hardware", "versions") for key, value in record[part].items()
    ]
    lines += [
        "",
        f"{name} on {device}, {record['dtype']}; peak memory "
        f"{peak_memory_mib(device) / 1024:.1f} GiB; {', '.join(details)}; "
        f"commit {conditions['commit'][:12]}, {conditions['date']}.",
    ]
    return record, "\n".join(lines), n_differing
