"""What the stages share: folders, words, fixed scenes, and what was computed from them and is kept.

Every cached file is made once and read back by later stages and later runs; deleting one makes it anew.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from seed_multimodal.data.nano.records import sentences
from seed_multimodal.data.nano.scene import Scene
from seed_multimodal.data.nano.splits import scene_at
from seed_multimodal.device import choose_device
from seed_multimodal.language.tokenizer import MultimodalTokenizer
from seed_multimodal.training.nano.config import NanoConfig
from seed_multimodal.weights import load_state_dict, save_state_dict


@dataclass
class Workspace:
    """One run: its settings, its work folder, and the folder where the system goes."""

    config: NanoConfig
    work: Path
    out: Path

    @property
    def tokenizer_folder(self) -> Path:
        """The folder of word pieces and SEED-2 weights."""
        return self.out / "seed_tokenizer"

    @property
    def decoder_folder(self) -> Path:
        """The diffusers folder."""
        return self.tokenizer_folder / "diffusion_model"

    @cached_property
    def pool(self) -> list[Scene]:
        """The first training scenes of the stream, of which latents, embeddings and codes are kept."""
        return [scene_at(self.config.seed, number) for number in range(self.config.pool)]

    def held_out(self, split: str = "val") -> list[Scene]:
        """Scenes of a split that gates are measured on."""
        return [scene_at(self.config.seed, number, split) for number in range(self.config.gate_scenes)]

    @cached_property
    def words(self) -> MultimodalTokenizer:
        """The text tokenizer, trained on the world's sentences if it does not exist."""
        folder = self.tokenizer_folder
        if not (folder / "tokenizer.model").is_file():
            sizes = self.config
            MultimodalTokenizer.train(sentences(), folder, vocab_size=sizes.llm.text_vocabulary,
                                      n_codes=sizes.tokenizer.codes)
        return MultimodalTokenizer.from_pretrained(folder)

    def cached(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        """The tensor `work/NAME.safetensors`, made by `make` if absent."""
        file = self.work / f"{name}.safetensors"
        if not file.is_file():
            save_state_dict({"value": make()}, file)
        return load_state_dict(file)["value"]

    @cached_property
    def device(self) -> torch.device:
        """Where the stages train (`device: auto` takes a GPU when there is one)."""
        return choose_device(self.config.device, torch.float32, log=None).device
