"""Loads the folder that holds this file, by `trust_remote_code=True`.

With the package (seed-multimodal) these are its classes. Without it there is the
language model of a system whose images are codes: prompts of texts and codes, answers of texts and
codes. Encoding and drawing of images, chat templates, SEED-X and LaVIT need the package.

This file imports nothing of the package, since it is copied to other machines.
"""

from __future__ import annotations

import importlib
import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn, Self

import torch
from huggingface_hub import snapshot_download
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BatchFeature,
    GenerationMixin,
    LogitsProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
)

INSTALL = "this needs the package seed-multimodal, installed from its repository"

PACKAGE = "seed_multimodal"
MODULE = f"{PACKAGE}.transformers"


def __getattr__(name: str) -> Any:
    """The package's class of this name, or without the package one of those below."""
    if name.startswith("__"):
        raise AttributeError(name)
    try:
        return getattr(importlib.import_module(MODULE), name)
    except ModuleNotFoundError as error:
        if error.name not in (PACKAGE, MODULE):  # something that the package needs is missing
            raise
    for suffix, base in KINDS.items():
        if name.endswith(suffix):
            return _named(base, name, name.removesuffix(suffix))
    raise AttributeError(name)


def _named(base: type, name: str, system: str) -> Any:
    """One of the classes below under its family's name, which transformers compares."""
    attributes: dict[str, Any] = {"__module__": __name__}
    if base is CodesConfig:
        attributes["model_type"] = re.sub("(?<=[a-z])(?=[A-Z])", "_", system).lower()
    elif base is CodesForConditionalGeneration:
        config_name = f"{system}Config"
        attributes["config_class"] = globals().get(config_name) or __getattr__(config_name)
    return globals().setdefault(name, type(name, (base,), attributes))


class CodesConfig(PreTrainedConfig):
    """Folders of the language model and of its tokenizer."""

    language_model: str | None = None
    tokenizer: str | None = None


class CodesVocabulary:
    """Ids of codes, and of the start and the end of an image."""

    def __init__(self, folder: Path) -> None:
        added = _read(folder / "added_tokens.json")
        sizes = _read(folder / "image_tokens.json")
        self.is_hub = bool(sizes)
        if self.is_hub:  # image tokens follow those of a tokenizer of the Hub
            self.hub = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            self.code_start = max(self.hub.get_vocab().values()) + 1
            self.n_codes = sizes["n_codes"]
            self.boi_id = self.code_start + self.n_codes
            self.tokens_per_image = sizes["tokens_per_image"]
            self.start_ids = self.hub("").input_ids[:1]
        else:
            from sentencepiece import SentencePieceProcessor

            self.pieces = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
            self.code_start = added["<img_00000>"]
            self.n_codes = sum(token.startswith("<img_") for token in added)
            self.boi_id = added["<img>"]
            self.tokens_per_image = _read(folder / "tokenizer_config.json").get(
                "tokens_per_image", 32
            )
            self.start_ids = [self.pieces.bos_id()]
        self.eoi_id = self.boi_id + 1

    def encode(self, text: str) -> Any:
        """A text without image tokens → ids."""
        if self.is_hub:
            return self.hub.encode(text, add_special_tokens=False)
        return self.pieces.EncodeAsIds(text)

    def decode(self, ids: list[int]) -> Any:
        """Ids without image tokens → text."""
        if self.is_hub:
            return self.hub.decode(ids, skip_special_tokens=True)
        return self.pieces.DecodeIds([id for id in ids if id > 2])  # without <unk>, <s>, </s>


class WellFormedImages(LogitsProcessor):
    """An image is `<img>`, all its codes and `</img>`; no code stands elsewhere."""

    def __init__(self, vocabulary: CodesVocabulary, budget: int) -> None:
        self.vocabulary = vocabulary
        self.budget = budget

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        vocabulary = self.vocabulary
        codes = slice(vocabulary.code_start, vocabulary.code_start + vocabulary.n_codes)
        allowed = torch.zeros_like(scores, dtype=torch.bool)
        for row, ids in enumerate(input_ids.tolist()):
            # Tokens since the last `<img>`, if that image is not closed.
            n_codes = None
            if ids.count(vocabulary.boi_id) > ids.count(vocabulary.eoi_id):
                n_codes = ids[::-1].index(vocabulary.boi_id)
            if n_codes is None:
                allowed[row, : vocabulary.eoi_id] = True
                allowed[row, codes] = False
                fits = self.budget - len(ids) >= vocabulary.tokens_per_image + 2
                allowed[row, vocabulary.boi_id] = fits
            elif n_codes < vocabulary.tokens_per_image:
                allowed[row, codes] = True
            else:
                allowed[row, vocabulary.eoi_id] = True
        return scores.masked_fill(~allowed, float("-inf"))


class CodesForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """The language model; `generate` returns answers without their prompts."""

    base_model_prefix = "language_model"

    def __init__(
        self, config: CodesConfig, language_model: Any, vocabulary: CodesVocabulary
    ) -> None:
        super().__init__(config)
        self.language_model = language_model
        self.vocabulary = vocabulary
        self.generation_config = language_model.generation_config

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        config: CodesConfig | None = None,
        dtype: Any = "auto",
        device_map: Any = None,
        **kwargs: object,
    ) -> Self:
        config = config or cls.config_class.from_pretrained(name)
        if config.language_model is None or config.tokenizer is None:
            raise ImportError(f"{name}: {INSTALL}.")
        folder = _folder(name)
        model = AutoModelForCausalLM.from_pretrained(
            folder / config.language_model, dtype=dtype, device_map=device_map
        )
        loaded = cls(config, model.eval(), CodesVocabulary(folder / config.tokenizer))
        loaded.folder = folder
        return loaded

    def save_pretrained(self, save_directory: str | Path, **kwargs: object) -> None:
        """Copy the folder, with the weights that the language model has now."""
        shutil.copytree(self.folder, save_directory, dirs_exist_ok=True)
        self.language_model.save_pretrained(Path(save_directory) / self.config.language_model)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.language_model(*args, **kwargs)

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        max_new_tokens: int = 256,
        logits_processor: Sequence[LogitsProcessor] = (),
        **kwargs: Any,
    ) -> Any:
        embeds = self.language_model.get_input_embeddings()(input_ids.to(self.device))
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        return self.language_model.generate(
            inputs_embeds=embeds,
            attention_mask=attention_mask.to(self.device),
            max_new_tokens=max_new_tokens,
            logits_processor=[
                WellFormedImages(self.vocabulary, max_new_tokens),
                *logits_processor,
            ],
            **kwargs,
        )


class CodesProcessor(ProcessorMixin):
    """Prompts that are lists of texts and of images' codes ⇄ ids."""

    def __init__(self, folder: str | Path) -> None:
        folder = _folder(folder)
        config = _read(folder / "config.json")
        if config.get("tokenizer") is None:
            raise ImportError(f"{folder}: {INSTALL}.")
        self.vocabulary = CodesVocabulary(folder / config["tokenizer"])
        self.chat_template = None
        self.tokenizer = None  # pipelines ask for it

    @classmethod
    def from_pretrained(cls, name: str | Path, **kwargs: object) -> Self:
        return cls(name)

    def __call__(
        self, text: str | list[str | list[int]], images: object = None, **kwargs: object
    ) -> BatchFeature:
        """One prompt: a list of texts and of images as lists of codes."""
        if images is not None:
            raise ImportError(f"Encoding of images: {INSTALL}.")
        vocabulary = self.vocabulary
        ids = list(vocabulary.start_ids)
        parts = [text] if isinstance(text, str) else text
        for index, part in enumerate(parts):
            if isinstance(part, str):
                if not vocabulary.is_hub:  # LLaMA's drops white space next to images
                    part = part.lstrip() if index > 0 else part
                    part = part.rstrip() if index < len(parts) - 1 else part
                ids += vocabulary.encode(part)
            else:
                codes = [vocabulary.code_start + code for code in part]
                ids += [vocabulary.boi_id, *codes, vocabulary.eoi_id]
        input_ids = torch.tensor([ids])
        return BatchFeature({"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)})

    def decode(self, ids: Tensor | list[int], **kwargs: object) -> list[str | list[int]]:
        """Generated ids → texts and images as lists of codes, in order."""
        vocabulary = self.vocabulary
        parts: list[str | list[int]] = []
        run: list[int] = []
        for id in [*map(int, ids), vocabulary.boi_id]:
            if id == vocabulary.boi_id and run:
                parts.append(vocabulary.decode(run).strip())
            elif id == vocabulary.eoi_id:
                parts.append([code - vocabulary.code_start for code in run])
            else:
                run.append(id)
                continue
            run = []
        return [part for part in parts if part]

    def batch_decode(
        self, sequences: Tensor | list[list[int]], **kwargs: object
    ) -> list[list[str | list[int]]]:
        return [self.decode(ids) for ids in sequences]

    def apply_chat_template(self, *args: object, **kwargs: object) -> NoReturn:
        raise ImportError(f"Chat templates: {INSTALL}.")

    def post_process_multimodal_output(self, *args: object, **kwargs: object) -> NoReturn:
        raise ImportError(f"Drawing of images: {INSTALL}; `decode` reads texts and codes.")


def _folder(name: str | Path) -> Path:
    """A folder, or the files of a hub id."""
    return Path(name) if Path(name).is_dir() else Path(snapshot_download(str(name)))


def _read(file: Path) -> dict[str, Any]:
    """A JSON object; empty without the file."""
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


KINDS = {
    "Config": CodesConfig,
    "ForConditionalGeneration": CodesForConditionalGeneration,
    "Processor": CodesProcessor,
}
