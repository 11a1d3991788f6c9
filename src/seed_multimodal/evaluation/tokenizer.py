"""Evaluation of an image tokenizer: reconstruction, codebook use, retrieval, contact sheet.

`seed eval tokenizer`, of any family whose images are codes. A family's evaluation may have further
features and routes of retrieval (`SEED-2`: `recipes.seed.evaluate_tokenizer`). Writes report.json,
reconstructions.jpg, and a line per retrieval to evaluate.txt (LAVIS's names).
"""

from __future__ import annotations

import hashlib
import json
import pkgutil
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from seed_multimodal.data.formats.bad_records import RECORD_FAULTS, BadRecords
from seed_multimodal.data.formats.pairs import Pairs, open_pairs
from seed_multimodal.data.formats.record import FieldValue
from seed_multimodal.device import FP16_AS_ORIGINAL, Runtime, choose_device
from seed_multimodal.disk import JsonObject, atomic_open, replace_text, writable_folder, writing
from seed_multimodal.errors import ConfigError, DataError
from seed_multimodal.evaluation.clip import ClipEncoder, TextEncoder, clip_texts
from seed_multimodal.evaluation.machine import circumstances
from seed_multimodal.evaluation.metrics import (
    Estimate,
    bootstrap,
    codebook_statistics,
    finite,
    finite_json,
    plain,
)
from seed_multimodal.evaluation.retrieval import ranks, retrieval
from seed_multimodal.evaluation.tokenizer_settings import PrefixSettings, TokenizerSettings
from seed_multimodal.images.io import open_image
from seed_multimodal.images.sheet import Cell, Row, contact_sheet
from seed_multimodal.images.transforms import seed_image_processor
from seed_multimodal.models.registry import find_family
from seed_multimodal.nn.vision.clip import load_clip_vision
from seed_multimodal.pipelines.config import SystemConfig
from seed_multimodal.pipelines.images import CodeCodec, Placement

Log = Callable[[str], None]
MAX_BAD_IN_A_ROW = 20
# The contact sheet: images, columns, and the side of a cell in pixels.
SHEET_IMAGES = 24
COLUMNS = 8
CELL = 96
DRAW_BATCH = 32
NONE = "none"  # of a model that is left out


@dataclass(frozen=True)
class Route:
    """A way to find images by text."""

    features: str  # of `Pass`
    text_encoder: str  # of `OpenedTokenizer.texts`
    description: str


class TargetEncoder(Protocol):
    """Computes the image embeddings that tokenizers are compared by."""

    def embed(self, images: Sequence[Image.Image]) -> Tensor:
        """Embeddings of images of any sizes, float32 [N, E]."""


class OpenedTokenizer:
    """A loaded tokenizer with the models for its evaluation.

    target: gives the target embedding; None: no target.
    texts: text encoders by name.
    """

    has_stage1 = False  # whether texts can be encoded by a stage of its training
    routes: ClassVar[Mapping[str, Route]] = {
        "images_by_clip": Route("target", "clip", "the images under CLIP")
    }

    def __init__(
        self, config: SystemConfig, codec: CodeCodec, runtime: Runtime, settings: TokenizerSettings
    ) -> None:
        if not self.has_stage1 and (settings.stage1 or settings.text_tokenizer) is not None:
            raise ConfigError(
                f"{config.name}: --stage1 and --text-tokenizer are for SEED-2's tokenizers; "
                "--clip and --clip-text find images of any tokenizer by text."
            )
        self.codec = codec
        self.network = codec.network

        # CLIP's embeddings of images and texts.
        self.target: TargetEncoder | None = None
        self.target_source = ""
        folder = settings.clip or self.default_clip()
        if folder is not None and str(folder) != NONE:
            vision = load_clip_vision(folder, device=runtime.device, dtype=runtime.dtype, log=None)
            # It sees what the tokenizer sees.
            processor = seed_image_processor(vision.config.image_size)
            view = codec.transform.scaled_to(processor.image_size)
            self.target = ClipEncoder(vision, processor.with_resizing_of(view))
            self.target_source = str(folder)
        self.texts: dict[str, TextEncoder] = {}
        if settings.clip_text is not None:
            self.texts["clip"] = clip_texts(settings.clip_text, runtime.device)

    def default_clip(self) -> Path | None:
        """The CLIP folder whose embeddings the tokenizer was trained with."""
        return None

    @torch.no_grad()
    def features(self, images: Sequence[Image.Image]) -> dict[str, Tensor]:
        """The features of `Pass` for a batch of images."""
        pixels = self.codec.transform.batch(images).to(self.codec.device)  # [B, 3, S, S]
        codes = self.network.encode(pixels)  # [B, n]
        padding = self.codec.codes_per_image - codes.shape[1]
        features = {"codes": F.pad(codes, (0, padding), value=-1)}
        if self.target is not None:
            features["target"] = F.normalize(self.target.embed(images), dim=-1)
        return features


def open_tokenizer(settings: TokenizerSettings, runtime: Runtime) -> OpenedTokenizer:
    """Load a system's or a separate tokenizer, with the models for its evaluation.

    Raises:
        CheckpointError: no such tokenizer, or a missing or mismatched part.
        ConfigError: its images are features, or an option that it does not have.
    """
    # 1. The tokenizer, with its de-tokenizer.
    config = SystemConfig.find(settings.model)
    has_decoder = settings.decoder != NONE
    if settings.decoder is not None and has_decoder:
        decoder_parts = config.decoder_parts()
        if len(decoder_parts) != 1:
            count = len(decoder_parts) or "no"
            raise ConfigError(
                f"{config.name}: --decoder replaces one part, but its drawings need {count}."
            )
        config.override(**{decoder_parts[0]: settings.decoder})
    spec = find_family(config.system)
    placement = Placement(runtime, runtime, runtime, load_decoder=has_decoder)
    codec = pkgutil.resolve_name(spec.images)(config, placement)
    if not isinstance(codec, CodeCodec):
        raise ConfigError(f"{config.name}: its images are features, they have no codes.")

    # 2. What its family compares it with.
    opened_class: type[OpenedTokenizer] = OpenedTokenizer
    if "tokenizer" in spec.evaluators:
        opened_class = pkgutil.resolve_name(spec.evaluators["tokenizer"])
    return opened_class(config, codec, runtime, settings)


def evaluate_tokenizer(settings: TokenizerSettings, log: Log) -> JsonObject:
    """Evaluate, write to `settings.out`, and return the report as JSON values.

    Raises:
        DataError: see `run_pass`. ConfigError: the folder cannot be written.
    """
    # 1. The data and the model.
    source = open_pairs(settings.pairs())
    runtime = choose_device(settings.device, settings.dtype, log=log, fp16=FP16_AS_ORIGINAL)
    opened = open_tokenizer(settings, runtime)
    folder = writable_folder(settings.out, ConfigError)
    rows = np.random.default_rng(settings.seed).permutation(len(source))[: settings.limit].tolist()

    # 2. Features of all images, and reconstructions of the first ones.
    encoded = run_pass(source, rows, opened, batch=settings.batch, log=log)
    rebuilt: list[Image.Image] = []
    if settings.rebuild and opened.codec.can_draw:
        first_codes = torch.from_numpy(encoded.features["codes"][: settings.rebuild])
        codes = [row[row >= 0] for row in first_codes]
        seeds = [settings.seed] * len(codes)
        rebuilt = opened.codec.draw(codes, seeds=seeds, batch_size=min(settings.batch, DRAW_BATCH))

    # 3. The report.
    report: JsonObject = plain(
        {
            **report_head(settings, runtime, encoded),
            "captions": sum(map(len, encoded.captions)),
            "retrieval": _retrieval(encoded, opened),
            "reconstruction": _reconstruction(encoded, rebuilt, opened),
            "codes": codebook_statistics(encoded.features["codes"], opened.codec.codebook_size),
        }
    )

    # 4. A sheet of the first images with their caption, if any, above their reconstructions.
    cells = [
        Cell(image, "".join(captions[:1]))
        for image, captions in zip(encoded.images, encoded.captions, strict=False)
    ]
    rebuilt_cells = [Cell(image) for image in rebuilt[: len(cells)]]
    sheet = paired_sheet(cells, rebuilt_cells, "from its codes", f"{report['n']} images")

    # 5. Its files, with LAVIS's lines, one for each route.
    text = finite_json(report, str(folder), indent=1)
    with writing(folder, ConfigError):
        replace_text(folder / "report.json", text + "\n")
        with atomic_open(folder / "reconstructions.jpg") as file:
            sheet.save(file, "JPEG", quality=88)
        with open(folder / "evaluate.txt", "a", encoding="utf-8") as handle:
            for name, route in report["retrieval"].items():
                line = {"features": name, "route": route["route"], "model": settings.model}
                handle.write(json.dumps({**line, "n": route["n"], **route["lavis"]}) + "\n")
    return report


def report_head(
    settings: TokenizerSettings | PrefixSettings, runtime: Runtime, encoded: Pass
) -> JsonObject:
    """What was measured, and how."""
    return {
        "model": settings.model,
        "data": settings.pairs(),
        "settings": vars(settings),
        "runtime": str(runtime),
        **circumstances(runtime.device, shlex.join(["seed", *sys.argv[1:]])),
        "n": len(encoded.captions),
        "left_out": encoded.bad,
    }


# ---- one pass over the images


@dataclass
class Pass:
    """Values computed once for each image; row i of each array is image i.

    images: the first ones, as the tokenizer sees them.
    features:
        codes [N, n]: rows of images with fewer codes are padded with -1
        target [N, E]: unit embeddings of CLIP
        decoded [N, E]: unit embeddings from the codes, of tokenizers that decode to CLIP's
        mse [N]: of decoded and target before they are normalized
        and those of the family's routes
    """

    captions: list[list[str]] = field(default_factory=list)
    labels: list[FieldValue] = field(default_factory=list)
    images: list[Image.Image] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)  # errors of unusable samples
    features: dict[str, NDArray[np.number]] = field(default_factory=dict)


def run_pass(
    source: Pairs,
    rows: Sequence[int],
    opened: OpenedTokenizer,
    *,
    batch: int,
    log: Log = print,
    kept: int = SHEET_IMAGES,
) -> Pass:
    """Encode the images `rows` of `source` in batches, of which the first `kept` are returned.

    Raises:
        DataError: no usable sample, too many consecutive unusable ones, or non-finite numbers.
    """
    encoded = Pass()
    batches: dict[str, list[NDArray[np.number]]] = {}
    for images in read_images(source, rows, batch, encoded, log):
        shown = images[: kept - len(encoded.images)]
        encoded.images += map(opened.codec.transform.resize, shown)
        for name, features in opened.features(images).items():
            values = features.cpu().numpy()
            finite(values, f"{name!r} of the last of {len(encoded.captions)} images")
            batches.setdefault(name, []).append(values)
    if not batches:
        raise DataError(f"none of the {len(rows)} samples could be used.")
    encoded.features = {name: np.concatenate(values) for name, values in batches.items()}
    return encoded


def read_images(
    source: Pairs, rows: Sequence[int], batch: int, encoded: Pass, log: Log
) -> Iterator[list[Image.Image]]:
    """Images in batches, each once; captions, of all of its records, and unusable samples are added
    to `encoded`."""
    # Of files and contents, with their labels; of a function it is not known what it renders.
    index_of: dict[tuple[Path | bytes, str], int] = {}
    # A few unusable samples are left out, many in a row are a wrong folder or key.
    images: list[Image.Image] = []
    bad = BadRecords(MAX_BAD_IN_A_ROW, log, "left out: ")
    for row in rows:
        try:
            pair = source.read(row)
            image = pair.image
            content = hashlib.sha256(image).digest() if isinstance(image, bytes) else image
            key = None if callable(content) else (content, repr(pair.labels))
            if key in index_of:
                encoded.captions[index_of[key]] += pair.captions
                bad.in_a_row = 0
                continue
            name = pair.location
            if isinstance(image, Path):
                name += f" ({image})"
            images.append(open_image(image, name=name).image)
        except RECORD_FAULTS as error:
            note = source.broken(row, error)
            encoded.bad.append(note.location)
            bad.add(note)
            continue
        bad.in_a_row = 0
        if key is not None:
            index_of[key] = len(encoded.captions)
        encoded.captions.append(list(pair.captions))
        encoded.labels.append(pair.labels)
        if len(images) == batch:
            yield images
            images = []
    if images:
        yield images


# ---- sections of the report


def _retrieval(encoded: Pass, opened: OpenedTokenizer) -> dict[str, JsonObject]:
    """Retrieval by every route whose features and text encoder there are."""
    section: dict[str, JsonObject] = {}
    if not any(encoded.captions):
        return section
    for name, route in opened.routes.items():
        if route.features in encoded.features and route.text_encoder in opened.texts:
            images = torch.from_numpy(encoded.features[route.features]).to(opened.codec.device)
            recalls = retrieval(images, opened.texts[route.text_encoder], encoded.captions)
            section[name] = {"route": route.description, **recalls}
    return section


def _reconstruction(
    encoded: Pass, rebuilt: Sequence[Image.Image], opened: OpenedTokenizer
) -> JsonObject:
    """Similarity of decoded embeddings and of images, under the encoder of the target."""
    section: JsonObject = {"clip": opened.target_source, "rebuilt": len(rebuilt)}
    if opened.target is None:
        return section

    # 1. Embeddings decoded from the codes.
    device = opened.codec.device
    target = torch.from_numpy(encoded.features["target"]).to(device)
    if "decoded" in encoded.features:
        decoded = torch.from_numpy(encoded.features["decoded"]).to(device)
        section["embedding"] = _nearness(decoded, target)
        section["embedding"]["mse"] = bootstrap(encoded.features["mse"])

    # 2. Images drawn from the codes.
    if rebuilt:
        section["image_clip"] = image_nearness(rebuilt, opened.target, target)
    return section


def image_nearness(
    images: Sequence[Image.Image], encoder: TargetEncoder, target: Tensor
) -> dict[str, int | Estimate]:
    """`_nearness` of drawn images to the embeddings of the original ones."""
    embeddings = [
        encoder.embed(images[start : start + DRAW_BATCH])
        for start in range(0, len(images), DRAW_BATCH)
    ]
    return _nearness(F.normalize(torch.cat(embeddings), dim=-1), target)


def _nearness(embeddings: Tensor, images: Tensor) -> dict[str, int | Estimate]:
    """Mean cosine of each embedding [Q, D] to its image and to the others; recall of its image.

    images: [N, D], of which the first Q belong to `embeddings`; unit length.
    """
    # 1. Cosines; the sum of all images gives the mean over the others.
    n_images = len(images)
    to_image = (embeddings * images[: len(embeddings)]).sum(1).double()  # [Q]
    to_others = to_image[:0]
    if n_images > 1:
        to_all = embeddings.double() @ images.sum(0, dtype=torch.float64)
        to_others = (to_all - to_image) / (n_images - 1)

    # 2. Ranks; query n belongs to image n.
    pairs = np.arange(len(embeddings))[:, None].repeat(2, axis=1)
    order = ranks(embeddings, images, pairs)
    return {
        "n": len(embeddings),
        "gallery": n_images,
        "cosine": bootstrap(to_image.cpu().numpy()),
        "cosine_to_others": bootstrap(to_others.cpu().numpy()),
        "image_r1": bootstrap(order < 1),
        "image_r5": bootstrap(order < 5),
    }


def paired_sheet(images: list[Cell], others: list[Cell], label: str, title: str) -> Image.Image:
    """Rows of images, each above a row of what belongs to them."""
    rows: list[Row] = []
    for start in range(0, len(images), COLUMNS):
        rows.append(Row("image", images[start : start + COLUMNS]))
        rows.append(Row(label, others[start : start + COLUMNS]))
    return contact_sheet(rows, title, CELL, COLUMNS, 4)
