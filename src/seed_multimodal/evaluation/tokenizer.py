"""Evaluation of a SEED-2 tokenizer: retrieval, reconstruction, codebook use, contact sheet (`seed eval tokenizer`).

Retrieval (`ROUTES`) is measured with features before quantization and from codes; the difference is due to the
codebook. Writes report.json, reconstructions.jpg, and a line per retrieval to evaluate.txt (LAVIS's names).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from seed_multimodal.data.formats.pairs import Pairs
from seed_multimodal.data.formats.record import RECORD_FAULTS
from seed_multimodal.device import Runtime
from seed_multimodal.disk import atomic_open, replace_text, writable_folder, writing
from seed_multimodal.errors import CheckpointError, ConfigError, DataError
from seed_multimodal.evaluation.metrics import bootstrap, codebook_statistics, plain
from seed_multimodal.evaluation.retrieval import (
    TextEncoder,
    clip_texts,
    load_stage1,
    ranks,
    retrieval,
    stage1_texts,
)
from seed_multimodal.hub import locate
from seed_multimodal.images.io import open_image
from seed_multimodal.images.sheet import Cell, Row, contact_sheet
from seed_multimodal.images.transforms import denormalise, get_transform
from seed_multimodal.seed.checkpoints import CLIP_FOLDER, load_clip_vision
from seed_multimodal.seed.pipeline import SeedImageCodec, load_images
from seed_multimodal.seed.training import Stage1Model
from seed_multimodal.system.config import SystemConfig
from seed_multimodal.system.images import Placement

Log = Callable[[str], None]
Place = str | Path | None
MAX_BAD_IN_A_ROW = 20
BERT = Path("pretrained/bert-base-uncased")
SHOWN, COLUMNS, CELL = 24, 8, 96  # of the contact sheet
ROUTES = {  # name → features of `Pass`, text encoder, description
    "causal_embeddings": ("causal", "stage1", "last query of the Q-Former, before the codes"),
    "codes_by_blocks": ("rebuilt", "stage1", "codes, queries rebuilt by stage 2's blocks"),
    "codes_by_embedding": ("decoded", "clip", "codes, decoded image embedding"),
    "images_by_clip": (
        "target",
        "clip",
        "the images under CLIP, what the decoded embedding aims at",
    ),
}


@dataclass
class OpenedTokenizer:
    """A loaded tokenizer with the models for its evaluation."""

    codec: SeedImageCodec
    clip: Any = None  # frozen CLIP vision encoder that gives the target embedding
    clip_transform: Any = None
    clip_source: str = ""
    stage1: Stage1Model | None = None
    texts: dict[str, TextEncoder] = field(default_factory=dict)  # "stage1", "clip"


def open_tokenizer(
    model: str | Path,
    runtime: Runtime,
    *,
    decoder: Place = None,
    clip: Place = None,
    stage1: Place = None,
    clip_text: Place = None,
    text_tokenizer: Place = None,
) -> OpenedTokenizer:
    """Load a system's or a separate tokenizer, with the models for its evaluation.

    Args:
        model: see `SystemConfig.find`. clip: CLIP folder of the target embedding; default: the decoder's
            `image_encoder`, else the original one. "none" leaves decoder or clip out.
        stage1: stage-1 checkpoint with the text path. clip_text: CLIP folder with a text encoder.
        text_tokenizer: word pieces of stage 1; default: those in the tokenizer's folder, else bert-base-uncased.

    Raises:
        CheckpointError: no such tokenizer, or a missing or mismatched part.
    """
    parts = SystemConfig.find(model)
    if parts.system != "seed_llama":
        raise CheckpointError(
            f"{model}: is a {parts.system}; this measures SEED-2's kind of tokenizer."
        )
    parts.require("tokenizer")
    assert parts.tokenizer is not None
    drawing = (
        parts.detokenizer if decoder is None else None if str(decoder) == "none" else Path(decoder)
    )
    codec = load_images(replace(parts, detokenizer=drawing), Placement(runtime, runtime, runtime))
    if not hasattr(codec.model.config, "image_features_dim"):
        raise CheckpointError(f"{model}: is a SEED-1 tokenizer; this measures SEED-2's.")
    opened, width = OpenedTokenizer(codec), codec.model.config.image_features_dim
    inside = drawing / "image_encoder" if drawing is not None else None
    usual = (
        inside
        if inside is not None and (inside / "config.json").is_file()
        else locate(f"pretrained/{CLIP_FOLDER}")
    )
    target = usual if clip is None else None if str(clip) == "none" else Path(clip)
    if target is not None:
        opened.clip = load_clip_vision(target, device=runtime.device, dtype=runtime.dtype, log=None)
        _check_width(target, "image", opened.clip.config.projection_dim, width)
        opened.clip_source, size = str(target), opened.clip.config.image_size
        opened.clip_transform = get_transform(**{**parts.transform, "image_size": size})
    if stage1 is not None:
        own = Path(parts.tokenizer, "tokenizer.model").is_file()
        words = parts.tokenizer if own else BERT if BERT.is_dir() else BERT.name
        opened.stage1 = load_stage1(stage1, codec.model)
        opened.texts["stage1"] = stage1_texts(opened.stage1, text_tokenizer or words)
    if clip_text is not None:
        opened.texts["clip"] = clip_texts(clip_text, runtime.device)
        _check_width(clip_text, "text", opened.texts["clip"](["a"]).shape[1], width)
    return opened


def _check_width(place: str | Path, what: str, has: int, needs: int) -> None:
    if has != needs:
        raise CheckpointError(
            f"{place}: gives {what} embeddings of width {has}, this tokenizer decodes to width "
            f"{needs}: they do not belong together."
        )


def evaluate_tokenizer(
    source: Pairs,
    opened: OpenedTokenizer,
    out: str | Path,
    facts: Mapping[str, Any],
    *,
    limit: int | None = None,
    rebuild: int = 128,
    batch: int = 64,
    seed: int = 0,
    log: Log = print,
) -> dict[str, Any]:
    """Evaluate, write to `out`, and return the report, which starts with `facts`, as JSON values.

    Args:
        limit: images, drawn by `seed` (None: all). rebuild: how many of them are rebuilt as images.

    Raises:
        DataError: see `run_pass`. ConfigError: the folder cannot be written.
    """
    folder = writable_folder(out, ConfigError)
    rows = np.random.default_rng(seed).permutation(len(source))[:limit].tolist()
    seen = run_pass(source, rows, opened, batch=batch, log=log)
    rebuilt: list[Image.Image] = []
    if rebuild and opened.codec.can_draw:
        codes = torch.from_numpy(seen.features["codes"][:rebuild])
        rebuilt = opened.codec.draw(codes, seeds=[seed] * len(codes), batch_size=min(batch, 32))
    report: dict[str, Any] = plain(
        {
            **facts,
            "n": len(seen.rows),
            "captions": sum(map(len, seen.captions)),
            "left_out": seen.bad,
            "retrieval": _retrieval(seen, opened),
            "reconstruction": _reconstruction(seen, rebuilt, opened),
            "codes": codebook_statistics(
                seen.features["codes"], opened.codec.model.config.codebook_size
            ),
        }
    )
    lines = [
        {
            "features": name,
            "route": route["route"],
            "model": report.get("model"),
            "n": route["n"],
            **route["lavis"],
        }
        for name, route in report["retrieval"].items()
    ]
    with writing(folder, ConfigError):
        replace_text(
            folder / "report.json", json.dumps(report, indent=1, ensure_ascii=False) + "\n"
        )
        with atomic_open(folder / "reconstructions.jpg") as file:
            _sheet(source, seen, rebuilt).save(file, "JPEG", quality=88)
        with open(folder / "evaluate.txt", "a", encoding="utf-8") as handle:
            handle.writelines(json.dumps(line) + "\n" for line in lines)
    return report


# ---- one pass over the images


@dataclass
class Pass:
    """Values computed once per image; row i of each array is image i.

    Attributes:
        features: codes [N, 32]; unit features decoded [N, E] (from the codes), target [N, E] (CLIP), causal and
            rebuilt [N, P] (last query under stage 1, before the codes and from them); mse [N] of decoded and target
            before they are normalised.
    """

    rows: list[int] = field(default_factory=list)  # indices in the source
    captions: list[list[str]] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)  # errors of unusable samples
    features: dict[str, NDArray[Any]] = field(default_factory=dict)


def run_pass(
    source: Pairs,
    rows: Sequence[int],
    opened: OpenedTokenizer,
    *,
    batch: int = 64,
    log: Log = print,
) -> Pass:
    """Encode the images `rows` of `source` in batches.

    Raises:
        DataError: no usable sample, too many consecutive unusable ones, or non-finite numbers.
    """
    seen, done = Pass(), 0
    for images in read_images(source, rows, batch, seen, log):
        for name, value in _features(images, opened).items():
            found = value.cpu().numpy()
            if not np.isfinite(found).all():
                raise DataError(
                    f"{source.key(seen.rows[done])} or the images after it: {name!r} holds numbers that "
                    "are not finite; the weights are damaged, or need a wider --dtype."
                )
            if (
                name not in seen.features
            ):  # preallocated, since concatenation would need the memory twice
                seen.features[name] = np.empty((len(rows), *found.shape[1:]), found.dtype)
            seen.features[name][done : done + len(found)] = found
        done += len(images)
    if not done:
        raise DataError(f"none of the {len(rows)} samples could be used.")
    seen.features = {name: value[:done] for name, value in seen.features.items()}
    return seen


def read_images(
    source: Pairs, rows: Sequence[int], batch: int, seen: Pass, log: Log
) -> Iterator[list[Image.Image]]:
    """Images in batches; captions and unusable samples are added to `seen`."""
    images, in_a_row = list[Image.Image](), 0
    for row in rows:
        try:
            captions, image = _read(source, row)
        except RECORD_FAULTS as error:
            seen.bad.append(str(error))
            log(f"left out: {error}")
            in_a_row += 1
            if in_a_row >= MAX_BAD_IN_A_ROW:
                raise DataError(
                    f"{in_a_row} samples in a row cannot be used, the last: {error}"
                ) from error
            continue
        in_a_row = 0
        seen.rows.append(row)
        seen.captions.append(captions)
        images.append(image)
        if len(images) == batch:
            yield images
            images = []
    if images:
        yield images


def _read(source: Pairs, row: int) -> tuple[list[str], Image.Image]:
    pair = source.read(row)
    name = f"{pair.location} ({pair.image})" if isinstance(pair.image, Path) else pair.location
    return list(pair.captions), open_image(pair.image, name=name)


@torch.no_grad()
def _features(images: list[Image.Image], opened: OpenedTokenizer) -> Mapping[str, Tensor]:
    tokenizer, stage1 = opened.codec.model, opened.stage1
    pixels = torch.stack([opened.codec.transform(image) for image in images]).to(
        tokenizer.device, tokenizer.dtype
    )
    vision = tokenizer.visual_encoder(pixels)
    codes = tokenizer.quantize.nearest(
        tokenizer.encode_task_layer(tokenizer.query_features_from(vision))
    )
    up = tokenizer.decode_task_layer(tokenizer.quantize.lookup(codes))
    decoded = tokenizer.project(tokenizer.decoder_tokens(up)).float()
    found = {"codes": codes, "decoded": F.normalize(decoded, dim=-1)}
    if opened.clip is not None:
        target = _clip_embeddings(images, opened)
        found |= {"target": F.normalize(target, dim=-1), "mse": (decoded - target).square().mean(1)}
    if stage1 is not None:
        own = (
            vision
            if stage1.visual_encoder is tokenizer.visual_encoder
            else stage1.visual_encoder(pixels)
        )
        queries = {"causal": stage1.query_features(own)}
        if tokenizer.config.recon_s:
            queries["rebuilt"] = tokenizer.rebuild_queries(up)
        for name, value in queries.items():  # only the last query attends to all others
            found[name] = F.normalize(stage1.vision_proj(value[:, -1]), dim=-1).float()
    return found


@torch.no_grad()
def _clip_embeddings(images: Sequence[Image.Image], opened: OpenedTokenizer) -> Tensor:
    """CLIP image embeddings [N, E]."""
    pixels = opened.clip_transform.batch(list(images)).to(opened.clip.device, opened.clip.dtype)
    embeddings: Tensor = opened.clip(pixel_values=pixels).image_embeds.float()
    return embeddings


# ---- sections of the report


def _retrieval(seen: Pass, opened: OpenedTokenizer) -> dict[str, Any]:
    found = {}
    for route, (name, side, what) in ROUTES.items():
        if name in seen.features and side in opened.texts and any(seen.captions):
            images = torch.from_numpy(seen.features[name]).to(opened.codec.device)
            found[route] = {"route": what, **retrieval(images, opened.texts[side], seen.captions)}
    return found


def _reconstruction(
    seen: Pass, rebuilt: Sequence[Image.Image], opened: OpenedTokenizer
) -> dict[str, Any]:
    """Similarity of decoded embeddings and of images, under CLIP."""
    section: dict[str, Any] = {"clip": opened.clip_source, "rebuilt": len(rebuilt)}
    if "target" in seen.features:
        device = opened.codec.device
        real, decoded = (
            torch.from_numpy(seen.features[name]).to(device) for name in ("target", "decoded")
        )
        section["embedding"] = {**_nearness(decoded, real), "mse": bootstrap(seen.features["mse"])}
        if rebuilt:
            drawn = [
                _clip_embeddings(rebuilt[start : start + 32], opened)
                for start in range(0, len(rebuilt), 32)
            ]
            section["image_clip"] = _nearness(F.normalize(torch.cat(drawn), dim=-1), real)
    return section


def _nearness(found: Tensor, real: Tensor) -> dict[str, Any]:
    """Mean cosine of each row of `found` [Q, D] to its image and to the others; recall of its image.

    `real` [N, D]: all images, of which the first Q correspond to `found`; unit length.
    """
    count, own = len(real), (found * real[: len(found)]).sum(1).double()
    others = (
        (found.double() @ real.sum(0, dtype=torch.float64) - own) / (count - 1)
        if count > 1
        else own[:0]
    )
    order = ranks(found, real, np.arange(len(found))[:, None].repeat(2, axis=1))
    return {
        "n": len(found),
        "gallery": count,
        "cosine": bootstrap(own.cpu().numpy()),
        "cosine_to_others": bootstrap(others.cpu().numpy()),
        **{f"image_r{k}": bootstrap(order < k) for k in (1, 5)},
    }


def save_neighbours(file: Path, images: Tensor, matched: tuple[Tensor, Tensor] | None) -> None:
    """A sheet of held-out images, normalized pixels `[B, 3, S, S]`, above the images nearest to their decoded
    embeddings; `matched`: embeddings of codes and of images, `[B, E]` each; None: no sheet."""
    if matched is None:
        return
    found, real = (F.normalize(one.detach(), dim=-1) for one in matched)
    nearest = (found @ real.T).argmax(1).tolist()[:COLUMNS]
    own, near = (
        [Cell(denormalise(images[place])) for place in places]
        for places in (range(len(nearest)), nearest)
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    contact_sheet(
        [Row("image", own), Row("nearest to its codes", near)], file.stem, CELL, COLUMNS
    ).save(file)


def _sheet(source: Pairs, seen: Pass, rebuilt: Sequence[Image.Image]) -> Image.Image:
    """The first images with their caption (if any), above their reconstructions."""
    real = [
        Cell(_read(source, row)[1], "".join(texts[:1]))
        for row, texts in zip(seen.rows[:SHOWN], seen.captions, strict=False)
    ]
    drawn = [Cell(image) for image in rebuilt[:SHOWN]]
    rows = [
        Row(label, cells[start : start + COLUMNS])
        for start in range(0, len(real), COLUMNS)
        for label, cells in (("image", real), ("from 32 codes", drawn))
    ]
    return contact_sheet(rows, f"{len(seen.rows)} images", CELL, COLUMNS, 4)
