"""Train the independent scorer on every split of a nano data set.

    python -m seed_multimodal.evaluation.train_judge --data data/nano64 --out pretrained/nano/judge --minutes 15

A CLIP loss with several right answers: a picture matches its styled name, and any caption of its label that names no
other style; plus a small style classifier. A step's data is a function of (seed, step), so a stopped run resumes from
its checkpoint; with `--steps` it ends bit-equal to an uninterrupted one on a CPU (`--minutes` ties the learning rate to
the clock and is not repeatable).
"""

from __future__ import annotations

import argparse
import hashlib
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from seed_multimodal.device import choose_device
from seed_multimodal.entry import DONE, run_program
from seed_multimodal.errors import CheckpointError
from seed_multimodal.evaluation.augment import augment
from seed_multimodal.evaluation.judge import PAD, UNKNOWN, Judge, JudgeConfig, canonical_caption, split_words
from seed_multimodal.evaluation.metrics import mentions, retrieval_at_k, same_items
from seed_multimodal.settings import check_settings, setting
from seed_multimodal.training.loop import train
from seed_multimodal.training.loop_settings import StageSettings
from seed_multimodal.training.stage import StageTask


@dataclass(frozen=True)
class Corpus:
    """The training data as tensors.

    Attributes:
        pixels: uint8 [N, 3, H, W].
        labels, styles, canonical: int64 [N]: label, style and styled text of each picture.
        captions: per picture, the ids of all its texts.
        text_labels, text_styles: int64 [T] of each text; style -1 where it names none.
    """

    pixels: Tensor
    labels: Tensor
    styles: Tensor
    canonical: Tensor
    captions: list[list[int]]
    texts: list[str]
    text_labels: Tensor
    text_styles: Tensor
    style_names: list[str]


def build_corpus(nano: Any) -> Corpus:
    """Gather pictures and texts of a `NanoSet` (all splits)."""
    records = nano.records
    styles = sorted({r.style for r in records})
    labels = {label: i for i, label in enumerate(dict.fromkeys(r.label for r in records))}
    known: dict[tuple[str, int], int] = {}
    text_styles: list[int] = []
    captions, canonical = [], []
    for record in records:
        label = labels[record.label]
        row = []
        for text in [canonical_caption(record), record.label, *record.captions]:
            if (text, label) not in known:
                known[text, label] = len(known)
                text_styles.append(style_of_text(text, styles))
            row.append(known[text, label])
        canonical.append(row[0])
        captions.append(sorted(set(row)))
    pixels = torch.from_numpy(np.ascontiguousarray(nano.images().transpose(0, 3, 1, 2)))
    return Corpus(pixels, torch.tensor([labels[r.label] for r in records]),
                  torch.tensor([styles.index(r.style) for r in records]), torch.tensor(canonical), captions,
                  [text for text, _ in known], torch.tensor([label for _, label in known]),
                  torch.tensor(text_styles), styles)


def style_of_text(text: str, styles: Sequence[str]) -> int:
    """Index of the only one of `styles` that `text` names, or -1."""
    named = [i for i, style in enumerate(styles) if mentions(text, style)]
    return named[0] if len(named) == 1 else -1


def new_judge(corpus: Corpus, seed: int) -> Judge:
    """A judge with random weights whose vocabulary covers the corpus."""
    words = sorted({word for text in corpus.texts for word in split_words(text)})
    torch.manual_seed(seed)
    return Judge(JudgeConfig(words=words, styles=corpus.style_names))


def batch_rows(count: int, batch: int, seed: int, step: int) -> Tensor:
    """Picture numbers of one step: consecutive parts of one shuffled order per epoch (a function of seed, step)."""
    per_epoch = max(count // batch, 1)
    order = torch.randperm(count, generator=Generator().manual_seed(seed * 1_000_003 + step // per_epoch))
    start = step % per_epoch * batch
    return order[start : start + batch]


def contrastive_loss(images: Tensor, texts: Tensor, scale: Tensor, right: Tensor) -> Tensor:
    """CLIP loss with several right answers: `right` [B, B] bool; targets are spread evenly over them."""
    logits = scale * images @ texts.T
    target = right.to(logits.dtype)
    by_image = -(F.log_softmax(logits, 1) * target / target.sum(1, keepdim=True)).sum(1).mean()
    by_text = -(F.log_softmax(logits, 0) * target / target.sum(0, keepdim=True)).sum(0).mean()
    return (by_image + by_text) / 2


@dataclass
class Plan:
    """How long and how fast to train; `steps` wins over `minutes`."""

    minutes: float = setting(15.0, above=0)
    steps: int | None = setting(None, least=1)
    batch: int = setting(256, least=2)
    lr: float = setting(2e-3, least=0)
    seed: int = setting(77, least=0)

    def progress(self, step: int, seconds: float) -> float:
        """Share of the run that is done, 0..1."""
        done = step / self.steps if self.steps else seconds / (60 * self.minutes)
        return min(done, 1.0)

    def rate(self, progress: float) -> float:
        """Learning rate: 4 % warm-up, then cosine to 1 %."""
        warm = min(1.0, progress / 0.04) if progress < 0.04 else 1.0
        return self.lr * max(warm * (0.5 + 0.5 * math.cos(math.pi * progress)), 0.01)


class JudgeTask(StageTask):
    """The judge's training. With `minutes` the number of steps is an estimate until the time is over."""

    def __init__(self, corpus: Corpus, plan: Plan, device: torch.device) -> None:
        self.judge = new_judge(corpus, plan.seed).to(device).to(memory_format=torch.channels_last)
        self.corpus, self.plan, self.ids = corpus, plan, self.judge.word_ids(corpus.texts)
        self.started = time.monotonic()
        settings = StageSettings(steps=plan.steps or 1_000_000, batch_size=plan.batch, lr=plan.lr, clip=1.0,
                                 precision="fp32", seed=plan.seed)
        super().__init__("judge", self.judge, settings, optimizer=optimizer_for(self.judge, plan.lr),
                         parallel=False)

    def learning_rate(self, step: int) -> float:
        return self.plan.rate(self.plan.progress(step, self.seconds()))

    def seconds(self) -> float:
        """Time spent on training, over all its processes."""
        return time.monotonic() - self.started

    def micro_step(self, model: nn.Module, micro_step: int) -> tuple[Tensor, Mapping[str, Any]]:
        """The loss, with the attention kernel that torch chooses."""
        return self.step_loss(model, micro_step)

    def step_loss(self, model: nn.Module, step: int) -> tuple[Tensor, Mapping[str, Any]]:
        """Loss of one batch: styled names, free captions, style."""
        judge, corpus, device = self.judge, self.corpus, self.judge.log_scale.device
        rows = batch_rows(len(corpus.labels), self.plan.batch, self.plan.seed, step)
        generator = Generator().manual_seed(self.plan.seed * 7_919 + step)
        pixels = augment(corpus.pixels[rows], judge.config.image_size, generator)
        pixels = pixels.to(device, memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16):
            image = judge.image(pixels)
        image = F.normalize(image.float(), dim=1)
        picks = torch.rand(len(rows), generator=generator)
        free = torch.tensor([corpus.captions[r][int(p * len(corpus.captions[r]))]
                             for r, p in zip(rows.tolist(), picks.tolist(), strict=True)])
        words = self._words(torch.cat([corpus.canonical[rows], free]), generator)
        text = F.normalize(judge.text(words.to(device)), dim=1)
        labels, styles = corpus.labels[rows], corpus.styles[rows]
        same = labels[:, None] == labels[None, :]
        named = corpus.text_styles[free][None, :]
        free_right = (corpus.text_labels[free][None, :] == labels[:, None]) & ((named < 0) | (named == styles[:, None]))
        scale = judge.log_scale.exp().clamp(max=100)
        right = (same & (styles[:, None] == styles[None, :])).to(device)
        loss = contrastive_loss(image, text[: len(rows)], scale, right)
        loss = loss + contrastive_loss(image, text[len(rows) :], scale, free_right.to(device))
        return loss + 0.2 * F.cross_entropy(judge.style(image), styles.to(device)), {}

    def _words(self, texts: Tensor, generator: Generator) -> Tensor:
        """Word ids of texts [T] → [T, L]; words are replaced by the unknown word at random, so that texts with new
        words are still embedded by the others."""
        ids = self.ids[texts]
        ids = ids[:, : int((ids != PAD).sum(1).max())]
        dropped = (torch.rand(ids.shape, generator=generator) < 0.03) & (ids != PAD)
        return ids.masked_fill(dropped, UNKNOWN)

    def after_step(self, step: int) -> None:
        if not self.plan.steps:
            done = self.plan.progress(step, self.seconds())
            self.settings.steps = step if done >= 1 else max(step + 1, round(step / done))

    def identity(self, world: int) -> dict[str, Any]:
        words = hashlib.sha256(" ".join(self.judge.config.words).encode()).hexdigest()
        return {**super().identity(world), "seed": self.plan.seed, "words": words}

    def check_resume(self, folder: Path, saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
        if any(saved.get(key) != value for key, value in now.items()):
            raise CheckpointError(f"{folder}: a checkpoint of another data set, seed or batch; delete it or choose "
                                  "--work.")
        return []

    def state_dict(self, step: int) -> dict[str, Any]:
        return {"seconds": self.seconds()}

    def load_state_dict(self, states: list[dict[str, Any]], rank: int) -> None:
        self.started = time.monotonic() - float(states[0]["seconds"])


def optimizer_for(judge: Judge, lr: float) -> torch.optim.AdamW:
    """AdamW; matrices and kernels decay, vectors do not."""
    decay = [p for p in judge.parameters() if p.ndim > 1]
    rest = [p for p in judge.parameters() if p.ndim <= 1]
    return torch.optim.AdamW([{"params": decay, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}], lr=lr,
                             betas=(0.9, 0.98))


def train_judge(corpus: Corpus, plan: Plan, work: Path, device: torch.device) -> tuple[Judge, dict[str, Any]]:
    """Train, or resume from the checkpoint in `work`; returns the judge in evaluation mode and the run's record.

    Raises:
        CheckpointError: the checkpoint belongs to other data or another plan.
    """
    task = JudgeTask(corpus, plan, device)
    record = train(task, task.settings, work)
    return task.judge.eval(), record


def real_picture_scores(judge: Judge, nano: Any) -> dict[str, dict[str, float]]:
    """The judge's scores of the real pictures, per split: retrieval between pictures and styled names, style."""
    pictures = nano.images()
    scores = {}
    for split in sorted({r.split for r in nano.records}):
        rows = nano.split(split)
        names = [canonical_caption(nano.records[i]) for i in rows]
        gallery = list(dict.fromkeys(names))
        images, texts = judge.embed_images(pictures[rows]), judge.embed_texts(gallery)
        similarity, right = (images @ texts.T).numpy(), same_items(names, gallery)
        style = [a == nano.records[i].style for a, i in zip(judge.styles_of(images), rows, strict=True)]
        scores[split] = {
            "pictures": len(rows), "texts": len(gallery),
            "picture_to_text_r1": float(retrieval_at_k(similarity, right, 1).mean()),
            "picture_to_text_r5": float(retrieval_at_k(similarity, right, 5).mean()),
            "text_to_picture_r1": float(retrieval_at_k(similarity.T, right.T, 1).mean()),
            "text_to_picture_r5": float(retrieval_at_k(similarity.T, right.T, 5).mean()),
            "style": float(np.mean(style))}
    return scores


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description="Train the independent scorer on all splits of a nano data set.")
    parser.add_argument("--data", default=None, help="folder of the nano data set (default: the committed one)")
    parser.add_argument("--out", default="pretrained/nano/judge", help="folder to write the judge into")
    parser.add_argument("--work", default="runs/judge", help="folder of the checkpoint that a stopped run resumes from")
    parser.add_argument("--minutes", type=float, default=15.0)
    parser.add_argument("--steps", type=int, default=None, help="train this many steps instead of --minutes")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--seed", type=int, default=77)
    parser.add_argument("--device", default="auto")
    return run_program(parser, _train, arguments, "train judge")


def _train(options: argparse.Namespace) -> int:
    from seed_multimodal.data.nano import load_nano

    plan = Plan(options.minutes, options.steps, options.batch, seed=options.seed)
    check_settings(plan, "train judge")
    runtime = choose_device(options.device, "float32")
    nano = load_nano(options.data)
    judge, record = train_judge(build_corpus(nano), plan, Path(options.work), runtime.device)
    steps, seconds = record["steps"], record["seconds"]
    judge.config.training = {
        "steps": steps, "seconds": round(seconds), "batch": plan.batch, "seed": plan.seed,
        "device": str(runtime.device), "threads": torch.get_num_threads(), "splits": "all",
        "real_pictures": real_picture_scores(judge, nano)}
    judge.save_pretrained(options.out)
    for split, values in judge.config.training["real_pictures"].items():
        print(split, {k: round(v, 3) for k, v in values.items()})
    print(f"Saved {options.out} after {steps} steps, {seconds:.0f} s.")
    return DONE


if __name__ == "__main__":
    raise SystemExit(main())
