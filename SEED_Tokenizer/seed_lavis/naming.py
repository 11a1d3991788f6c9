"""Stage 2's `naming_weight` (ours): decoded image embeddings are contrasted with captions under a frozen text tower.

With the squared error alone the codes hold mostly layout; the content that a caption names is a small part of the
variance. The tower is the nano speed run's CLIP text side: `naming_tower` names its weights, and config.yaml beside
them its sizes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from seed_lavis.base import captions_of
from seed_lavis.log import log
from seed_lavis.options import Stage2Options, locate
from seed_lavis.text import caption_words
from seed_multimodal.errors import ConfigError
from seed_multimodal.language.word_pieces import PieceWords
from seed_multimodal.tokenizers.contrast import similarities
from seed_multimodal.vision.clip_towers import MAX_TEXT, load_text_tower

SCALE = 14.0  # inverse temperature


class Naming:
    """The frozen text tower and its word pieces.

    Raises:
        ConfigError: an option is missing. CheckpointError: files that are not there, or of another size.
    """

    def __init__(self, options: Stage2Options) -> None:
        for name in ("naming_tower", "text_tokenizer"):
            if not getattr(options, name):
                raise ConfigError(f"model.naming_weight needs model.{name}.")
        file = Path(locate(str(options.naming_tower)))
        words = caption_words(str(options.text_tokenizer), MAX_TEXT)
        if not isinstance(words, PieceWords):
            raise ConfigError("model.text_tokenizer must be a nano system's for model.naming_weight.")
        self.words = words
        self.tower = load_text_tower(file, words.end)
        log(f"{file}: text tower of model.naming_weight loaded.")
        if self.tower.config.projection_dim != options.image_features_dim:
            raise ConfigError(f"model.image_features_dim is {options.image_features_dim}, but the embeddings of {file} "
                              f"are {self.tower.config.projection_dim} wide.")

    def to(self, device: torch.device) -> Naming:
        """Move the tower."""
        self.tower.to(device)
        return self

    def __call__(self, image_embeds: Tensor, samples: Mapping[str, Any]) -> Tensor:
        """Symmetric contrast `[]` of embeddings `[B, E]` with the captions of the batch."""
        ids, _ = self.words(captions_of(samples))
        with torch.no_grad():
            text = self.tower(input_ids=ids.to(image_embeds.device)).text_embeds
        scores = SCALE * similarities(F.normalize(image_embeds.float(), dim=-1), F.normalize(text.float(), dim=-1))
        target = torch.arange(len(scores), device=scores.device)
        return (F.cross_entropy(scores, target) + F.cross_entropy(scores.T, target)) / 2
