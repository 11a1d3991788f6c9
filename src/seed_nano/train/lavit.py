"""Stages `reader`, `tokenizer` and `narrow` of nano-lavit: selector, merger, codebook and decoder, on cached features.

The reader is linear layers that name what is in a scene from patch features. The tokenizer is trained as in the
published stage 1, first without codes. Different: what the reader says of rebuilt features is drawn towards what it
says of the encoder's, because the cosine of all features hardly tells one thing from another; the codebook is smaller,
and its dead codes move. With so many tokens that the last ones show nothing new, codes are learnt best, but then a
token costs nothing: `narrow` continues with fewer, and the images that need them least lose them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
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
from seed_multimodal.training.schedules import batch_indices
from seed_multimodal.vision.label_heads import LabelHeads
from seed_multimodal.weights import assign_strictly, load_state_dict, save_state_dict
from seed_nano.train.pixels import to_clip
from seed_nano.train.task import NanoTask
from seed_nano.train.vision import LABELS, named_right
from seed_nano.train.workspace import PREFIX, LavitWorkspace
from seed_nano.world.scene import empty_pictures
from seed_nano.world.targets import label_tensor

READER_FILE = "reader.safetensors"
READ_WEIGHT = 0.3  # of what the reader says of rebuilt features
EMPTY = 0.05  # empty scenes for each of the pool, which has none: they show with how few tokens an image can do
WITHOUT_CODES = 0.15  # share of the steps


class Reader(nn.Module):
    """Features `[B, N, D]` → `[B, N · n]`, which its heads read: one linear layer for all patches."""

    def __init__(self, space: LavitWorkspace) -> None:
        super().__init__()
        sizes, reading = space.sizes, space.config.tokenizer.reading
        self.reading = nn.Linear(sizes.vit.width, reading)
        self.heads = LabelHeads(sizes.patches * reading, LABELS)

    def forward(self, features_BND: Tensor) -> Tensor:
        """See the class."""
        return self.reading(features_BND.float()).flatten(1)


def load_reader(space: LavitWorkspace) -> Reader:
    """The trained one, frozen, on the device."""
    reader, file = Reader(space), space.work / READER_FILE
    assign_strictly(reader, load_state_dict(file), file)
    return reader.to(space.device).requires_grad_(False).eval()


class ReaderTask(NanoTask):
    """Goes to `{work}/reader.safetensors`."""

    def __init__(self, space: LavitWorkspace) -> None:
        self.features, self.labels, self.see = space.features, label_tensor(space.pool), space.see
        torch.manual_seed(space.config.seed + 2)
        self.reader = Reader(space).to(space.device)
        super().__init__(space, "reader", self.reader)

    def step_loss(self, model: nn.Module, micro_step: int) -> tuple[Tensor, Mapping[str, Any]]:
        rows = batch_indices(micro_step, self.settings.batch_size, len(self.features), self.settings.seed)
        labels = self.labels[rows].to(self.space.device)
        read = model(self.features[rows].to(self.space.device))
        right = self.reader.heads.right(read.detach(), labels).float()
        return self.reader.heads.loss(read, labels), {"first": right[:, 0].mean(), "all": right.amin(1).mean()}

    @torch.no_grad()
    def finish(self, group: ProcessGroup) -> Mapping[str, Any]:
        space, reader = self.space, self.reader.cpu().eval()
        save_state_dict(reader.state_dict(), space.work / READER_FILE)
        found = {split: named_right(reader.heads, reader(self.see(scenes)), scenes)
                 for split in ("val", "pairs", "styles") for scenes in [space.held_out(split)]}
        return {**super().finish(group), **found}


class ReadStage1(LavitStage1):
    """With the reader's distance between rebuilt features and the encoder's in the loss.

    Attributes:
        readable_B: images of the batch that the reader counts for. It has learnt from scenes with things only: what
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

    def __init__(self, space: LavitWorkspace, name: str = "tokenizer") -> None:
        self.lavit, config, pool, first = space, space.config, space.features, name == "tokenizer"
        settings = getattr(config, f"train_{name}")
        start: dict[str, Any] = {"codebook_warmup": int(WITHOUT_CODES * settings.steps), "kmeans_start": True,
                                 "kmeans_images": 1024} if first else {}
        tokenizer = space.new_tokenizer()
        torch.manual_seed(config.seed + 3)
        self.model = ReadStage1(
            load_reader(space), tokenizer, CodeDecoder(space.decoder_sizes).to(space.device),
            weights=LavitStage1Weights(config.tokenizer.first_keep if first else config.tokenizer.keep,
                                       config.tokenizer.ratio))
        self.model.start_share()
        empty_pixels = to_clip(torch.from_numpy(empty_pictures(config.image_size)).permute(0, 3, 1, 2))
        empty = tokenizer.patch_features(empty_pixels.to(space.device)).half().cpu()
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
        space, model = self.lavit, self.model.eval()
        scenes = space.held_out("val")
        seen = [part.to(space.device).float() for part in space.see(scenes).split(256)]
        measured = measure(model, seen)
        tokenizer, decoder = (part.cpu() for part in model.finished())
        with torch.no_grad():
            rebuilt = torch.cat([rebuild(tokenizer, decoder, part.cpu()) for part in seen])
            reader = model.reader[0].cpu()
            read = named_right(reader.heads, reader(rebuilt), scenes)
        return {**super().finish(group), **measured.to_dict(), "read": read}


class NarrowTask(TokenizerTask):
    """Stage `narrow`, with fewer tokens; the tokenizer goes to `{out}/tokenizer`, the decoder to `{out}/decoder`."""

    def __init__(self, space: LavitWorkspace) -> None:
        super().__init__(space, "narrow")
        self.settings = replace(self.settings, start=self.settings.start or str(space.work / "tokenizer.checkpoints"))

    def finish(self, group: ProcessGroup) -> Mapping[str, Any]:
        space, numbers = self.lavit, super().finish(group)
        save_dynamic_tokenizer(self.model.tokenizer, space.out / "tokenizer",  # without nano's vision encoder
                               tower=(space.nano / "model.safetensors", PREFIX))
        self.model.decoder.save_pretrained(space.out / "decoder")
        missed = numbers["cosine"] > space.config.gate_cosine
        if missed:
            print(f"The gate was missed: cosine loss {numbers['cosine']:.3f} > {space.config.gate_cosine}.", flush=True)
        return {**numbers, "gate_passed": not missed}


def rebuilt_features(space: LavitWorkspace) -> Tensor:
    """Features decoded from the codes of the first `drawn` scenes of the pool, float16 `[d, N, D]`."""
    def make() -> Tensor:
        tokenizer = load_dynamic_tokenizer(space.out / "tokenizer").to(space.device)
        decoder = CodeDecoder.from_pretrained(space.out / "decoder").to(space.device)
        parts = space.features[: space.config.drawn].split(1024)
        return torch.cat([rebuild(tokenizer, decoder, part.to(space.device).float()).half().cpu() for part in parts])

    return space.cached("rebuilt", "narrow", make, drawn=space.config.drawn)


@torch.no_grad()
def rebuild(tokenizer: DynamicTokenizer, decoder: CodeDecoder, features_BND: Tensor) -> Tensor:
    """The encoder's features `[B, N, D]` → codes → features."""
    keep_BN = tokenizer.select(features_BND, generator=torch.Generator().manual_seed(0)).keep_BN
    rows_TD = tokenizer.merge(features_BND, keep_BN)[keep_BN > 0.5]
    counts = (keep_BN > 0.5).sum(1).tolist()
    return decoder.features(list(tokenizer.quantize_rows(rows_TD)[1].split(counts)))
