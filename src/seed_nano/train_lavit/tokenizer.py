"""Stages `tokenizer` and `narrow`: selector, merger, codebook and decoder, on features that nano's tower gave once.

As the published stage 1 (`training/lavit/tokenizer_task.py`), first without codes. Different: what the reader says
about rebuilt features is drawn towards what it says about the tower's, because the cosine of all features hardly tells
one thing from another; the codebook is smaller, and its dead codes move. With so many tokens that the last ones show
nothing new, codes are learnt best, but then a token costs nothing: `narrow` goes on with fewer, and the pictures that
need them least lose them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from seed_multimodal.tokenizers.lavit import DynamicTokenizer
from seed_multimodal.tokenizers.lavit_decoder import CodeDecoder
from seed_multimodal.tokenizers.lavit_files import load_dynamic_tokenizer, save_dynamic_tokenizer
from seed_multimodal.tokenizers.lavit_training import TRIED, LavitStage1, LavitStage1Weights
from seed_multimodal.training.codebook import CodebookHealth
from seed_multimodal.training.distributed import ProcessGroup
from seed_multimodal.training.lavit.tokenizer_task import LavitTokenizerTask, measure
from seed_multimodal.training.loop_settings import StageSettings
from seed_multimodal.training.schedules import batch_indices
from seed_nano.train.pixels import to_clip
from seed_nano.train.task import NanoTask
from seed_nano.train_lavit.reader import Reader, load_reader
from seed_nano.train_lavit.workspace import PREFIX, LavitSpace
from seed_nano.world.scene import Scene, empty_pictures
from seed_nano.world.targets import label_tensor

READ_WEIGHT = 0.3  # of what the reader says about rebuilt features
EMPTY = 0.05  # empty scenes for each of the pool, which has none: how few tokens do is seen on them
WITHOUT_CODES = 0.15  # share of the steps


class ReadStage1(LavitStage1):
    """With the reader's distance between rebuilt features and the tower's in the loss.

    Attributes:
        readable_B: pictures of the batch that the reader counts for. It has learnt from scenes with things only: what
            it says about an empty one is a guess, which would be paid for with tokens.
    """

    def __init__(self, reader: Reader, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.reader = [reader]  # no part of what is trained and saved
        self.misread = torch.zeros(())
        self.readable_B = torch.ones(1, dtype=torch.bool)

    def other_errors(self, features_BND: Tensor, rebuilt_BND: Tensor) -> Tensor:
        """See the base."""
        reader = self.reader[0]
        misread_B = reader.heads.divergence(reader(rebuilt_BND), reader(features_BND))
        if self.training:
            misread_B = misread_B * (self.readable_B if torch.is_grad_enabled() else self.readable_B[::TRIED])
        if torch.is_grad_enabled():  # else a decision is tried
            self.misread = misread_B.detach().mean()
        return READ_WEIGHT * misread_B


class TokenizerTask(NanoTask):
    """Stage `tokenizer`, from random weights; `narrow` starts from its checkpoint."""

    sections = (*NanoTask.sections, "pool", "start", "tokenizer")

    def __init__(self, space: LavitSpace, name: str = "tokenizer", keep: float | None = None) -> None:
        """`keep`: share of the patches; None: the first one, with the codebook's start."""
        self.out, config, pool = space, space.config, space.features
        settings: StageSettings = getattr(config, f"train_{name}")
        start: dict[str, Any] = {} if keep is not None else {
            "codebook_warmup": int(WITHOUT_CODES * settings.steps), "kmeans_start": True, "kmeans_images": 1024}
        keep = config.tokenizer.first_keep if keep is None else keep
        tokenizer = space.new_tokenizer()
        torch.manual_seed(config.seed + 3)
        self.model = ReadStage1(load_reader(space), tokenizer, CodeDecoder(space.decoder_sizes).to(space.device),
                                weights=LavitStage1Weights(keep, config.tokenizer.ratio))
        self.model.start_share()

        empty = tokenizer.patch_features(empty_pixels(config.image_size).to(space.device)).half().cpu()
        number = len(pool) + round(EMPTY * len(pool))

        def batch(micro_step: int) -> Tensor:
            rows = batch_indices(micro_step, settings.batch_size, number, settings.seed)
            readable_B = rows < len(pool)
            self.model.readable_B = readable_B.to(space.device)
            found = torch.where(readable_B[:, None, None], pool[rows.clamp(max=len(pool) - 1)],
                                empty[rows % len(empty)])
            return found.to(space.device).float()

        self.inner = LavitTokenizerTask(name, self.model, settings, batch, CodebookHealth(
            restart_every=max(1, settings.steps // 80), **start))
        super().__init__(space, name, self.inner.module)
        self.optimizer = self.inner.optimizer

    def step_loss(self, model: nn.Module, micro_step: int) -> tuple[Tensor, Mapping[str, Any]]:
        loss, numbers = self.inner.step_loss(self.model, micro_step)
        return loss, {**numbers, "misread": self.model.misread}

    def after_step(self, step: int) -> None:
        self.inner.after_step(step)

    def acts_after(self, step: int) -> bool:
        return self.inner.acts_after(step)

    def status(self) -> dict[str, float]:
        return self.inner.status()

    def state_dict(self, step: int) -> dict[str, Any]:
        return self.inner.state_dict(step)

    def finish(self, group: ProcessGroup) -> Mapping[str, Any]:
        space, model = self.out, self.model.eval()
        scenes = space.held_out("val")
        seen = [part.to(space.device).float() for part in space.see(scenes).split(256)]
        measured = measure(model, seen)
        tokenizer, decoder = (part.cpu() for part in model.finished())
        with torch.no_grad():
            rebuilt = torch.cat([rebuild(tokenizer, decoder, part.cpu()) for part in seen])
        return {**super().finish(group), **measured.to_dict(),
                "tokens_by_things": tokens_by_things(tokenizer, torch.cat(seen).cpu(), scenes),
                "tokens_of_empty": empty_tokens(tokenizer, space.config.image_size),
                "read": model.reader[0].cpu().read_right(rebuilt, label_tensor(scenes))}


class NarrowTask(TokenizerTask):
    """Stage `narrow`, with fewer tokens; the tokenizer goes to `out/tokenizer`, the decoder to `out/decoder`."""

    def __init__(self, space: LavitSpace) -> None:
        space.need("tokenizer", space.record("tokenizer"))
        super().__init__(space, "narrow", space.config.tokenizer.keep)
        self.settings = replace(self.settings, start=self.settings.start or str(space.work / "tokenizer.checkpoints"))

    def made(self) -> Sequence[Path]:
        return self.out.tokenizer_folder / "model.safetensors", self.out.out / "decoder" / "model.safetensors"

    def finish(self, group: ProcessGroup) -> Mapping[str, Any]:
        space, numbers = self.out, super().finish(group)
        save_tokenizer(space, self.model.tokenizer)
        self.model.decoder.save_pretrained(space.out / "decoder")
        missed = numbers["cosine"] > space.config.gate_cosine
        if missed:
            print(f"The gate was missed: cosine loss {numbers['cosine']:.3f} > {space.config.gate_cosine}.", flush=True)
        return {**numbers, "gate_passed": not missed}


def save_tokenizer(space: LavitSpace, tokenizer: DynamicTokenizer) -> None:
    """To the system's folder, without the tower, which is nano's."""
    tower = space.nano_tokenizer / "model.safetensors"
    save_dynamic_tokenizer(tokenizer, space.tokenizer_folder, tower=(tower, PREFIX))


def load_parts(space: LavitSpace) -> tuple[DynamicTokenizer, CodeDecoder]:
    """What the stage has made."""
    folder = space.out / "decoder"
    space.need("narrow", space.tokenizer_folder / "model.safetensors", folder / "model.safetensors")
    return load_dynamic_tokenizer(space.tokenizer_folder), CodeDecoder.from_pretrained(folder)


@torch.no_grad()
def rebuild(tokenizer: DynamicTokenizer, decoder: CodeDecoder, features_BND: Tensor) -> Tensor:
    """The tower's features `[B, N, D]` → codes → features."""
    keep_BN = tokenizer.select(features_BND, generator=_fixed()).keep_BN
    rows_TD = tokenizer.merge(features_BND, keep_BN)[keep_BN > 0.5]
    counts = (keep_BN > 0.5).sum(1).tolist()
    return decoder.features(list(tokenizer.quantize_rows(rows_TD)[1].split(counts)))


@torch.no_grad()
def tokens_by_things(tokenizer: DynamicTokenizer, features_BND: Tensor, scenes: Sequence[Scene]) -> dict[int, float]:
    """Mean tokens of the scenes with so many things."""
    counts = tokenizer.select(features_BND, generator=_fixed()).counts_B.float()
    things = torch.tensor([sum(scene.counts) for scene in scenes])
    return {int(number): round(counts[things == number].mean().item(), 2) for number in things.unique()}


@torch.no_grad()
def empty_tokens(tokenizer: DynamicTokenizer, size: int) -> float:
    """Mean tokens of all backgrounds without a thing."""
    features = tokenizer.patch_features(empty_pixels(size))
    return round(tokenizer.select(features, generator=_fixed()).counts_B.float().mean().item(), 2)


def empty_pixels(size: int) -> Tensor:
    """All backgrounds without a thing, normalised `[E, 3, S, S]`."""
    return to_clip(torch.from_numpy(empty_pictures(size)).permute(0, 3, 1, 2))


def _fixed() -> torch.Generator:
    """Of the selector's draws, so that what is measured can be measured again."""
    return torch.Generator().manual_seed(0)
