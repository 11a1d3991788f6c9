"""Evaluation of a SEED-2 tokenizer: retrieval, reconstruction, codebook use, contact sheet (`seed eval tokenizer`).

Retrieval is measured from the features before the codes and from the codes; the difference is the loss by the codebook:

    causal_embeddings   last query of the Q-Former, before the codes             stage 1's text path (`stage1`)
    codes_by_blocks     codes, queries rebuilt by stage 2's `blocks`             the same
    codes_by_embedding  codes, decoded image embedding                           a CLIP text encoder (`clip_text`)
    images_by_clip      the images under CLIP, what the decoded embedding aims at
                                                                                 the same
Writes report.json, report.md, reconstructions.jpg, and one line for each retrieval into evaluate.txt (LAVIS's names).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from seed_multimodal.data.formats.pairs import SAMPLE_FAULTS, PairSource, open_pairs
from seed_multimodal.device import RELEASED_FP16, Runtime, choose_device
from seed_multimodal.disk import replace_text, replacing, writable_folder, writing
from seed_multimodal.errors import CheckpointError, ConfigError, DataError
from seed_multimodal.evaluation import machine
from seed_multimodal.evaluation.metrics import bootstrap, codebook_statistics, plain
from seed_multimodal.evaluation.retrieval import (
    LEVELS,
    Captions,
    TextEncoder,
    clip_texts,
    load_stage1,
    ranks,
    retrieval,
    stage1_texts,
)
from seed_multimodal.hub import locate
from seed_multimodal.images.open import open_image
from seed_multimodal.images.sheet import Cell, contact_sheet, interleaved_rows
from seed_multimodal.images.transforms import ImageTransform, get_transform
from seed_multimodal.settings import check_settings, setting
from seed_multimodal.systems.open_system import kind_of
from seed_multimodal.systems.pictures import PictureCodec, open_codec
from seed_multimodal.systems.system_spec import find_pictures
from seed_multimodal.tokenizers.clip_weights import CLIP_FOLDER, load_clip_vision
from seed_multimodal.tokenizers.initial import check_unclip
from seed_multimodal.tokenizers.seed2 import Seed2Tokenizer
from seed_multimodal.tokenizers.stage1 import Stage1Model

Log = Callable[[str], None]
Section = dict[str, Any]
NONE = "none"  # leaves the decoder or CLIP out
MAX_BAD_IN_A_ROW = 20
BERT = "pretrained/bert-base-uncased"
SHOWN, COLUMNS, CELL = 24, 8, 96
SHEET = "reconstructions.jpg"
ROUTES = {  # name → features of `Pass`, text encoder, what it is
    "causal_embeddings": ("causal", "stage1", "last query of the Q-Former, before the codes"),
    "codes_by_blocks": ("rebuilt", "stage1", "codes, queries rebuilt by blocks"),
    "codes_by_embedding": ("decoded", "clip_text", "codes, decoded image embedding"),
    "images_by_clip": ("target", "clip_text", "the images under CLIP (what the decoded embedding aims at)")}


@dataclass(frozen=True)
class EvalSettings:
    """Settings of the evaluation.

    Attributes:
        data: mapping for `data.formats.pairs.open_pairs`.
        stage1: stage-1 checkpoint with the text path; text_tokenizer: its word pieces (default: those in the
            tokenizer's folder, else bert-base-uncased). clip_text: CLIP folder with a text encoder.
        decoder: diffusers folder; clip: CLIP folder of the target embedding; interpolation: see `open_tokenizer`.
        limit: images, drawn by `seed` (None: all); rebuild: how many of them are rebuilt as images.
    """

    data: dict[str, Any]
    stage1: str | None = None
    clip_text: str | None = None
    text_tokenizer: str | None = None
    decoder: str | None = None
    clip: str | None = None
    interpolation: str | None = None
    limit: int | None = setting(None, least=1)
    rebuild: int = setting(128, least=0)
    batch: int = setting(64, least=1)
    seed: int = setting(0, least=0)
    device: str = "auto"
    dtype: str = "auto"


def evaluate_tokenizer(model: str | Path, out: str | Path, settings: EvalSettings, log: Log = print,
                       command: str | None = None) -> Section:
    """Measure, write into `out`, and return the report as plain JSON values.

    Args:
        command: how the run was started, for the report.

    Raises:
        CheckpointError, DataError, ConfigError: parts that cannot be loaded or do not belong together.
    """
    check_settings(settings, "eval tokenizer")
    start = time.monotonic()
    folder = writable_folder(out, ConfigError)
    source = open_pairs(settings.data)
    runtime = choose_device(settings.device, settings.dtype, log=log, fp16=RELEASED_FP16)
    opened = open_tokenizer(model, runtime, decoder=settings.decoder, clip=settings.clip,
                            interpolation=settings.interpolation, log=log)
    stage1 = None if settings.stage1 is None else load_stage1(settings.stage1, opened.tokenizer)
    encoders = _text_encoders(opened, stage1, settings)
    rows = np.random.default_rng(settings.seed).permutation(len(source))[:settings.limit].tolist()
    log(f"Measuring {len(rows):,} of {len(source):,} images.")
    seen = run_pass(source, rows, opened, stage1=stage1, batch=settings.batch, log=log)
    rebuilt: list[Image.Image] = []
    if settings.rebuild and opened.codec.can_draw:
        codes = torch.from_numpy(seen.features["codes"][:settings.rebuild])
        log(f"Rebuilding {len(codes)} images.")
        rebuilt = opened.codec.draw(codes, seed=settings.seed, batch_size=min(settings.batch, 32))
    report: Section = {
        "model": str(model), "data": settings.data, "n": len(seen.rows), "captions": sum(map(len, seen.captions)),
        "left_out": [f"{name}: {reason}" for name, reason in seen.bad], "sheet": SHEET,
        "retrieval": _retrieval(seen, encoders, opened), "reconstruction": _reconstruction(seen, rebuilt, opened),
        "codes": codebook_statistics(seen.features["codes"], opened.tokenizer.config.codebook_size),
        "settings": {key: value for key, value in asdict(settings).items() if key != "data"},
        "runtime": str(runtime), **machine.circumstances(runtime.device, command or machine.script_line())}
    report = plain({**report, "seconds": round(time.monotonic() - start, 1)})
    _write(report, _sheet(source, seen, rebuilt), folder)
    return report


# ---- the tokenizer and its parts


@dataclass
class OpenedTokenizer:
    """A tokenizer ready to be measured.

    Attributes:
        folder: where it lies.
        clip: frozen CLIP vision encoder that gives the target embedding, or None; `clip_source`: its folder.
    """

    folder: Path
    codec: PictureCodec
    clip: Any | None
    clip_transform: ImageTransform
    clip_source: str

    @property
    def tokenizer(self) -> Seed2Tokenizer:
        """The tokenizer itself."""
        return self.codec.model


def open_tokenizer(model: str | Path, runtime: Runtime, *, decoder: str | Path | None = None,
                   clip: str | Path | None = None, interpolation: str | None = None, log: Log = print
                   ) -> OpenedTokenizer:
    """Load a system's tokenizer, or a tokenizer alone, with the parts that belong to it.

    Args:
        model: `nano`, `released`, a folder with system.json, or a tokenizer's folder or file.
        decoder: diffusers folder; default: see `find_pictures`. "none": no images are rebuilt.
        clip: CLIP folder of the target embedding; default: the decoder's `image_encoder`, else the original one.
        interpolation: replaces that of the system's transform.

    Raises:
        CheckpointError: no such tokenizer, or a given part that is missing or does not fit it.
    """
    if (kind := kind_of(str(model))) != "seed_llama":
        raise CheckpointError(f"{model}: is a {kind}; this measures SEED-2's kind of tokenizer.")
    parts = find_pictures(model)
    transform = {**parts.transform, **({} if interpolation is None else {"interpolation": interpolation})}
    drawing = parts.detokenizer if decoder is None else None if str(decoder) == NONE else Path(decoder)
    codec = open_codec(parts.tokenizer, vision=parts.vision, detokenizer=drawing, transform=transform,
                       device=runtime.device, dtype=runtime.dtype)
    width = codec.model.config.image_features_dim
    if drawing is not None:
        check_unclip(drawing, width, None)
    inside = drawing / "image_encoder" if drawing is not None else None
    usual = inside if inside is not None and (inside / "config.json").is_file() else locate(f"pretrained/{CLIP_FOLDER}")
    target = usual if clip is None else None if str(clip) == NONE else Path(clip)
    encoder = None if target is None else load_clip_vision(target, device=runtime.device, dtype=runtime.dtype, log=log)
    if encoder is not None and encoder.config.projection_dim != width:
        raise CheckpointError(f"{target}: gives image embeddings of width {encoder.config.projection_dim}, this "
                              f"tokenizer decodes to width {width}: they do not belong together (--clip none).")
    size = codec.model.config.vit.image_size if encoder is None else encoder.config.image_size
    place = Path(parts.tokenizer)
    return OpenedTokenizer(place if place.is_dir() else place.parent, codec, encoder,
                           get_transform(**{**transform, "image_size": size}), str(target) if encoder else "")


def _text_encoders(opened: OpenedTokenizer, stage1: Stage1Model | None, settings: EvalSettings
                   ) -> dict[str, TextEncoder]:
    encoders = {}
    if stage1 is not None:
        own, local = opened.folder / "tokenizer.model", Path(BERT)
        usual = opened.folder if own.is_file() else local if local.is_dir() else local.name
        encoders["stage1"] = stage1_texts(stage1, settings.text_tokenizer or usual)
    if settings.clip_text is not None:
        found = clip_texts(settings.clip_text, opened.tokenizer.device)
        has, needs = found.features(["a"]).shape[1], opened.tokenizer.config.image_features_dim
        if has != needs:
            raise CheckpointError(f"{settings.clip_text}: gives text features of width {has}, this tokenizer decodes "
                                  f"to width {needs}: they do not belong together.")
        encoders["clip_text"] = found
    return encoders


# ---- one pass over the images


@dataclass
class Pass:
    """What is computed once per image; row i of every array is image i.

    Attributes:
        rows: number of the image in its source. bad: (name, reason) of samples that could not be used.
        features: codes [N, 32]; unit features decoded [N, E] (from the codes), target [N, E] (CLIP), causal and
            rebuilt [N, P] (last query under stage 1, before the codes and from them); mse [N] of decoded and target
            before they are normalised.
    """

    rows: list[int] = field(default_factory=list)
    captions: list[list[str]] = field(default_factory=list)
    bad: list[tuple[str, str]] = field(default_factory=list)
    features: dict[str, NDArray[Any]] = field(default_factory=dict)


def run_pass(source: PairSource, rows: Sequence[int], opened: OpenedTokenizer, *, stage1: Stage1Model | None = None,
             batch: int = 64, log: Log = print) -> Pass:
    """Encode the images `rows` of `source` in batches.

    Raises:
        DataError: no sample could be used, too many in a row could not, or one gave numbers that are not finite.
    """
    seen, done = Pass(), 0
    for images in read_images(source, rows, batch, seen, log):
        for name, value in _features(images, opened, stage1).items():
            finite = value.isfinite().flatten(1).all(1) if value.ndim > 1 else value.isfinite()
            if not bool(finite.all()):
                raise DataError(f"{source.key(seen.rows[done + int(finite.int().argmin())])}: its {name!r} holds "
                                "numbers that are not finite; the weights are damaged, or need a wider --dtype.")
            found = value.cpu().numpy()
            if name not in seen.features:  # whole at once: parts and their sum would need the memory twice
                seen.features[name] = np.empty((len(rows), *found.shape[1:]), found.dtype)
            seen.features[name][done:done + len(found)] = found
        done += len(images)
    if not done:
        raise DataError(f"none of the {len(rows)} samples could be used.")
    seen.features = {name: value[:done] for name, value in seen.features.items()}
    return seen


def read_images(source: PairSource, rows: Sequence[int], batch: int, seen: Pass, log: Log
                ) -> Iterator[list[Image.Image]]:
    """Images in batches; their captions, and samples that cannot be used, go to `seen`."""
    images, in_a_row = list[Image.Image](), 0
    for row in rows:
        try:
            captions, image = _read(source, row)
        except SAMPLE_FAULTS as error:
            seen.bad.append((source.key(row), str(error)))
            log(f"left out: {error}")
            in_a_row += 1
            if in_a_row >= MAX_BAD_IN_A_ROW:
                raise DataError(f"{in_a_row} samples in a row cannot be used, the last: {error}") from error
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


def _read(source: PairSource, row: int) -> tuple[list[str], Image.Image]:
    pair = source.read(row)
    name = f"{pair.name} ({pair.image})" if isinstance(pair.image, Path) else pair.name
    return list(pair.captions), open_image(pair.image, name=name)


@torch.no_grad()
def _features(images: list[Image.Image], opened: OpenedTokenizer, stage1: Stage1Model | None) -> Mapping[str, Tensor]:
    tokenizer = opened.tokenizer
    pixels = torch.stack([opened.codec.transform(image) for image in images]).to(tokenizer.device, tokenizer.dtype)
    vision = tokenizer.visual_encoder(pixels)
    query = tokenizer.query_features_from(tokenizer.ln_vision(vision))
    codes = tokenizer.quantize.nearest(tokenizer.pre_quant_from_features(query))
    up = tokenizer.upsample(tokenizer.quantize.lookup(codes))
    decoded = tokenizer.project_image(tokenizer.image_tokens(up)).float()
    found = {"codes": codes, "decoded": F.normalize(decoded, dim=-1)}
    if opened.clip is not None:
        target = _clip_embeddings(images, opened)
        found |= {"target": F.normalize(target, dim=-1), "mse": (decoded - target).square().mean(1)}
    if stage1 is not None:
        own = vision if stage1.visual_encoder is tokenizer.visual_encoder else stage1.visual_encoder(pixels)
        queries = {"causal": stage1.query_features(own)}
        if tokenizer.config.recon_s:
            queries["rebuilt"] = tokenizer.rebuild_queries(up)
        for name, value in queries.items():  # the last query alone attends to all others
            found[name] = F.normalize(stage1.vision_proj(value[:, -1]), dim=-1).float()
    return found


@torch.no_grad()
def _clip_embeddings(images: Sequence[Image.Image], opened: OpenedTokenizer) -> Tensor:
    """CLIP image embeddings [N, E]."""
    assert opened.clip is not None
    pixels = opened.clip_transform.batch(list(images)).to(opened.clip.device, opened.clip.dtype)
    embeddings: Tensor = opened.clip(pixel_values=pixels).image_embeds
    return embeddings.float()


# ---- sections of the report


def _retrieval(seen: Pass, encoders: Mapping[str, TextEncoder], opened: OpenedTokenizer) -> Section:
    """Retrieval by every route there is."""
    captions, device = Captions.of(seen.captions), opened.tokenizer.device
    texts = {name: encoder.features(captions.texts).to(device) for name, encoder in encoders.items()}
    found: Section = {}
    for route, (name, side, what) in ROUTES.items():
        if name in seen.features and side in texts:
            images = torch.from_numpy(seen.features[name]).to(device)
            found[route] = {"route": what, "text": encoders[side].name, **retrieval(images, texts[side], captions)}
    return found


def _reconstruction(seen: Pass, rebuilt: Sequence[Image.Image], opened: OpenedTokenizer) -> Section:
    """How near codes bring back the image: as an embedding, and as an image under CLIP."""
    section: Section = {"clip": opened.clip_source, "rebuilt": len(rebuilt)}
    if "target" in seen.features:
        device = opened.tokenizer.device
        real, decoded = (torch.from_numpy(seen.features[name]).to(device) for name in ("target", "decoded"))
        section["embedding"] = {**_nearness(decoded, real), "mse": bootstrap(seen.features["mse"])}
        if rebuilt:
            drawn = torch.cat([_clip_embeddings(rebuilt[start:start + 32], opened)
                               for start in range(0, len(rebuilt), 32)])
            section["image_clip"] = _nearness(F.normalize(drawn, dim=-1), real)
    return section


def _nearness(found: Tensor, real: Tensor) -> Section:
    """Cosine of each row of `found` [Q, D] to its own image, and on average to the others; recall of its own image.

    `real` [N, D] are all images, of which the first Q are the ones that `found` stands for; all have unit length.
    """
    count, own = len(real), (found * real[:len(found)]).sum(1).double()
    others = (found.double() @ real.sum(0, dtype=torch.float64) - own) / (count - 1) if count > 1 else own[:0]
    order = ranks(found, real, np.arange(len(found))[:, None].repeat(2, axis=1))
    return {"n": len(found), "gallery": count, "cosine": bootstrap(own.cpu().numpy()),
            "cosine_to_others": bootstrap(others.cpu().numpy()),
            **{f"image_r{k}": bootstrap(order < k) for k in (1, 5)}}


# ---- files


def _sheet(source: PairSource, seen: Pass, rebuilt: Sequence[Image.Image]) -> Image.Image:
    """The first images with a caption, above what their codes draw."""
    real = [Cell(_read(source, row)[1], texts[0]) for row, texts in zip(seen.rows[:SHOWN], seen.captions, strict=False)]
    rows = interleaved_rows(COLUMNS, ("image", real), ("from 32 codes", [Cell(image) for image in rebuilt[:SHOWN]]))
    return contact_sheet(rows, f"{len(seen.rows)} images", CELL, COLUMNS, 4)


def _write(report: Section, sheet: Image.Image, out: Path) -> None:
    """Raises ConfigError: the folder cannot be written."""
    lines = [{"features": name, "route": route["route"], "text": route["text"], "model": report["model"],
              "n": route["n"], **route["lavis"]} for name, route in report["retrieval"].items()]
    with writing(out, ConfigError):
        replace_text(out / "report.json", json.dumps(report, indent=1, ensure_ascii=False) + "\n")
        with replacing(out / SHEET) as file:
            sheet.save(file, "JPEG", quality=88)
        replace_text(out / "report.md", markdown(report))
        with open(out / "evaluate.txt", "a", encoding="utf-8") as handle:
            handle.writelines(json.dumps(line) + "\n" for line in lines)


def markdown(report: Mapping[str, Any]) -> str:
    """The report (plain JSON values) as Markdown."""
    routes, near, codes = report["retrieval"], report["reconstruction"], dict(report["codes"])
    levels = [f"{way}_r{k}" for way in ("txt", "img") for k in LEVELS]
    parts = {"embedding": "decoded embedding against CLIP's embedding of the image",
             "image_clip": "rebuilt image against the image, under CLIP"}
    bits = {f"entropy of the first {n} codes, bits": value for n, value in codes.pop("prefix_bits").items()}
    sections = {
        "Image ↔ text retrieval": _table(("from", "text", *levels, "mean"), [
            (f"{name}: {route['route']}", route["text"], *(route[level] for level in levels), route["r_mean"])
            for name, route in routes.items()]) if routes else
        "Not measured: give a stage-1 checkpoint (`--stage1`) or a CLIP text encoder (`--clip-text`).\n",
        "Reconstruction": _table(("", "cosine", "cosine to others", "image R@1", "image R@5", "gallery", "MSE"), [
            (label, *(near[name].get(key) for key in ("cosine", "cosine_to_others", "image_r1", "image_r5", "gallery",
                                                      "mse"))) for name, label in parts.items() if name in near])
        + f"\nCLIP: `{near['clip']}`.\n" if "embedding" in near else
        "Not measured: no CLIP vision encoder of the decoded embedding's width.\n",
        "Codes": _table(("", ""), {**codes, **bits}.items()),
        "Left out": "".join(f"* {line}\n" for line in report["left_out"]),
        "Images": f"![{report['sheet']}]({report['sheet']})\n",
        "Run": "".join(f"* {line}\n" for line in (
            f"`{report['command']}`", f"{report['date']}, commit {report['commit']}, {report['seconds']} s",
            f"{report['runtime']}; {_listed(report['hardware'])}", _listed(report["settings"]),
            _listed(report["versions"])))}
    head = (f"# Tokenizer {report['model']}\n\n{report['n']:,} images with {report['captions']:,} captions "
            f"({_listed(report['data'])}). Shares have a 95 % interval and the number of samples; a text that captions "
            "several images is right for each, ties count as wrong.\n")
    return head + "".join(f"\n## {title}\n\n{text}" for title, text in sections.items() if text)


def _table(head: Sequence[str], rows: Any) -> str:
    lines = [head, ["---"] * len(head), *([*map(_cell, row)] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cell(value: Any) -> str:
    """An estimate with its interval, a number, a text, or a dash."""
    if isinstance(value, Mapping) and value["value"] is not None:
        return f"{value['value']:.3f} ({value['low']:.2f}–{value['high']:.2f}), n {value['n']}"
    if value is None or isinstance(value, Mapping):
        return "–"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items() if value is not None)
