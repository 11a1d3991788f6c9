"""The text sides that a tokenizer's pictures are compared with: stage 1's own text path, or a CLIP text tower.

A shipped tokenizer holds neither: stage 1's checkpoint does (`--stage1`), and a CLIP folder with a text tower does
(`--clip-text`). Texts are cut to 35 word pieces, as the released evaluation does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seed_multimodal.errors import CheckpointError
from seed_multimodal.language.captions import caption_text
from seed_multimodal.language.word_pieces import BertWords, PieceWords, open_words
from seed_multimodal.tokenizers.checkpoints import fill_tower
from seed_multimodal.tokenizers.clip_weights import load_clip_text
from seed_multimodal.tokenizers.released import TOWER
from seed_multimodal.tokenizers.seed2 import Seed2Tokenizer
from seed_multimodal.tokenizers.stage1 import Stage1Model
from seed_multimodal.vision.eva import EvaVit
from seed_multimodal.weights import assign_strictly, load_state_dict

MAX_PIECES = 35
STAGE1_IGNORED = ("Qformer.cls.*", "itm_head.*", "embedding_head.*")
WORDS_TABLE = "Qformer.bert.embeddings.word_embeddings.weight"
Words = Callable[[Sequence[str]], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class TextSide:
    """Texts → unit features `[T, E]` on the CPU; `name` says whose."""

    name: str
    embed: Callable[[Sequence[str]], Tensor]

    def features(self, texts: Sequence[str], batch: int = 256) -> Tensor:
        """Unit features `[T, E]` of all texts, float32."""
        return torch.cat([self.embed(texts[i:i + batch]).float().cpu() for i in range(0, len(texts), batch)])


# ---- word pieces


def find_words(size: int, given: str | Path | None, tokenizer_folder: Path) -> Words:
    """The word pieces that a table of `size` rows belongs to.

    Args:
        given: folder (or hub id) of a BERT or multimodal tokenizer; default: the one in `tokenizer_folder` if its
            size fits, else bert-base-uncased.

    Raises:
        CheckpointError: a multimodal tokenizer of another size, or no BERT tokenizer.
    """
    place = Path(given) if given is not None else tokenizer_folder
    if given is None and not _fits(place, size):
        local = Path("pretrained/bert-base-uncased")
        place = local if local.is_dir() else Path("bert-base-uncased")
    words = open_words(place, MAX_PIECES, full=False)
    if size not in (words.size, words.size - isinstance(words, BertWords)):
        raise CheckpointError(f"{place}: has {words.size - 1} word pieces; the stage-1 checkpoint's word table has "
                              f"{size} rows (one more than the pieces is right); name stage 1's by --text-tokenizer.")
    return words


def _fits(folder: Path, size: int) -> bool:
    """Whether the folder holds a multimodal tokenizer of the word table's size."""
    return (folder / "tokenizer.model").is_file() and PieceWords(folder, MAX_PIECES).size == size


# ---- stage 1


def load_stage1(file: str | Path, tokenizer: Seed2Tokenizer) -> Stage1Model:
    """A stage-1 checkpoint as a model in eval mode on the tokenizer's device.

    The vision tower is the tokenizer's own module if the file has none or an equal one, so features can be shared.

    Raises:
        CheckpointError: not a stage-1 checkpoint, or one of other sizes than the tokenizer.
    """
    state = load_state_dict(file)
    for name in (WORDS_TABLE, "text_proj.weight", "vision_proj.weight"):
        if name not in state:
            raise CheckpointError(f"{file}: not a stage-1 checkpoint: it holds no {name!r} (its first tensor is "
                                  f"{next(iter(state))!r}).")
    with torch.device("meta"):
        model = Stage1Model(tokenizer.config, vocab_size=len(state[WORDS_TABLE]), lm_head=False,
                            embed_dim=len(state["vision_proj.weight"]))
    model.visual_encoder = nn.Identity()
    model.to_empty(device="cpu")
    positions = model.Qformer.bert.embeddings.position_ids
    positions.copy_(torch.arange(positions.shape[1])[None])
    rest = {name: value for name, value in state.items() if not name.startswith(TOWER)}
    assign_strictly(model, rest, file, allow_missing=["*position_ids"], allow_unexpected=STAGE1_IGNORED, foreign=True)
    tower = {name.removeprefix(TOWER): value for name, value in state.items() if name.startswith(TOWER)}
    model.visual_encoder = _shared_tower(tower, tokenizer, file)
    return model.to(tokenizer.device, tokenizer.dtype).requires_grad_(False).eval()


def _shared_tower(tower: dict[str, Tensor], tokenizer: Seed2Tokenizer, file: str | Path) -> EvaVit:
    own = {name: value.cpu() for name, value in tokenizer.visual_encoder.state_dict().items()}
    if all(name in own and own[name].shape == value.shape and torch.equal(own[name], value.to(own[name].dtype))
           for name, value in tower.items()):
        return tokenizer.visual_encoder
    other = EvaVit(tokenizer.config.vit)
    fill_tower(other, tower, file)
    return other


def stage1_texts(model: Stage1Model, words: Words) -> TextSide:
    """Captions as stage 1 read them: `blip_caption`, word pieces, first token, projection."""
    device = model.query_tokens.device

    @torch.no_grad()
    def embed(texts: Sequence[str]) -> Tensor:
        ids, mask = words([caption_text(text) for text in texts])
        return model.text_features(ids.to(device), mask.to(device))

    return TextSide("stage-1 text path", embed)


# ---- CLIP


def clip_texts(source: str | Path, device: torch.device) -> TextSide:
    """The text tower of a CLIP folder.

    Raises:
        CheckpointError: no such folder, no text tower in it, or no tokenizer.
    """
    place = Path(source)
    tower = load_clip_text(place, device=device, log=None)
    tokenizer = clip_tokenizer(place)

    @torch.no_grad()
    def embed(texts: Sequence[str]) -> Tensor:
        found = tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt").to(device)
        return F.normalize(tower(**found).text_embeds.float(), dim=-1)

    return TextSide(f"CLIP text tower {place.name}", embed)


def has_clip_tokenizer(place: Path) -> bool:
    """Whether a folder holds CLIP's tokenizer."""
    return any((place / name).is_file() for name in ("vocab.json", "tokenizer.json"))


def clip_tokenizer(place: Path) -> Any:
    """The tokenizer of a CLIP folder. Raises CheckpointError: there is none."""
    from transformers import CLIPTokenizer

    advice = f"{place}: holds no CLIP tokenizer (vocab.json and merges.txt)."
    if not has_clip_tokenizer(place):
        raise CheckpointError(advice)
    try:
        return CLIPTokenizer.from_pretrained(str(place), local_files_only=True)
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(advice) from error
