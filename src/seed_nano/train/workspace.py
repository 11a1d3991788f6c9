"""What the stages of a run share: settings, folders, tokenizers, fixed scenes, and tensors computed once."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from seed_multimodal.device import choose_device
from seed_multimodal.errors import CheckpointError, ConfigError
from seed_multimodal.language.lavit import LavitTokenizer
from seed_multimodal.language.tokenizer import MultimodalTokenizer
from seed_multimodal.tokenizers.lavit import DynamicTokenizer, LavitTokenizerConfig
from seed_multimodal.tokenizers.lavit_decoder import LavitDecoderConfig
from seed_multimodal.tokenizers.seed2 import Seed2Config
from seed_multimodal.weights import load_state_dict, save_state_dict
from seed_nano.train.pixels import scene_pixels, to_clip
from seed_nano.world.records import OWN, from_last_picture, record_at, sentences, x_record_at
from seed_nano.world.scene import Scene
from seed_nano.world.source import open_nano
from seed_nano.world.splits import scene_at

ROOT = Path(__file__).resolve().parents[3]
PREFIX = "visual_encoder."  # of the vision encoder's weights in nano's tokenizer
X_KINDS = ("describe", "questions", "draw", "edits", "conversations", "talk", "asides", *OWN)
X_TEXTS, LAVIT_TEXTS = 60, 400  # records of each kind that the text tokenizers are trained on


def located(path: str) -> Path:
    """A path of the settings: as it is, or in the repository."""
    return Path(path) if Path(path).exists() else ROOT / path


@dataclass
class Workspace:
    """A run of nano: its settings, its work folder, and the folder of the finished system."""

    config: Any
    work: Path
    out: Path
    system: ClassVar[str] = "nano"
    words_name: ClassVar[str] = "seed_tokenizer"
    decoder_name: ClassVar[str] = "seed_tokenizer/diffusion_model"

    @property
    def words_folder(self) -> Path:
        """Of the text tokenizer (and nano's image tokenizer)."""
        return self.out / self.words_name

    @property
    def decoder_folder(self) -> Path:
        """The diffusers folder."""
        return self.out / self.decoder_name

    @property
    def judge(self) -> Path:
        """The report's judge."""
        return located(self.config.judge) if self.config.judge else self.out / "judge"

    def path(self, pattern: str) -> Path:
        """`{work}/…`, `{out}/…`, `{words}/…` or `{decoder}/…` of this run."""
        return Path(pattern.format(work=self.work, out=self.out, words=self.words_folder, decoder=self.decoder_folder))

    def record(self, stage: str) -> Path:
        """The record of a finished stage; those of the applications lie in folders of their own."""
        places = (self.work / stage / f"{stage}.done.json", self.work / stage / "summary.json")
        return next(filter(Path.is_file, places), self.work / f"{stage}.done.json")

    @cached_property
    def pool(self) -> list[Scene]:
        """The first training scenes, of which latents, embeddings and codes are cached."""
        return [scene_at(self.config.seed, number) for number in range(self.config.pool)]

    def held_out(self, split: str = "val") -> list[Scene]:
        """Scenes of a split that stages are measured on."""
        return [scene_at(self.config.seed, number, split) for number in range(self.config.gate_scenes)]

    @cached_property
    def words(self) -> Any:
        """The text tokenizer, trained if it does not exist.

        Raises:
            ConfigError: it was trained with other settings.
        """
        file = self.words_folder / "tokenizer.model"
        if not file.is_file():
            self.train_words()
        words = (LavitTokenizer if self.system == "nano_lavit" else MultimodalTokenizer).from_pretrained(file.parent)
        sizes = self.vocabulary_sizes
        found = {"llm.text_vocabulary": words.vocabulary.n_text, "tokenizer.codes": words.vocabulary.n_codes,
                 "tower.grid squared": words.vocabulary.n_codes,
                 "llm.locations": getattr(words.vocabulary, "n_locations", 0)}
        for name, size in sizes.items():
            if found[name] != size:
                raise ConfigError(f"{file}: was trained with {name}={found[name]}, the settings say {size}; use "
                                  "other folders for this run, or remove the file and train the LLM again.")
        return words

    @property
    def vocabulary_sizes(self) -> dict[str, int]:
        """Settings that the text tokenizer is trained with."""
        return {"llm.text_vocabulary": self.config.llm.text_vocabulary, "tokenizer.codes": self.config.tokenizer.codes}

    def train_words(self) -> None:
        """Train the text tokenizer on the sentences of nano's world."""
        MultimodalTokenizer.train(sentences(), self.words_folder, self.config.llm.text_vocabulary,
                                  self.config.tokenizer.codes)

    def cached(self, name: str, stage: str, make: Callable[[], Tensor], **facts: object) -> Tensor:
        """The tensor `work/NAME.safetensors`; computed by `make` if it is absent, damaged, older than the record of
        `stage`, or of other settings (`facts`, and those of the pool)."""
        file, record, config = self.work / f"{name}.safetensors", self.record(stage), self.config
        facts = {"seed": config.seed, "pool": config.pool, "image_size": config.image_size,
                 "start": getattr(config, "start", ""), **facts}
        if file.is_file():
            if not record.is_file() or record.stat().st_mtime_ns <= file.stat().st_mtime_ns:
                with suppress(SafetensorError, KeyError), safe_open(file, framework="pt") as handle:
                    if json.loads((handle.metadata() or {}).get("facts", "{}")) == facts:
                        return handle.get_tensor("value")  # type: ignore[no-any-return]
            print(f"[{name}] {file} is damaged or of other settings or weights: computed again.", flush=True)
        value = make()
        save_state_dict({"value": value}, file, {"facts": json.dumps(facts)})
        return value

    @cached_property
    def device(self) -> torch.device:
        """Where the stages train (`device: auto` takes a GPU if there is one)."""
        return choose_device(self.config.device, torch.float32, log=None).device


class SuccessorWorkspace(Workspace):
    """A run of a system that is built on a finished nano."""

    @property
    def nano(self) -> Path:
        """The tokenizer folder of the finished nano.

        Raises:
            CheckpointError: there is none.
        """
        folder = located(self.config.start) / "seed_tokenizer"
        parts = ("diffusion_model/vae", "diffusion_model/image_encoder")
        if not all((folder / part / "config.json").is_file() for part in parts):
            raise CheckpointError(f"{self.config.start}: start must be the folder of a finished nano, whose vision "
                                  "encoder and autoencoder are used: bash scripts/nano_speedrun.sh trains one.")
        return folder

    @property
    def autoencoder(self) -> Path:
        """nano's autoencoder."""
        return self.nano / "diffusion_model" / "vae"

    @property
    def judge(self) -> Path:
        """nano's judge, if none is set."""
        return located(self.config.judge) if self.config.judge else self.nano.parent / "judge"


class XWorkspace(SuccessorWorkspace):
    """A run of nano-x; its pool holds both images of edits."""

    system, words_name, decoder_name = "nano_x", "tokenizer", "sdxl"

    @cached_property
    def edits(self) -> list[tuple[Scene, Scene]]:
        """Scenes before and after an edit."""
        found = []
        for number in range(self.config.pool):
            asked, answered = (message["content"] for message in
                               from_last_picture(record_at("edits", self.config.seed, number)))
            found.append((asked[0], answered[1]))
        return found

    @cached_property
    def pool(self) -> list[Scene]:
        """Both scenes of every edit."""
        return [scene for pair in self.edits for scene in pair]

    @property
    def vocabulary_sizes(self) -> dict[str, int]:
        """An image's tokens are only placeholders."""
        return {"llm.text_vocabulary": self.config.llm.text_vocabulary, "tower.grid squared": self.config.tower.grid**2,
                "llm.locations": self.config.llm.locations}

    def train_words(self) -> None:
        """Train the text tokenizer on the sentences and some records."""
        texts = [part for kind in X_KINDS for number in range(X_TEXTS)
                 for message in x_record_at(kind, 0, number)["messages"] for part in message["content"]
                 if isinstance(part, str) and "<" not in part]
        pieces, tokens, locations = self.vocabulary_sizes.values()
        MultimodalTokenizer.train([*sentences(), *texts], self.words_folder, vocab_size=pieces, n_codes=tokens,
                                  tokens_per_image=tokens, n_locations=locations)


class LavitWorkspace(SuccessorWorkspace):
    """A run of nano-lavit; nano's vision encoder gives the features of the pool once."""

    system, words_name, decoder_name = "nano_lavit", "words", "pixels"

    @cached_property
    def sizes(self) -> LavitTokenizerConfig:
        """Of the dynamic tokenizer.

        Raises:
            ConfigError: the vision encoder takes images of another size.
        """
        sizes, vit = self.config.tokenizer, Seed2Config.read(self.nano / "config.json").vit
        if vit.image_size != self.config.image_size:
            raise ConfigError(f"image_size is {self.config.image_size}, but the vision encoder of {self.config.start} "
                              f"takes images of {vit.image_size}.")
        return LavitTokenizerConfig(
            vit, vit_head=0, merger_depth=sizes.merger_depth, merger_heads=sizes.heads,
            merger_mlp_width=sizes.merger_mlp, codebook_size=sizes.codes, codebook_dim=sizes.code_dim,
            llm_width=self.config.llm.width)

    @property
    def decoder_sizes(self) -> LavitDecoderConfig:
        """Of the decoder of codes."""
        sizes, unet, width = self.config.tokenizer, self.config.unet, self.sizes.vit.width
        return LavitDecoderConfig(
            tokens=self.sizes.patches, code_dim=sizes.code_dim, width=width, depth=sizes.decoder_depth,
            heads=sizes.heads, mlp_width=sizes.decoder_mlp, feature_dim=width, prompt_dim=unet.prompt,
            pooled_dim=unet.pooled)

    def new_tokenizer(self) -> DynamicTokenizer:
        """An untrained tokenizer with nano's vision encoder, on the device."""
        torch.manual_seed(self.config.seed + 1)
        tokenizer = DynamicTokenizer(self.sizes)
        weights = load_state_dict(self.nano / "model.safetensors")
        tokenizer.encoder.load_state_dict({name.removeprefix(PREFIX): value.float() for name, value in weights.items()
                                           if name.startswith(PREFIX)})
        return tokenizer.to(self.device)

    @cached_property
    def features(self) -> Tensor:
        """Features of the pool, float16 `[P, N, D]`."""
        return self.cached("features", "start", lambda: self.see(self.pool))

    @torch.no_grad()
    def see(self, scenes: list[Scene]) -> Tensor:
        """Features of scenes, float16 `[S, N, D]`."""
        tokenizer, size = self.new_tokenizer().eval(), self.config.image_size
        return torch.cat([tokenizer.patch_features(to_clip(scene_pixels(scenes[at:at + 512], size), self.device))
                          .half().cpu() for at in range(0, len(scenes), 512)])

    def train_words(self) -> None:
        """Train the text tokenizer on the sentences, questions, answers and edits."""
        texts = list(sentences())
        for content, fields in (("qa", ("question", "answer")), ("edits", ("instruction",))):
            records = open_nano(None, content=content, number=LAVIT_TEXTS)
            texts += [str(records.locate(row).fields[field]) for row in range(LAVIT_TEXTS) for field in fields]
        LavitTokenizer.train(texts, self.words_folder, self.config.llm.text_vocabulary, self.config.tokenizer.codes,
                             self.sizes.patches)
