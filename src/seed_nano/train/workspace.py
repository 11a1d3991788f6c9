"""What the stages share: folders, words, fixed scenes, and what was computed from them and is kept.

Every cached file is made once and read back by later stages and later runs. One that is damaged, of other settings, or
older than what it was made by is made anew, and that is said.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from seed_multimodal.device import choose_device
from seed_multimodal.errors import CheckpointError, ConfigError, first_line
from seed_multimodal.language.tokenizer import MultimodalTokenizer
from seed_multimodal.settings import changed_settings
from seed_multimodal.weights import load_state_dict, save_state_dict
from seed_nano.train.config import NanoConfig
from seed_nano.world.records import sentences
from seed_nano.world.scene import Scene
from seed_nano.world.splits import scene_at


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
        """The text tokenizer, trained on the world's sentences if it does not exist.

        Raises:
            ConfigError: the one that exists was trained with other settings.
        """
        file = self.tokenizer_folder / "tokenizer.model"
        pieces, codes = self.config.llm.text_vocabulary, self.config.tokenizer.codes
        if not file.is_file():
            MultimodalTokenizer.train(sentences(), file.parent, vocab_size=pieces, n_codes=codes)
        words = MultimodalTokenizer.from_pretrained(file.parent)
        self.check_words(words, file, "the records of stage1, stage2, llm_pretrain and llm_sft")
        return words

    @property
    def counted_words(self) -> dict[str, int]:
        """Settings that say how many text pieces and image words (and locations, where there are some) there are."""
        return {"llm.text_vocabulary": self.config.llm.text_vocabulary, "tokenizer.codes": self.config.tokenizer.codes}

    def check_words(self, words: MultimodalTokenizer, file: Path, built_on: str) -> None:
        """Refuse the words of a file if they are not those of the settings. Raises ConfigError."""
        found, wanted = words.vocabulary, self.counted_words
        there = [found.n_text, found.n_codes, getattr(found, "n_locations", 0)][:len(wanted)]
        if there != [*wanted.values()]:
            kinds = zip(there, ("text pieces", "image words", "locations"), strict=False)
            raise ConfigError(f"{file}: has {' and '.join(f'{number} {kind}' for number, kind in kinds)}, the settings "
                              f"({', '.join(wanted)}) say {' and '.join(map(str, wanted.values()))}; use other "
                              f"folders, or remove the file and {built_on}.")

    def need(self, stage: str, *files: Path) -> None:
        """Refuse to begin without the files that a stage makes.

        Raises:
            CheckpointError: one is missing; the sentence names the stage.
        """
        missing = next((file for file in files if not file.is_file()), None)
        if missing is not None:
            raise CheckpointError(f"{missing}: is not there yet; stage {stage} makes it (--only {stage}), or bash "
                                  "scripts/nano_speedrun.sh everything in order.")

    def newer(self, file: Path, *stages: str) -> str:
        """Which of some stages ended after a file of theirs was made ("": none did)."""
        made = file.stat().st_mtime_ns
        return ", ".join(stage for stage in stages if self.record(stage).is_file()
                         and self.record(stage).stat().st_mtime_ns > made)

    def record(self, stage: str) -> Path:
        """The record of a stage that is done; those of the applications' stages lie in folders of their own."""
        places = (self.work / stage / f"{stage}.done.json", self.work / stage / "summary.json")
        return next(filter(Path.is_file, places), self.work / f"{stage}.done.json")

    def cached(self, name: str, stage: str, make: Callable[[], Tensor], **more: object) -> Tensor:
        """The tensor `work/NAME.safetensors`, made by `make` if absent, damaged, or no longer what it would make.

        Args:
            stage: whose model it is computed with.
            more: settings that it depends on, beside those of the pool.
        """
        file, config = self.work / f"{name}.safetensors", self.config
        facts = {"seed": config.seed, "pool": config.pool, "image_size": config.image_size, **more}
        if file.is_file():
            value, fault = self._kept(file, stage, facts)
            if value is not None:
                return value
            print(f"[{name}] {file} is made anew: {fault}.", flush=True)
        value = make()
        save_state_dict({"value": value}, file, {"facts": json.dumps(facts)})
        return value

    def _kept(self, file: Path, stage: str, facts: dict[str, object]) -> tuple[Tensor | None, str]:
        """What a cached file holds; None, and why it cannot be used, as part of a sentence."""
        try:
            value = load_state_dict(file)["value"]
            with safe_open(file, framework="pt") as handle:
                saved = json.loads((handle.metadata() or {}).get("facts", "{}"))
        except (CheckpointError, KeyError, ValueError):
            return None, "it is damaged"
        if self.newer(file, stage):
            return None, f"{stage} was trained again since"
        changes = changed_settings(saved, facts) if saved else []
        return (None, f"it is of other settings ({'; '.join(changes)})") if changes else (value, "")

    @cached_property
    def device(self) -> torch.device:
        """Where the stages train (`device: auto` takes a GPU when there is one)."""
        return choose_device(self.config.device, torch.float32, log=None).device


def read_part(kind: Any, folder: Path) -> Any:
    """A model of diffusers' class `kind` that a stage has written into a folder, in float32.

    Raises:
        CheckpointError: it is damaged.
    """
    try:
        model = kind.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: not a complete {kind.__name__} ({first_line(error)}); remove it, and the "
                              "stage that made it makes it again.") from error
    model.register_to_config(_name_or_path="")  # else this machine's path is saved with the model
    return model


def absolute(path: Path) -> str:
    """A path as the settings of another program name it."""
    return str(path.absolute())
