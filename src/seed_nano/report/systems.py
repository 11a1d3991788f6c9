"""The library's systems as a report uses them: batches of many images, before and after decoding.

Images are codes (SEED-LLaMA, LaVIT) or features (SEED-X); image n is encoded and answered with
`seed` + n, all are decoded with `seed`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from seed_multimodal.disk import JsonObject
from seed_multimodal.evaluation.metrics import FloatArray
from seed_multimodal.language.messages import user_message
from seed_multimodal.models.lavit.pipeline import LavitFamily
from seed_multimodal.pipelines.base import MultimodalSystem
from seed_multimodal.pipelines.config import SystemConfig
from seed_multimodal.pipelines.run import GeneratedAnswer
from seed_multimodal.pipelines.tasks import Task

Images = Sequence[Image.Image]
Boxes = Sequence[tuple[int, int, int, int]]  # left, top, right, bottom in pixels
LONGEST_TEXT = 110  # tokens: an endless answer would delay its batch


@dataclass(frozen=True)
class EncodedImage:
    """An image, its codes (none of a system that reads features), and the seed of their choice."""

    image: Image.Image
    seed: int
    codes: Sequence[int] = ()


class System:
    """`inner` is the library's system; `batch`: images or requests at a time."""

    def __init__(self, inner: MultimodalSystem, batch: int = 64, seed: int = 0) -> None:
        self.inner = inner
        self.batch = batch
        self.seed = seed
        self.image_size: int = inner.config.image_size or 64
        if isinstance(inner.family, LavitFamily):
            inner.log = None
            inner.family.lemmatizer = _normalise  # independent of spaCy

    def facts(self) -> JsonObject:
        """Settings that affect the numbers."""
        return {
            "dtype": self.inner.dtype_name,
            "generation": self.inner.config.generation,
            **vars(self.codec.decoder.defaults),
        }

    @property
    def codec(self) -> Any:
        """The family's encoder and de-tokenizer."""
        return self.inner.images

    def seeds(self, count: int) -> range:
        """The seeds of images or requests."""
        return range(self.seed, self.seed + count)

    # ---- images

    def encode(self, images: Images) -> list[EncodedImage]:
        """Images with their codes."""
        seeds = self.seeds(len(images))
        if not self.inner.abilities.draws_codes:
            return list(map(EncodedImage, images, seeds))
        rows = self.inner.tokenize(images, seed=seeds)
        codes = [row.tolist() for row in rows]
        return list(map(EncodedImage, images, seeds, codes))

    def rebuild(self, encoded: Sequence[EncodedImage]) -> list[Image.Image]:
        """Images decoded from the codes or features of images."""
        inputs = [image.codes or image.image for image in encoded]
        return self.inner.reconstruct(inputs, self.seed, batch_size=self.batch)

    def decode(
        self, answers: Sequence[GeneratedAnswer | None], **drawing: object
    ) -> list[Image.Image | None]:
        """The images of the results of `draw` and `edit`; None if incomplete."""
        complete = [answer for answer in answers if answer is not None]
        if not complete:
            return [None] * len(answers)
        images = iter(
            self.inner.family.draw(
                [answer.single_image() for answer in complete],
                [answer.prompt for answer in complete],
                [self.seed] * len(complete),
                {"batch_size": self.batch, **drawing},
            )
        )
        return [None if answer is None else next(images) for answer in answers]

    # ---- texts

    def describe(self, encoded: Sequence[EncodedImage]) -> list[str]:
        """A caption of each image."""
        texts: list[str] = self.inner.describe(
            self._readable(encoded),
            seed=[image.seed for image in encoded],
            batch_size=self.batch,
            max_new_tokens=self._text_limit("describe"),
        )
        return texts

    def ask(self, encoded: Sequence[EncodedImage], questions: Sequence[str]) -> list[str]:
        """A short answer to each question about its image."""
        texts: list[str] = self.inner.ask(
            self._readable(encoded),
            questions,
            seed=[image.seed for image in encoded],
            batch_size=self.batch,
            max_new_tokens=self._text_limit("ask"),
        )
        return texts

    def detect(self, images: Images, phrases: Sequence[str]) -> list[Boxes]:
        """Boxes of each phrase in its image."""
        detections = self.inner.detect(
            images,
            phrases,
            seed=self.seed,
            batch_size=self.batch,
            max_new_tokens=self._text_limit("detect"),
        )
        return [detection.boxes for detection in detections]

    def _readable(self, encoded: Sequence[EncodedImage]) -> list[Any]:
        """What the language model reads of images: codes, or features of the image itself."""
        reads_codes = self.inner.abilities.reads_codes
        return [image.codes if reads_codes else image.image for image in encoded]

    def _text_limit(self, task: str) -> int:
        return min(self.inner.settings(task).max_new_tokens, LONGEST_TEXT)

    # ---- answers with an image

    def draw(self, texts: Sequence[str]) -> list[GeneratedAnswer | None]:
        """An undecoded image for each text; None if incomplete."""
        as_request = self.inner.tasks.draw_request if self.inner.config.tuned else str
        return self._generate([[as_request(text)] for text in texts], "draw")

    def edit(
        self, encoded: Sequence[EncodedImage], instructions: Sequence[str]
    ) -> list[GeneratedAnswer | None]:
        """Edited images, as returned by `draw`."""
        contents = []
        for image, text in zip(encoded, instructions, strict=True):
            contents.append([image.codes or image.image, text])
        return self._generate(contents, "edit")

    def _generate(self, contents: Sequence[Sequence[Any]], task: Any) -> list[Any]:
        settings = self.inner.settings(task, images="forced")
        tasks: list[Task] = []
        for content, seed in zip(contents, self.seeds(len(contents)), strict=True):
            generation = replace(settings, seed=seed)
            tasks.append(self.inner.image_task(task, user_message(content), generation))
        answers: list[GeneratedAnswer | None] = []
        for batch in self.inner.generate(tasks, batch_size=self.batch):
            answers += [item if len(item.inputs) == 1 else None for item in batch]
        return answers


def load_system(
    model: str | Path | SystemConfig, *, batch: int = 64, seed: int = 0, **options: Any
) -> System:
    """The system of a folder or name; `options` and errors as of
    `MultimodalSystem.from_pretrained`."""
    return System(MultimodalSystem.from_pretrained(model, **options), batch, seed)


def _normalise(text: str) -> str:
    return " ".join(text.lower().split())


# ---- LaVIT's choice of patches


def dimmed_images(codec: Any, encoded: Sequence[EncodedImage]) -> list[Image.Image]:
    """Images with the patches greyed out that LaVIT did not select."""
    tokenizer = codec.code_tokenizer
    side = math.isqrt(tokenizer.n_patches)

    def selected(pixels: Tensor, mode: str, generator: Any) -> list[Tensor]:
        features_BND = tokenizer.patch_features(pixels)
        keep_BN = tokenizer.select(features_BND, mode=mode, generator=generator).keep_BN
        return list(keep_BN.bool().unflatten(1, (side, side)).cpu())

    # The same seeds give the same patches as the codes.
    images = [image.image for image in encoded]
    masks = codec.encode_by(selected, images, [image.seed for image in encoded])
    dimmed = []
    for image, patches in zip(images, masks, strict=True):
        mask = Image.fromarray(255 * patches.numpy().astype(np.uint8)).resize(image.size, 0)
        grey = Image.new("RGB", image.size, (128, 128, 128))
        dimmed.append(Image.composite(image, Image.blend(grey, image, 0.25), mask))
    return dimmed


@torch.inference_mode()
def feature_losses(
    codec: Any, encoded: Sequence[EncodedImage], batch: int
) -> tuple[FloatArray, FloatArray]:
    """1 − cosine between the vision encoder's features and those that LaVIT decodes from the codes,
    mean over patches, [N]; and the same for the mean image."""
    tokenizer = codec.code_tokenizer
    features: list[Tensor] = []
    rebuilt: list[Tensor] = []
    # 1. Features of the images and those decoded from their codes, [N, patches, D].
    for start in range(0, len(encoded), batch):
        rows = encoded[start : start + batch]
        with codec.encoding():
            pixels = torch.stack([tokenizer.transform(codec.open(image.image)) for image in rows])
            features.append(tokenizer.patch_features(pixels.to(codec.device)).float().cpu())
            codes = [torch.tensor(image.codes, device=codec.device) for image in rows]
            embedded = list(map(tokenizer.embed_codes, codes))
        rebuilt.append(codec.decoder.decoder.features(embedded).float().cpu())
    # 2. Distance of the decoded features, and of the mean image, to the true ones.
    true = torch.cat(features)
    mean_image = true.mean(0, keepdim=True).expand_as(true)
    near = 1 - F.cosine_similarity(true, torch.cat(rebuilt), dim=-1).mean(1)
    blind = 1 - F.cosine_similarity(true, mean_image, dim=-1).mean(1)
    return near.numpy(), blind.numpy()
