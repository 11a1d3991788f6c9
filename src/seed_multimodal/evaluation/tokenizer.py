"""Evaluation of a SEED-2 tokenizer: retrieval, reconstruction, codebook use, contact sheet.

`seed eval tokenizer`. Retrieval (`ROUTES`) is measured with features before quantization and from
codes; the difference is due to the codebook. Writes report.json, reconstructions.jpg, and a line
per retrieval to evaluate.txt (LAVIS's names).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from seed_multimodal.data.formats.pairs import Pairs
from seed_multimodal.data.formats.record import RECORD_FAULTS
from seed_multimodal.device import Runtime
from seed_multimodal.disk import JsonObject, atomic_open, replace_text, writable_folder, writing
from seed_multimodal.errors import CheckpointError, ConfigError, DataError
from seed_multimodal.evaluation.metrics import Estimate, bootstrap, codebook_statistics, plain
from seed_multimodal.evaluation.retrieval import (
    ClipEncoder,
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
from seed_multimodal.images.transforms import ImageTransform
from seed_multimodal.models.seed.losses import Stage1Model, clip_preprocessing
from seed_multimodal.models.seed.modeling import Seed2Tokenizer
from seed_multimodal.models.seed.pipeline import SeedImageCodec, load_images
from seed_multimodal.models.seed.spec import SeedLlamaConfig
from seed_multimodal.nn.vision.clip import CLIP_FOLDER, load_clip_vision
from seed_multimodal.pipelines.images import Placement

Log = Callable[[str], None]
Source = str | Path | None  # a folder, a file or a hub name
MAX_BAD_IN_A_ROW = 20
BERT = Path("pretrained/bert-base-uncased")
# The contact sheet: images, columns, and the side of a cell in pixels.
SHEET_IMAGES = 24
COLUMNS = 8
CELL = 96
DRAW_BATCH = 32


@dataclass(frozen=True)
class Route:
    """A way to find images by text."""

    features: str  # of `Pass`
    text_encoder: str  # of `OpenedTokenizer.texts`
    description: str


ROUTES = {
    "causal_embeddings": Route("causal", "stage1", "last query of the Q-Former, before the codes"),
    "codes_by_blocks": Route("rebuilt", "stage1", "codes, queries rebuilt by stage 2's blocks"),
    "codes_by_embedding": Route("decoded", "clip", "codes, decoded image embedding"),
    "images_by_clip": Route(
        "target", "clip", "the images under CLIP, what the decoded embedding aims at"
    ),
}


@dataclass
class OpenedTokenizer:
    """A loaded tokenizer with the models for its evaluation."""

    codec: SeedImageCodec
    clip: ClipEncoder | None = None  # gives the target embedding
    clip_source: str = ""
    stage1: Stage1Model | None = None
    texts: dict[str, TextEncoder] = field(default_factory=dict)  # "stage1", "clip"


def open_tokenizer(
    model: str | Path,
    runtime: Runtime,
    *,
    decoder: Source = None,
    clip: Source = None,
    stage1: Source = None,
    clip_text: Source = None,
    text_tokenizer: Source = None,
) -> OpenedTokenizer:
    """Load a system's or a separate tokenizer, with the models for its evaluation.

    Args:
        model: see `SeedLlamaConfig.find`.
        decoder: the de-tokenizer; default: the system's; "none": no drawings.
        clip: CLIP folder of the target embedding; default: the decoder's `image_encoder`, else the
            original one; "none": no target.
        stage1: stage-1 checkpoint with the text path.
        clip_text: CLIP folder with a text encoder.
        text_tokenizer: word pieces of stage 1; default: those in the tokenizer's folder, else
            bert-base-uncased.

    Raises:
        CheckpointError: no such tokenizer, or a missing or mismatched part.
    """
    # 1. The tokenizer, with its de-tokenizer.
    parts = SeedLlamaConfig.find(model)
    folder = parts.path("tokenizer")
    decoder_folder = _chosen(decoder, parts.detokenizer)
    parts_with_decoder = replace(parts, detokenizer=decoder_folder)
    codec = load_images(parts_with_decoder, Placement(runtime, runtime, runtime))
    if not isinstance(codec.model, Seed2Tokenizer):
        raise CheckpointError(f"{model}: is a SEED-1 tokenizer; this measures SEED-2's.")
    opened = OpenedTokenizer(codec)
    width = codec.model.config.image_features_dim

    # 2. CLIP, whose embeddings the decoded ones aim at.
    clip_folder = _chosen(clip, _default_clip(decoder_folder))
    if clip_folder is not None:
        vision = load_clip_vision(clip_folder, device=runtime.device, dtype=runtime.dtype, log=None)
        _check_width(clip_folder, "image", vision.config.projection_dim, width)
        # It sees what the tokenizer sees, as in the training of stage 2.
        preprocessing = clip_preprocessing(vision)
        view = codec.transform.scaled_to(preprocessing.image_size)
        opened.clip = ClipEncoder(vision, preprocessing.with_resizing_of(view))
        opened.clip_source = str(clip_folder)

    # 3. Text encoders.
    if stage1 is not None:
        default_pieces: str | Path = BERT if BERT.is_dir() else BERT.name
        if (folder / "tokenizer.model").is_file():
            default_pieces = folder
        opened.stage1 = load_stage1(stage1, codec.model)
        opened.texts["stage1"] = stage1_texts(opened.stage1, text_tokenizer or default_pieces)
    if clip_text is not None:
        opened.texts["clip"] = clip_texts(clip_text, runtime.device)
        _check_width(clip_text, "text", opened.texts["clip"](["a"]).shape[1], width)
    return opened


def _chosen(choice: Source, default: Path | None) -> Path | None:
    """A part that the caller chose, "none" for no such part, or the default."""
    if choice is None:
        return default
    return None if str(choice) == "none" else Path(choice)


def _default_clip(decoder_folder: Path | None) -> Path | None:
    """The CLIP encoder in a de-tokenizer's folder, else the original one."""
    if decoder_folder is not None and (decoder_folder / "image_encoder/config.json").is_file():
        return decoder_folder / "image_encoder"
    return locate(f"pretrained/{CLIP_FOLDER}")


def _check_width(source: str | Path, what: str, has: int, needs: int) -> None:
    if has != needs:
        raise CheckpointError(
            f"{source}: gives {what} embeddings of width {has}, this tokenizer decodes to width "
            f"{needs}: they do not belong together."
        )


def evaluate_tokenizer(
    source: Pairs,
    opened: OpenedTokenizer,
    out: str | Path,
    conditions: JsonObject,
    *,
    limit: int | None = None,
    rebuild: int = 128,
    batch: int = 64,
    seed: int = 0,
    log: Log = print,
) -> JsonObject:
    """Evaluate, write to `out`, and return the report as JSON values.

    Args:
        conditions: the beginning of the report.
        limit: number of images, sampled by `seed`; None: all.
        rebuild: how many of them are rebuilt as images.

    Raises:
        DataError: see `run_pass`. ConfigError: the folder cannot be written.
    """
    folder = writable_folder(out, ConfigError)
    rows = np.random.default_rng(seed).permutation(len(source))[:limit].tolist()

    # 1. Features of all images, and reconstructions of the first ones.
    encoded = run_pass(source, rows, opened, batch=batch, log=log)
    rebuilt: list[Image.Image] = []
    if rebuild and opened.codec.can_draw:
        codes = torch.from_numpy(encoded.features["codes"][:rebuild])
        seeds = [seed] * len(codes)
        rebuilt = opened.codec.draw(codes, seeds=seeds, batch_size=min(batch, DRAW_BATCH))

    # 2. The report.
    codebook_size = opened.codec.model.config.codebook_size
    report: JsonObject = plain(
        {
            **conditions,
            "n": len(encoded.rows),
            "captions": sum(map(len, encoded.captions)),
            "left_out": encoded.bad,
            "retrieval": _retrieval(encoded, opened),
            "reconstruction": _reconstruction(encoded, rebuilt, opened),
            "codes": codebook_statistics(encoded.features["codes"], codebook_size),
        }
    )

    # 3. Its files, with LAVIS's lines, one for each route.
    lines = []
    for name, route in report["retrieval"].items():
        line = {"features": name, "route": route["route"], "model": report.get("model")}
        lines.append({**line, "n": route["n"], **route["lavis"]})
    with writing(folder, ConfigError):
        replace_text(
            folder / "report.json", json.dumps(report, indent=1, ensure_ascii=False) + "\n"
        )
        with atomic_open(folder / "reconstructions.jpg") as file:
            _sheet(source, encoded, rebuilt).save(file, "JPEG", quality=88)
        with open(folder / "evaluate.txt", "a", encoding="utf-8") as handle:
            handle.writelines(json.dumps(line) + "\n" for line in lines)
    return report


# ---- one pass over the images


@dataclass
class Pass:
    """Values computed once for each image; row i of each array is image i.

    features:
        codes [N, 32]
        decoded [N, E], target [N, E]: unit embeddings, from the codes and of CLIP
        causal [N, P], rebuilt [N, P]: unit features of the last query under stage 1, before the
            codes and from them
        mse [N]: of decoded and target before they are normalized
    """

    rows: list[int] = field(default_factory=list)  # indices in the source
    captions: list[list[str]] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)  # errors of unusable samples
    features: dict[str, NDArray[np.number]] = field(default_factory=dict)


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
    encoded = Pass()
    n_done = 0
    for images in read_images(source, rows, batch, encoded, log):
        for name, features in _features(images, opened).items():
            values = features.cpu().numpy()
            if not np.isfinite(values).all():
                raise DataError(
                    f"{source.key(encoded.rows[n_done])} or the images after it: {name!r} holds "
                    "numbers that are not finite; the weights are damaged, or need a wider --dtype."
                )
            # Preallocated, since concatenation would need the memory twice.
            if name not in encoded.features:
                shape = (len(rows), *values.shape[1:])
                encoded.features[name] = np.empty(shape, values.dtype)
            encoded.features[name][n_done : n_done + len(values)] = values
        n_done += len(images)
    if not n_done:
        raise DataError(f"none of the {len(rows)} samples could be used.")

    # Unusable samples left rows at the end empty.
    for name, values in encoded.features.items():
        encoded.features[name] = values[:n_done]
    return encoded


def read_images(
    source: Pairs, rows: Sequence[int], batch: int, encoded: Pass, log: Log
) -> Iterator[list[Image.Image]]:
    """Images in batches; captions and unusable samples are added to `encoded`."""
    # A few unusable samples are left out, many in a row are a wrong folder or key.
    images: list[Image.Image] = []
    n_bad_in_a_row = 0
    for row in rows:
        try:
            captions, image = _read(source, row)
        except RECORD_FAULTS as error:
            encoded.bad.append(str(error))
            log(f"left out: {error}")
            n_bad_in_a_row += 1
            if n_bad_in_a_row >= MAX_BAD_IN_A_ROW:
                raise DataError(
                    f"{n_bad_in_a_row} samples in a row cannot be used, the last: {error}"
                ) from error
            continue
        n_bad_in_a_row = 0
        encoded.rows.append(row)
        encoded.captions.append(captions)
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
def _features(images: Sequence[Image.Image], opened: OpenedTokenizer) -> dict[str, Tensor]:
    """The features of `Pass` for a batch of images."""
    tokenizer = opened.codec.model
    assert isinstance(tokenizer, Seed2Tokenizer)  # checked when it was opened
    pixels = torch.stack([opened.codec.transform(image) for image in images])
    pixels = pixels.to(tokenizer.device, tokenizer.dtype)  # [B, 3, S, S]

    # 1. Codes, and the embedding that is decoded from them.
    vision = tokenizer.visual_encoder(pixels)
    down = tokenizer.encode_task_layer(tokenizer.query_features_from(vision))
    codes = tokenizer.quantize.nearest(down)  # [B, 32]
    up = tokenizer.decode_task_layer(tokenizer.quantize.lookup(codes))
    decoded = tokenizer.project(tokenizer.decoder_tokens(up)).float()  # [B, E]
    features = {"codes": codes, "decoded": F.normalize(decoded, dim=-1)}

    # 2. The embedding that it aims at.
    if opened.clip is not None:
        target = opened.clip.embed(images)
        features["target"] = F.normalize(target, dim=-1)
        features["mse"] = (decoded - target).square().mean(1)

    # 3. Queries under stage 1: only the last one attends to all others.
    stage1 = opened.stage1
    if stage1 is not None:
        stage1_vision = vision
        if stage1.visual_encoder is not tokenizer.visual_encoder:
            stage1_vision = stage1.visual_encoder(pixels)
        queries = {"causal": stage1.query_features_from(stage1_vision)}
        if tokenizer.config.recon_s:
            queries["rebuilt"] = tokenizer.rebuild_queries(up)
        for name, query_features in queries.items():
            last_query = stage1.vision_proj(query_features[:, -1])
            features[name] = F.normalize(last_query, dim=-1).float()
    return features


# ---- sections of the report


def _retrieval(encoded: Pass, opened: OpenedTokenizer) -> dict[str, JsonObject]:
    """Retrieval by every route whose features and text encoder there are."""
    section: dict[str, JsonObject] = {}
    if not any(encoded.captions):
        return section
    for name, route in ROUTES.items():
        if route.features in encoded.features and route.text_encoder in opened.texts:
            images = torch.from_numpy(encoded.features[route.features]).to(opened.codec.device)
            recalls = retrieval(images, opened.texts[route.text_encoder], encoded.captions)
            section[name] = {"route": route.description, **recalls}
    return section


def _reconstruction(
    encoded: Pass, rebuilt: Sequence[Image.Image], opened: OpenedTokenizer
) -> JsonObject:
    """Similarity of decoded embeddings and of images, under CLIP."""
    section: JsonObject = {"clip": opened.clip_source, "rebuilt": len(rebuilt)}
    if opened.clip is None:
        return section

    # 1. Embeddings.
    device = opened.codec.device
    target = torch.from_numpy(encoded.features["target"]).to(device)
    decoded = torch.from_numpy(encoded.features["decoded"]).to(device)
    section["embedding"] = _nearness(decoded, target)
    section["embedding"]["mse"] = bootstrap(encoded.features["mse"])

    # 2. Images drawn from the codes.
    if rebuilt:
        embeddings = []
        for start in range(0, len(rebuilt), DRAW_BATCH):
            embeddings.append(opened.clip.embed(rebuilt[start : start + DRAW_BATCH]))
        section["image_clip"] = _nearness(F.normalize(torch.cat(embeddings), dim=-1), target)
    return section


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


def save_neighbours(
    file: Path,
    images: Tensor,
    matched: tuple[Tensor, Tensor] | None,
    preprocessing: ImageTransform,
) -> None:
    """A sheet of held-out images above the images nearest to their decoded embeddings.

    images: pixels `[B, 3, S, S]`, normalised by `preprocessing`.
    matched: embeddings of codes and of images, `[B, E]` each; None: no sheet.
    """
    if matched is None:
        return
    # 1. The nearest image of each embedding that its codes give.
    decoded = F.normalize(matched[0].detach(), dim=-1)
    targets = F.normalize(matched[1].detach(), dim=-1)
    nearest = (decoded @ targets.T).argmax(1).tolist()[:COLUMNS]

    # 2. The sheet.
    cells = [Cell(preprocessing.to_image(image)) for image in images[: len(nearest)]]
    nearest_cells = [Cell(preprocessing.to_image(images[index])) for index in nearest]
    file.parent.mkdir(parents=True, exist_ok=True)
    rows = [Row("image", cells), Row("nearest to its codes", nearest_cells)]
    contact_sheet(rows, file.stem, CELL, COLUMNS).save(file)


def _sheet(source: Pairs, encoded: Pass, rebuilt: Sequence[Image.Image]) -> Image.Image:
    """The first images with their caption (if any), above their reconstructions."""
    # 1. Images are read again, since a pass keeps none.
    originals: list[Cell] = []
    for row, captions in zip(encoded.rows[:SHEET_IMAGES], encoded.captions, strict=False):
        _, image = _read(source, row)
        originals.append(Cell(image, "".join(captions[:1])))
    reconstructions = [Cell(image) for image in rebuilt[:SHEET_IMAGES]]

    # 2. Rows of images in turn with their reconstructions.
    rows: list[Row] = []
    for start in range(0, len(originals), COLUMNS):
        rows.append(Row("image", originals[start : start + COLUMNS]))
        rows.append(Row("from 32 codes", reconstructions[start : start + COLUMNS]))
    return contact_sheet(rows, f"{len(encoded.rows)} images", CELL, COLUMNS, 4)
