"""Image ↔ text retrieval with LAVIS's metrics, for any number of images: scores are computed in blocks of queries.

`txt_r5`: share of images with one of their captions among the five best texts; `img_r5`: share of captions with their
image among the five best images; `agg_metrics`: mean of the three text levels. LAVIS's `k_test` (128 scores per query)
cannot change a recall at 10. Unlike in LAVIS, a text that captions several images is correct for each, and ties count
as errors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from seed_multimodal.errors import CheckpointError
from seed_multimodal.evaluation.metrics import bootstrap
from seed_multimodal.nn.eva import EvaVit
from seed_multimodal.seed.captions import caption_text, load_caption_tokenizer
from seed_multimodal.seed.checkpoints import VISION, fill_vision, load_clip_text
from seed_multimodal.seed.modeling import Seed2Tokenizer
from seed_multimodal.seed.training import Stage1Model
from seed_multimodal.weights import assign_strictly, load_state_dict

LEVELS = (1, 5, 10)
BLOCK = 1 << 26  # scores at a time: 256 MB
MAX_PIECES = 35  # maximum text length, as in LAVIS
STAGE1_IGNORED = ("Qformer.cls.*", "itm_head.*", "embedding_head.*")
WORDS_TABLE = "Qformer.bert.embeddings.word_embeddings.weight"
Ints = NDArray[np.int64]
TextEncoder = Callable[[Sequence[str]], Tensor]  # texts → unit features [T, E]


# ---- ranks


@torch.no_grad()
def ranks(queries: Tensor, gallery: Tensor, pairs: Ints, counts: Ints | None = None) -> Ints:
    """Number of wrong items that score at least as high as the best right item of each query [Q].

    Args:
        queries, gallery: features [Q, E] and [G, E] on one device; scores are dot products.
        pairs: [P, 2] of query and right item, sorted by query; each query has one or more.
        counts: how often each item stands in the gallery [G]; None: once.
    """
    found, device = np.empty(len(queries), np.int64), gallery.device
    rows = max(1, BLOCK // len(gallery))
    often = (
        torch.ones(len(gallery)).to(gallery)
        if counts is None
        else torch.from_numpy(counts).to(gallery)
    )
    for start in range(0, len(queries), rows):
        scores = queries[start : start + rows] @ gallery.T
        here = slice(*np.searchsorted(pairs[:, 0], [start, start + len(scores)]))
        query, item = torch.from_numpy(pairs[here]).to(device).unbind(1)
        right = scores[query - start, item]
        best = torch.full_like(scores[:, 0], -torch.inf).scatter_reduce_(
            0, query - start, right, "amax"
        )
        hits = torch.zeros_like(best).index_add_(
            0, query - start, (right >= best[query - start]) * often[item]
        )
        found[start : start + len(scores)] = (scores.ge_(best[:, None]) @ often - hits).cpu()
    return found


def retrieval(
    images: Tensor, texts: TextEncoder, captions: Sequence[Sequence[str]]
) -> dict[str, Any]:
    """Both directions between unit features of images [N, E] and their captions.

    Returns:
        n, texts (captions), `txt_r1` … `img_r10` as `Estimate`s (captions of one image are resampled together), and
        `lavis`: LAVIS's dictionary, in percent.
    """
    numbers: dict[str, int] = {}  # distinct texts are embedded and scored once
    text = np.array(
        [numbers.setdefault(one, len(numbers)) for row in captions for one in row], np.int64
    )
    image = np.repeat(np.arange(len(captions)), [len(row) for row in captions])
    different = list(numbers)
    embedded = torch.cat(
        [texts(different[i : i + 256]).to(images) for i in range(0, len(different), 256)]
    )
    pairs = np.unique(np.stack([image, text], 1), axis=0)
    to_text = ranks(images, embedded, pairs, np.bincount(text))
    to_image = ranks(embedded, images, np.unique(pairs[:, ::-1], axis=0))[text]
    return {
        "n": len(images),
        "texts": len(text),
        **{f"txt_r{k}": bootstrap(to_text < k) for k in LEVELS},
        **{f"img_r{k}": bootstrap(to_image < k, image) for k in LEVELS},
        "lavis": lavis_metrics(to_text, to_image),
    }


def lavis_metrics(to_text: Ints, to_image: Ints) -> dict[str, float]:
    """The dictionary that LAVIS's retrieval task reports, in percent."""
    result: dict[str, float] = {}
    for way, found in (("txt", to_text), ("img", to_image)):
        levels = {f"{way}_r{k}": 100.0 * float((found < k).mean()) for k in LEVELS}
        result |= {**levels, f"{way}_r_mean": float(np.mean(list(levels.values())))}
    return result | {
        "r_mean": (result["txt_r_mean"] + result["img_r_mean"]) / 2,
        "agg_metrics": result["txt_r_mean"],
    }


# ---- text encoders


def stage1_texts(model: Stage1Model, words: str | Path) -> TextEncoder:
    """Stage 1's text path (`blip_caption`, word pieces, first token, projection).

    Args:
        words: folder or hub id of stage 1's BERT or multimodal tokenizer.

    Raises:
        CheckpointError: no tokenizer, or one of another size.
    """
    pieces = load_caption_tokenizer(words, MAX_PIECES, full=False)
    size = model.Qformer.bert.embeddings.word_embeddings.num_embeddings
    if size not in (pieces.size, pieces.size - 1):  # the row of [DEC] may be missing
        raise CheckpointError(
            f"{words}: has {pieces.size - 1} word pieces; the stage-1 checkpoint's word table has "
            f"{size} rows (one more than the pieces is right); name stage 1's by --text-tokenizer."
        )

    @torch.no_grad()
    def embed(texts: Sequence[str]) -> Tensor:
        ids, mask = pieces([caption_text(text) for text in texts])
        return model.text_features(
            ids.to(model.query_tokens.device), mask.to(model.query_tokens.device)
        )

    return embed


def clip_texts(source: str | Path, device: torch.device) -> TextEncoder:
    """The text encoder of a CLIP folder. Raises CheckpointError: no folder, no text encoder, or no tokenizer."""
    from transformers import CLIPTokenizer

    place = Path(source)
    encoder = load_clip_text(place, device=device, log=None)
    if not any((place / name).is_file() for name in ("vocab.json", "tokenizer.json")):
        raise CheckpointError(f"{place}: holds no CLIP tokenizer (vocab.json and merges.txt).")
    return text_embedder(
        encoder, CLIPTokenizer.from_pretrained(str(place), local_files_only=True), device
    )


def text_embedder(encoder: Any, tokenizer: Any, device: torch.device) -> TextEncoder:
    """Texts → normalised embeddings, by a CLIP text model and its tokenizer."""
    most = encoder.config.max_position_embeddings

    @torch.no_grad()
    def embed(texts: Sequence[str]) -> Tensor:
        ids = tokenizer(
            list(texts), padding=True, truncation=True, max_length=most, return_tensors="pt"
        ).to(device)
        return F.normalize(encoder(**ids).text_embeds.float(), dim=-1)

    return embed


def load_stage1(file: str | Path, tokenizer: Seed2Tokenizer) -> Stage1Model:
    """A stage-1 checkpoint in eval mode on the tokenizer's device, with the tokenizer's vision encoder if the file has
    none.

    Raises:
        CheckpointError: not a stage-1 checkpoint, or of other sizes than the tokenizer.
    """
    state = load_state_dict(file)
    for name in (WORDS_TABLE, "text_proj.weight", "vision_proj.weight"):
        if name not in state:
            raise CheckpointError(f"{file}: not a stage-1 checkpoint: it holds no {name!r}.")
    with torch.device("meta"):
        model = Stage1Model(
            tokenizer.config,
            vocab_size=len(state[WORDS_TABLE]),
            lm_head=False,
            embed_dim=len(state["vision_proj.weight"]),
        )
    model.visual_encoder = nn.Identity()
    model.to_empty(device="cpu")
    positions = model.Qformer.bert.embeddings.position_ids
    positions.copy_(torch.arange(positions.shape[1])[None])
    rest = {name: value for name, value in state.items() if not name.startswith(VISION)}
    assign_strictly(
        model,
        rest,
        file,
        allow_missing=["*position_ids"],
        allow_unexpected=STAGE1_IGNORED,
        foreign=True,
    )
    vision = {
        name.removeprefix(VISION): value for name, value in state.items() if name.startswith(VISION)
    }
    model.visual_encoder = EvaVit(tokenizer.config.vit) if vision else tokenizer.visual_encoder
    if vision:
        fill_vision(model.visual_encoder, vision, file)
    return model.to(tokenizer.device, tokenizer.dtype).requires_grad_(False).eval()
