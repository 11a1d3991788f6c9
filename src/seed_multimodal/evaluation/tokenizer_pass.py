"""One pass over the pictures: everything that is compared later, computed once per picture.

A sample that cannot be used, for its picture or its caption, is named, left out and counted; 20 of them in a row end
the run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from seed_multimodal.data.formats.pairs import SAMPLE_FAULTS, PairSource
from seed_multimodal.data.stream.skip_budget import SkipBudget
from seed_multimodal.errors import DataError
from seed_multimodal.evaluation.metrics import FloatArray
from seed_multimodal.evaluation.tokenizer_open import OpenedTokenizer
from seed_multimodal.images.open import open_image
from seed_multimodal.tokenizers.stage1 import Stage1Model

MAX_BAD_IN_A_ROW = 20
Log = Callable[[str], None]


@dataclass
class PassResult:
    """Result of a pass; row i of every array is picture i.

    Attributes:
        rows: number of the picture in its source.
        codes: [N, 32]; decoded: image embeddings [N, E] from the codes.
        target: CLIP's embedding of the picture [N, E], not normalised, or None.
        causal: unit features of the last query under stage 1 [N, P], or None.
        rebuilt: the same from the codes, rebuilt by `blocks` [N, P], or None.
        bad: (name, reason) of samples that could not be used.
    """

    rows: list[int]
    keys: list[str]
    captions: list[list[str]]
    codes: NDArray[np.int64]
    decoded: FloatArray
    target: FloatArray | None
    causal: FloatArray | None
    rebuilt: FloatArray | None
    bad: list[tuple[str, str]] = field(default_factory=list)


def choose_rows(count: int, limit: int | None, seed: int) -> list[int]:
    """Row numbers to look at, all or `limit` of them, in an order drawn by `seed`: the first few are a fair sample."""
    return np.random.default_rng(seed).permutation(count)[:limit].tolist()


def read_picture(source: PairSource, row: int) -> tuple[str, list[str], Image.Image]:
    """Name, captions and picture of a row; raises one of `SAMPLE_FAULTS` where it cannot be used."""
    pair = source.read(row)
    name = f"{pair.name} ({pair.image})" if isinstance(pair.image, Path) else pair.name
    return pair.key, list(pair.captions), open_image(pair.image, name=name)


@torch.no_grad()
def run_pass(source: PairSource, rows: Sequence[int], opened: OpenedTokenizer, *, stage1: Stage1Model | None = None,
         batch: int = 64, log: Log = print) -> PassResult:
    """Encode the pictures `rows` of `source` in batches.

    Raises:
        DataError: no sample could be used, too many in a row could not, or one gave numbers that are not finite.
    """
    found: dict[str, list[Tensor]] = {}
    seen = PassResult([], [], [], np.zeros((0, 0), np.int64), np.zeros((0, 0)), None, None, None)
    for pictures in _batches(source, rows, batch, seen, log):
        for name, value in _features(pictures, opened, stage1).items():
            found.setdefault(name, []).append(value.cpu())
    if not seen.rows:
        raise DataError(f"none of the {len(rows)} samples could be used.")
    for name, parts in found.items():
        value = torch.cat(parts)
        finite = value.isfinite().all(dim=1)
        if not bool(finite.all()):
            raise DataError(f"{seen.keys[int(finite.int().argmin())]}: its {name!r} holds numbers that are not finite; "
                            "the weights are damaged, or need a wider --dtype.")
        setattr(seen, name, value.numpy() if name == "codes" else value.float().numpy())
    return seen


def _batches(source: PairSource, rows: Sequence[int], batch: int, seen: PassResult,
             log: Log) -> Iterator[list[Image.Image]]:
    """Pictures in batches; their names and captions, and what is bad, go to `seen`."""
    pictures: list[Image.Image] = []
    budget = SkipBudget(MAX_BAD_IN_A_ROW)
    for row in rows:
        try:
            key, captions, picture = read_picture(source, row)
        except SAMPLE_FAULTS as error:
            seen.bad.append((source.key(row), str(error)))
            log(f"left out: {error}")
            if budget.spend():
                raise DataError(f"{budget.broken} samples in a row cannot be used, the last: {error}") from error
            continue
        budget.good()
        seen.rows.append(row)
        seen.keys.append(key)
        seen.captions.append(captions)
        pictures.append(picture)
        if len(pictures) == batch:
            yield pictures
            pictures = []
    if pictures:
        yield pictures


def _features(pictures: list[Image.Image], opened: OpenedTokenizer, stage1: Stage1Model | None) -> Mapping[str, Tensor]:
    tokenizer, config = opened.tokenizer, opened.tokenizer.config
    pixels = opened.transform.batch(pictures).to(tokenizer.device, tokenizer.dtype)
    if opened.fast is not None:
        vit = opened.fast.vit_features(pixels)
        codes = opened.fast.codes_from(vit)
        vit = vit.to(tokenizer.dtype)
    else:
        vit = tokenizer.visual_encoder(pixels)
        query = tokenizer.query_features_from(tokenizer.ln_vision(vit))
        codes = tokenizer.quantize.nearest(tokenizer.pre_quant_from_features(query))
    up = tokenizer.upsample(tokenizer.quantize.lookup(codes))
    found = {"codes": codes, "decoded": tokenizer.project_image(tokenizer.image_tokens(up))}
    if opened.clip is not None:
        found["target"] = clip_embeddings(pictures, opened)
    if stage1 is not None:
        own = vit if stage1.visual_encoder is tokenizer.visual_encoder else stage1.visual_encoder(pixels)
        found["causal"] = _last_query(stage1, stage1.query_features(own))
        if config.recon_s:
            found["rebuilt"] = _last_query(stage1, tokenizer.rebuild_queries(up))
    return found


def clip_embeddings(pictures: Sequence[Image.Image], opened: OpenedTokenizer) -> Tensor:
    """CLIP image embeddings `[N, E]` of pictures, not normalised."""
    assert opened.clip is not None
    pixels = opened.clip_transform.batch(list(pictures)).to(opened.clip.device, opened.clip.dtype)
    with torch.no_grad():
        return opened.clip(pixel_values=pixels).image_embeds.float()


def _last_query(stage1: Stage1Model, queries: Tensor) -> Tensor:
    """The last query, which alone sees all the others, in stage 1's space: `[B, 32, D]` → unit `[B, P]`."""
    return F.normalize(stage1.vision_proj(queries[:, -1]), dim=-1)
