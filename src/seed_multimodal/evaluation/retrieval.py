"""Image ↔ text retrieval with LAVIS's metrics, for any number of images: scores are computed in blocks of queries.

`txt_r5`: share of images with one of their captions among the five best texts; `img_r5`: share of captions with their
image among the five best images; `agg_metrics`: mean of the three text levels. LAVIS drops all but the 128 best scores
of a query (`k_test`), which cannot change a recall at 10 or less. Unlike LAVIS, a text that captions several images is
right for each of them, and ties count against the query.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from seed_multimodal.errors import CheckpointError
from seed_multimodal.evaluation.metrics import bootstrap
from seed_multimodal.language.captions import caption_text
from seed_multimodal.language.word_pieces import open_words
from seed_multimodal.tokenizers.checkpoints import fill_tower
from seed_multimodal.tokenizers.clip_weights import load_clip_text
from seed_multimodal.tokenizers.released import TOWER
from seed_multimodal.tokenizers.seed2 import Seed2Tokenizer
from seed_multimodal.tokenizers.stage1 import Stage1Model
from seed_multimodal.vision.eva import EvaVit
from seed_multimodal.weights import assign_strictly, load_state_dict

LEVELS = (1, 5, 10)
BLOCK = 1 << 26  # scores at a time: 256 MB
MAX_PIECES = 35  # texts are cut to so many word pieces, as in LAVIS
STAGE1_IGNORED = ("Qformer.cls.*", "itm_head.*", "embedding_head.*")
WORDS_TABLE = "Qformer.bert.embeddings.word_embeddings.weight"
Ints = NDArray[np.int64]


# ---- ranks


@torch.no_grad()
def ranks(queries: Tensor, gallery: Tensor, pairs: Ints, counts: Ints | None = None) -> Ints:
    """How many wrong items score at least as high as the best right item of each query [Q]; 0 is best.

    Args:
        queries, gallery: features [Q, E] and [G, E] on one device; scores are dot products.
        pairs: [P, 2] of query and right item, sorted by query; each query has one or more.
        counts: how often each item stands in the gallery [G]; None: once.
    """
    found, device = np.empty(len(queries), np.int64), gallery.device
    rows = max(1, BLOCK // len(gallery))
    often = torch.ones(len(gallery)).to(gallery) if counts is None else torch.from_numpy(counts).to(gallery)
    for start in range(0, len(queries), rows):
        scores = queries[start:start + rows] @ gallery.T
        here = slice(*np.searchsorted(pairs[:, 0], [start, start + len(scores)]))
        query, item = torch.from_numpy(pairs[here]).to(device).unbind(1)
        right = scores[query - start, item]
        best = torch.full_like(scores[:, 0], -torch.inf).scatter_reduce_(0, query - start, right, "amax")
        hits = torch.zeros_like(best).index_add_(0, query - start, (right >= best[query - start]) * often[item])
        found[start:start + len(scores)] = (scores.ge_(best[:, None]) @ often - hits).cpu()
    return found


@dataclass(frozen=True)
class Captions:
    """The captions of N images: each different text once, and for each of T captions its text and its image [T]."""

    texts: list[str]
    text: Ints
    image: Ints

    @classmethod
    def of(cls, captions: Sequence[Sequence[str]]) -> Captions:
        """From the captions of each image."""
        numbers: dict[str, int] = {}
        text = [numbers.setdefault(one, len(numbers)) for row in captions for one in row]
        image = np.repeat(np.arange(len(captions)), [len(row) for row in captions])
        return cls(list(numbers), np.array(text, np.int64), image)


def retrieval(images: Tensor, texts: Tensor, captions: Captions) -> dict[str, Any]:
    """Both directions between unit features of images [N, E] and of `captions.texts` [W, E].

    Returns:
        n, texts (captions), `txt_r1` … `img_r10` as `Estimate`s (captions of one image are resampled together),
        `r_mean`, and `lavis`: LAVIS's dictionary, in percent.
    """
    pairs = np.unique(np.stack([captions.image, captions.text], 1), axis=0)
    to_text = ranks(images, texts, pairs, np.bincount(captions.text))
    to_image = ranks(texts, images, np.unique(pairs[:, ::-1], axis=0))[captions.text]
    section: dict[str, Any] = {"n": len(images), "texts": len(captions.text)}
    section |= {f"txt_r{k}": bootstrap(to_text < k) for k in LEVELS}
    section |= {f"img_r{k}": bootstrap(to_image < k, captions.image) for k in LEVELS}
    section["r_mean"] = float(np.mean([section[f"{way}_r{k}"].value for way in ("txt", "img") for k in LEVELS]))
    section["lavis"] = lavis_metrics(to_text, to_image)
    return section


def lavis_metrics(to_text: Ints, to_image: Ints) -> dict[str, float]:
    """The dictionary that LAVIS's retrieval task reports, in percent."""
    result: dict[str, float] = {}
    for way, found in (("txt", to_text), ("img", to_image)):
        levels = {f"{way}_r{k}": 100.0 * float((found < k).mean()) for k in LEVELS}
        result |= {**levels, f"{way}_r_mean": float(np.mean(list(levels.values())))}
    return result | {"r_mean": (result["txt_r_mean"] + result["img_r_mean"]) / 2, "agg_metrics": result["txt_r_mean"]}


# ---- text encoders


@dataclass(frozen=True)
class TextEncoder:
    """Texts → unit features; `name` says whose."""

    name: str
    embed: Callable[[Sequence[str]], Tensor]

    @torch.no_grad()
    def features(self, texts: Sequence[str], batch: int = 256) -> Tensor:
        """[len(texts), E] float32, on the CPU."""
        return torch.cat([self.embed(texts[i:i + batch]).float().cpu() for i in range(0, len(texts), batch)])


def stage1_texts(model: Stage1Model, words: str | Path) -> TextEncoder:
    """Stage 1's text path (`blip_caption`, word pieces, first token, projection).

    Args:
        words: folder or hub id of the BERT or multimodal tokenizer whose word pieces stage 1 read.

    Raises:
        CheckpointError: no tokenizer, or one of another size.
    """
    pieces = open_words(words, MAX_PIECES, full=False)
    size = model.Qformer.bert.embeddings.word_embeddings.num_embeddings
    if size not in (pieces.size, pieces.size - 1):  # the row of [DEC] may be missing
        raise CheckpointError(f"{words}: has {pieces.size - 1} word pieces; the stage-1 checkpoint's word table has "
                              f"{size} rows (one more than the pieces is right); name stage 1's by --text-tokenizer.")
    device = model.query_tokens.device

    def embed(texts: Sequence[str]) -> Tensor:
        ids, mask = pieces([caption_text(text) for text in texts])
        return model.text_features(ids.to(device), mask.to(device))

    return TextEncoder("stage-1 text path", embed)


def clip_texts(source: str | Path, device: torch.device) -> TextEncoder:
    """The text encoder of a CLIP folder. Raises CheckpointError: no folder, no text encoder, or no tokenizer."""
    place = Path(source)
    encoder, tokenizer = load_clip_text(place, device=device, log=None), clip_tokenizer(place)

    def embed(texts: Sequence[str]) -> Tensor:
        found = tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt",
                          max_length=encoder.config.max_position_embeddings).to(device)
        return F.normalize(encoder(**found).text_embeds.float(), dim=-1)

    return TextEncoder(f"CLIP text encoder {place.name}", embed)


def clip_tokenizer(place: Path) -> Any:
    """The tokenizer of a CLIP folder. Raises CheckpointError: there is none."""
    from transformers import CLIPTokenizer

    if not any((place / name).is_file() for name in ("vocab.json", "tokenizer.json")):
        raise CheckpointError(f"{place}: holds no CLIP tokenizer (vocab.json and merges.txt).")
    return CLIPTokenizer.from_pretrained(str(place), local_files_only=True)


def load_stage1(file: str | Path, tokenizer: Seed2Tokenizer) -> Stage1Model:
    """A stage-1 checkpoint in eval mode on the tokenizer's device.

    The vision encoder is the tokenizer's own module where the file has none or an equal one, so features are shared.

    Raises:
        CheckpointError: not a stage-1 checkpoint, or one of other sizes than the tokenizer.
    """
    state = load_state_dict(file)
    for name in (WORDS_TABLE, "text_proj.weight", "vision_proj.weight"):
        if name not in state:
            raise CheckpointError(f"{file}: not a stage-1 checkpoint: it holds no {name!r}.")
    with torch.device("meta"):
        model = Stage1Model(tokenizer.config, vocab_size=len(state[WORDS_TABLE]), lm_head=False,
                            embed_dim=len(state["vision_proj.weight"]))
    model.visual_encoder = nn.Identity()
    model.to_empty(device="cpu")
    positions = model.Qformer.bert.embeddings.position_ids
    positions.copy_(torch.arange(positions.shape[1])[None])
    rest = {name: value for name, value in state.items() if not name.startswith(TOWER)}
    assign_strictly(model, rest, file, allow_missing=["*position_ids"], allow_unexpected=STAGE1_IGNORED, foreign=True)
    own = tokenizer.visual_encoder.state_dict()
    vision = {name.removeprefix(TOWER): value for name, value in state.items() if name.startswith(TOWER)}
    model.visual_encoder = tokenizer.visual_encoder
    if any(name not in own or not torch.equal(own[name].cpu(), value.to(own[name].dtype))
           for name, value in vision.items()):
        model.visual_encoder = EvaVit(tokenizer.config.vit)
        fill_tower(model.visual_encoder, vision, file)
    return model.to(tokenizer.device, tokenizer.dtype).requires_grad_(False).eval()
