"""Evaluation of a tokenizer: retrieval, reconstruction, codebook, contact sheet; no language model is loaded.

    seed eval tokenizer --model pretrained/nano --data nano --out outputs/tokenizer_eval

Image ↔ text retrieval is measured from the causal embeddings (before the codes) and from the codes, so that the
difference is the loss by the codebook. Codes are compared with texts by the first route possible:

    blocks     codes → queries rebuilt by stage 2's `blocks` → stage 1's projection against its text path
    embedding  codes → decoded image embedding against a CLIP text tower of the same space

Writes report.json, report.md, reconstructions.jpg, and a line for each retrieval into evaluate.txt (LAVIS's names).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from seed_multimodal.data.formats.pairs import PairSource, open_pairs
from seed_multimodal.device import RELEASED_FP16, choose_device
from seed_multimodal.disk import writable_folder
from seed_multimodal.errors import CheckpointError, ConfigError
from seed_multimodal.evaluation import machine
from seed_multimodal.evaluation.metrics import FloatArray, bootstrap, codebook_statistics, cosine, plain, retrieval_at_k
from seed_multimodal.evaluation.tokenizer_open import NONE, OpenedTokenizer, open_tokenizer
from seed_multimodal.evaluation.tokenizer_pass import PassResult, choose_rows, clip_embeddings, read_picture, run_pass
from seed_multimodal.evaluation.tokenizer_report import reconstruction_sheet, write_report
from seed_multimodal.evaluation.tokenizer_retrieval import K_TEST, Captions, retrieval
from seed_multimodal.evaluation.tokenizer_text import TextSide, clip_texts, find_words, load_stage1, stage1_texts
from seed_multimodal.settings import check_settings, setting

Log = Callable[[str], None]
Section = dict[str, Any]
SHOWN = 24
# Routes from the codes to a text, the nearest to the released evaluation first.
FROM_CODES = ("codes_by_blocks", "codes_by_embedding")


@dataclass(frozen=True)
class EvalSettings:
    """Settings of the evaluation.

    Attributes:
        data: mapping for `data.formats.pairs.open_pairs`.
        stage1: stage-1 checkpoint with the text path; clip_text: CLIP folder with a text tower.
        text_tokenizer: word pieces of stage 1 (default: what fits).
        decoder, clip, interpolation: see `tokenizer_open.open_tokenizer`.
        limit: pictures, drawn by `seed` (None: all); rebuild: how many of them are rebuilt as pictures.
        fast: encode on packed weights (None: on CUDA); the report says what was done.
    """

    data: dict[str, Any] = field(default_factory=dict)
    stage1: str | None = None
    clip_text: str | None = None
    text_tokenizer: str | None = None
    decoder: str | None = None
    clip: str | None = None
    interpolation: str | None = None
    limit: int | None = setting(None, least=1)
    rebuild: int = setting(128, least=0)
    batch: int = setting(64, least=1)
    k_test: int = setting(K_TEST, least=1)
    seed: int = 0
    device: str = "auto"
    dtype: str = "auto"
    fast: bool | None = None


def evaluate_tokenizer(model: str | Path, out: str | Path, settings: EvalSettings, log: Log = print,
                       command: str | None = None) -> Section:
    """Measure, write into `out`, and return the report as plain JSON values.

    Args:
        command: how the run was started, for the report (default: the program's own line).

    Raises:
        CheckpointError, DataError, ConfigError: parts that cannot be loaded or do not belong together.
    """
    check_settings(settings, "eval tokenizer")
    if settings.seed < 0:
        raise ConfigError(f"The seed must be at least 0, got {settings.seed}.")
    # `none` leaves a part out.
    absent: dict[str, Any] = {name: None for name in ("stage1", "clip_text", "text_tokenizer")
                              if getattr(settings, name) == NONE}
    settings = replace(settings, **absent)
    start = time.monotonic()
    writable_folder(out, ConfigError)
    source = open_pairs(settings.data)
    runtime = choose_device(settings.device, settings.dtype, log=log, fp16=RELEASED_FP16)
    if settings.fast is None:
        settings = replace(settings, fast=runtime.device.type == "cuda")
    opened = open_tokenizer(model, runtime, decoder=settings.decoder, clip=settings.clip,
                            interpolation=settings.interpolation, fast=bool(settings.fast), log=log)
    texts = _text_sides(opened, settings, runtime.device)
    rows = choose_rows(len(source), settings.limit, settings.seed)
    log(f"Measuring {len(rows)} of {len(source)} pictures.")
    seen = run_pass(source, rows, opened, stage1=texts.stage1, batch=settings.batch, log=log)
    rebuilt = _rebuild(opened, seen, settings, log)
    report: Section = {
        "model": str(model), "data": settings.data, "n": len(seen.rows), "captions": sum(map(len, seen.captions)),
        "left_out": [f"{name}: {reason}" for name, reason in seen.bad],
        "retrieval": _retrieval_sections(seen, texts, settings),
        "reconstruction": _reconstruction(seen, rebuilt, opened),
        "codes": codebook_statistics(seen.codes, opened.tokenizer.config.codebook_size),
        "settings": {key: value for key, value in asdict(settings).items() if key != "data"},
        "runtime": str(runtime), **machine.circumstances(runtime.device, command or machine.script_line())}
    report["seconds"] = round(time.monotonic() - start, 1)
    write_report(report, reconstruction_sheet(seen, rebuilt, _shown(source, seen), _nearest(source, seen)), Path(out))
    return plain(report)


# ---- text


@dataclass
class _Texts:
    stage1: Any | None = None
    by_stage1: TextSide | None = None
    by_clip: TextSide | None = None


def _text_sides(opened: OpenedTokenizer, settings: EvalSettings, device: torch.device) -> _Texts:
    texts = _Texts()
    if settings.stage1 is not None:
        texts.stage1 = load_stage1(settings.stage1, opened.tokenizer)
        size = texts.stage1.Qformer.bert.embeddings.word_embeddings.num_embeddings
        texts.by_stage1 = stage1_texts(texts.stage1, find_words(size, settings.text_tokenizer, opened.folder))
    if settings.clip_text is not None:
        texts.by_clip = clip_texts(settings.clip_text, device)
        has, needs = texts.by_clip.features(["a"]).shape[1], opened.tokenizer.config.image_features_dim
        if has != needs:  # now: the pass over the pictures comes first
            raise CheckpointError(f"{settings.clip_text}: gives text features of width {has}, this tokenizer decodes "
                                  f"to width {needs}: they do not belong together.")
    return texts


def _retrieval_sections(seen: PassResult, texts: _Texts, settings: EvalSettings) -> Section:
    """Retrieval by every route there is; `causal_codes` repeats the first route from the codes."""
    captions = Captions.of(seen.captions)
    found: Section = {}

    def add(name: str, route: str, pictures: FloatArray | None, side: TextSide | None) -> None:
        if pictures is not None and side is not None:
            section = retrieval(pictures, side.features(captions.texts).numpy(), captions, settings.k_test)
            found[name] = {"route": route, "text": side.name, **section}

    add("causal_embeddings", "last query of the Q-Former, before the codes", seen.causal, texts.by_stage1)
    add("codes_by_blocks", "codes, queries rebuilt by blocks", seen.rebuilt, texts.by_stage1)
    add("codes_by_embedding", "codes, decoded image embedding", _unit(seen.decoded), texts.by_clip)
    add("pictures_by_clip", "the pictures themselves under CLIP (what the decoded embedding aims at)",
        None if seen.target is None else _unit(seen.target), texts.by_clip)
    return {"causal_codes": next((name for name in FROM_CODES if name in found), None), "routes": found}


# ---- pictures and codes


def _rebuild(opened: OpenedTokenizer, seen: PassResult, settings: EvalSettings, log: Log) -> list[Image.Image]:
    if not (settings.rebuild and opened.codec.can_draw):
        return []
    codes = seen.codes[:settings.rebuild]
    log(f"Rebuilding {len(codes)} pictures.")
    return opened.codec.draw(torch.from_numpy(codes), seed=settings.seed, batch_size=min(settings.batch, 32))


def _reconstruction(seen: PassResult, rebuilt: Sequence[Image.Image], opened: OpenedTokenizer) -> Section:
    """How near codes bring back the picture: as an embedding, and as a picture under CLIP."""
    section: Section = {"clip": opened.clip_source, "rebuilt": len(rebuilt)}
    if seen.target is not None:
        section["embedding"] = {**_nearness(seen.decoded, seen.target),
                                "mse": bootstrap(np.square(seen.decoded - seen.target).mean(1))}
        if rebuilt:
            section["picture_clip"] = _nearness(clip_embeddings(rebuilt, opened).numpy(), seen.target)
    return section


def _nearness(found: FloatArray, real: FloatArray) -> Section:
    """Cosine of each row of `found` [Q, D] to its own picture, to the others (if any) on average; the nearest picture.

    `real` [N, D] are all pictures, of which the first Q are the ones that `found` stands for.
    """
    left, right = _unit(found), _unit(real)
    similarity = left @ right.T
    own = np.eye(len(left), len(right), dtype=bool)
    others = (similarity.sum(1) - similarity[own]) / (len(right) - 1) if len(right) > 1 else []
    section: Section = {"n": len(left), "gallery": len(right), "cosine": bootstrap(cosine(found, real[:len(found)])),
                        "cosine_to_others": bootstrap(others)}
    for k in (1, 5):
        section[f"picture_r{k}"] = bootstrap(retrieval_at_k(similarity, own, k))
    return section


def _unit(features: FloatArray) -> FloatArray:
    return F.normalize(torch.from_numpy(np.asarray(features)).float(), dim=-1).numpy()


def _shown(source: PairSource, seen: PassResult) -> list[Image.Image]:
    return [read_picture(source, row)[2] for row in seen.rows[:SHOWN]]


def _nearest(source: PairSource, seen: PassResult) -> list[Image.Image]:
    """For each shown picture the other one whose codes decode nearest to it."""
    decoded = _unit(seen.decoded)
    similarity = decoded[:SHOWN] @ decoded.T
    np.fill_diagonal(similarity, -np.inf)
    return [read_picture(source, seen.rows[i])[2] for i in similarity.argmax(1).tolist()] if len(decoded) > 1 else []
