"""Files that the stages share: pictures, captions as token ids, views, and cached latents, embeddings and codes.

Every cached file is made once and read back by later stages and later runs; deleting one makes it anew.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from seed_multimodal.data.nano import NanoSet, load_nano
from seed_multimodal.device import choose_device
from seed_multimodal.errors import DataError
from seed_multimodal.language.tokenizer import MultimodalTokenizer
from seed_multimodal.training.nano.config import NanoConfig
from seed_multimodal.training.nano.views import build_views
from seed_multimodal.weights import load_state_dict, save_state_dict


@dataclass
class Workspace:
    """One run: settings, the data folder (None: the committed shard), the work folder and where the system goes."""

    config: NanoConfig
    data: Path | None
    work: Path
    out: Path

    @cached_property
    def nano(self) -> NanoSet:
        """The nano set."""
        return load_nano(self.data)

    @property
    def tokenizer_folder(self) -> Path:
        """The folder of word pieces and SEED-2 weights."""
        return self.out / "seed_tokenizer"

    @property
    def decoder_folder(self) -> Path:
        """The diffusers folder."""
        return self.tokenizer_folder / "diffusion_model"

    @cached_property
    def train(self) -> list[int]:
        """Indices of the training pictures (the first `limit` if the settings say so)."""
        return self.nano.split("train")[: self.config.limit or None]

    @cached_property
    def held_out(self) -> list[int]:
        """Indices of pictures that gates are measured on: the val split."""
        return self.nano.split("val")[: self.config.limit or None]

    @cached_property
    def views(self) -> Tensor:
        """Views uint8 `[N, V, 3, S, S]` of all pictures of the set."""
        images = self.nano.images()
        size = self.config.image_size
        if images.shape[1] != size:
            raise DataError(f"The pictures are {images.shape[1]} px, the settings need {size} px: "
                            "rebuild the set or change image_size.")
        return build_views(images, self.config.views, self.config.seed, self.work / "views.u8")

    @cached_property
    def words(self) -> MultimodalTokenizer:
        """The text tokenizer, trained on the training split's words if it does not exist."""
        folder = self.tokenizer_folder
        if not (folder / "tokenizer.model").is_file():
            sizes = self.config
            MultimodalTokenizer.train(self._sentences(), folder, vocab_size=sizes.llm.text_vocabulary,
                                      n_codes=sizes.tokenizer.codes)
        return MultimodalTokenizer.from_pretrained(folder)

    def _sentences(self) -> list[str]:
        from seed_multimodal.language import tasks

        common = [tasks.DESCRIBE_PROMPT, tasks.QA_SUFFIX, tasks.DRAW_RESPONSE, tasks.EDIT_RESPONSE]
        lines = [*common, "USER:", "ASSISTANT:"] * 50
        for i in self.train:
            record = self.nano.records[i]
            lines += [*record.captions, *(f"{qa.question} {qa.answer}" for qa in record.qa)]
        lines += [edit.instruction for edit in self.nano.edits if edit.split == "train"]
        return lines

    @cached_property
    def captions(self) -> list[list[list[int]]]:
        """Token ids of every caption of every picture (held-out pictures' are there too, but stages index by split)."""
        return [[self.words.encode_parts([text]) for text in record.captions] for record in self.nano.records]

    def cached(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        """The tensor `work/NAME.safetensors`, made by `make` if absent."""
        file = self.work / f"{name}.safetensors"
        if not file.is_file():
            save_state_dict({"value": make()}, file)
        return load_state_dict(file)["value"]

    @cached_property
    def train_index(self) -> Tensor:
        """`train` as int64 `[N]`."""
        return torch.tensor(self.train)

    @cached_property
    def held_out_index(self) -> Tensor:
        """`held_out` as int64 `[N]`."""
        return torch.tensor(self.held_out)

    @cached_property
    def device(self) -> torch.device:
        """Where the stages train (`device: auto` takes a GPU when there is one)."""
        return choose_device(self.config.device, torch.float32, log=None).device
