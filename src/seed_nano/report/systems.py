"""Adapters of the three systems with a common batch interface; images in the system's
representation.

SEED-LLaMA's images are lists of codes, SEED-X's PIL images or `GeneratedAnswer` features, LaVIT's
`Tokens`.
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

from seed_multimodal.evaluation.metrics import FloatArray
from seed_multimodal.language.messages import user_message
from seed_multimodal.pipelines.base import MultimodalSystem

Images = Sequence[Image.Image]
LONGEST_TEXT = 110  # tokens: an endless answer would delay its batch


class System:
    """Base: `inner` is the library's system, `batch` the batch size, `seed` that of image
    generation and sampling."""

    def __init__(self, inner: Any, batch: int = 64, seed: int = 0) -> None:
        self.inner = inner
        self.batch = batch
        self.seed = seed
        self.image_size = inner.config.image_size or 64
        self.codebook_size = inner.tokenizer.vocabulary.n_codes

    def facts(self) -> dict[str, Any]:
        """Settings that affect the numbers."""
        return {
            "dtype": self.inner.dtype_name,
            "generation": self.inner.config.generation,
            **vars(self.inner.images.decoder.defaults),
        }

    def encode(self, images: Images) -> list[Any]:
        """Images as input of the language model."""
        return list(images)

    def decode(self, encoded: Sequence[Any]) -> list[Image.Image]:
        """Images decoded from the results of `encode`, `draw` and `edit`."""
        raise NotImplementedError

    def decode_complete(self, generated: Sequence[Any], **options: Any) -> list[Image.Image | None]:
        """`decode`, with None for incomplete images."""
        complete = [image for image in generated if image is not None]
        decoded = iter(self.decode(complete, **options) if complete else ())
        return [None if image is None else next(decoded) for image in generated]

    def describe(self, encoded: Sequence[Any]) -> list[str]:
        """A caption of each image."""
        images, options = self.image_arguments(encoded)
        return list(self.inner.describe(images, **options))

    def ask(self, encoded: Sequence[Any], questions: Sequence[str]) -> list[str]:
        """A short answer to each question about its image."""
        images, options = self.image_arguments(encoded)
        return list(self.inner.ask(images, list(questions), **options))

    def draw(self, texts: Sequence[str]) -> list[Any]:
        """An undecoded image for each text; None if incomplete."""
        draw_request = self.inner.family.tasks.draw_request
        return self.generate([[draw_request(text)] for text in texts], "draw")

    def edit(self, encoded: Sequence[Any], instructions: Sequence[str]) -> list[Any]:
        """Edited images, as returned by `draw`."""
        return self.generate(
            [[image, text] for image, text in zip(encoded, instructions, strict=True)], "edit"
        )

    def generate(self, contents: Sequence[Sequence[Any]], task: str) -> list[Any]:
        """The image in the answer to each message."""
        answers = self.answers(contents, task, [self.seed] * len(contents))
        return [answer if len(answer.image_inputs) == 1 else None for answer in answers]

    def answers(
        self, contents: Sequence[Sequence[Any]], task: str, seeds: Sequence[int]
    ) -> list[Any]:
        """The answer with an image to each message, by its seed."""
        settings = self.inner.settings(task)
        return self.inner.generate_image_answers(
            [user_message(content) for content in contents],
            task,
            [replace(settings, seed=seed) for seed in seeds],
            {},
            batch_size=self.batch,
        )

    def image_arguments(self, encoded: Sequence[Any]) -> tuple[Sequence[Any], dict[str, Any]]:
        """Encoded images as arguments of the library's methods, and options of answers about
        them."""
        max_new_tokens = min(self.inner.settings().max_new_tokens, LONGEST_TEXT)
        return encoded, {
            "seed": self.seed,
            "batch_size": self.batch,
            "max_new_tokens": max_new_tokens,
        }


class SeedLlamaSystem(System):
    """SEED-LLaMA."""

    def encode(self, images: Images) -> list[Any]:
        codes: list[Any] = []
        for start in range(0, len(images), self.batch):
            codes += self.inner.images.encode(images[start : start + self.batch]).tolist()
        return codes

    def decode(self, encoded: Sequence[Any]) -> list[Image.Image]:
        codes = [getattr(image, "image_inputs", [image])[0] for image in encoded]
        return list(
            self.inner.images.draw(codes, seeds=[self.seed] * len(codes), batch_size=self.batch)
        )


class SeedXSystem(System):
    """A SEED-X that follows instructions."""

    def decode(self, encoded: Sequence[Any]) -> list[Image.Image]:
        if isinstance(encoded[0], Image.Image):
            return list(self.inner.reconstruct(encoded, self.seed, batch_size=self.batch))
        features = [answer.image_inputs[0] for answer in encoded]
        prompts = [answer.prompt for answer in encoded]
        seeds = [self.seed] * len(encoded)
        return list(self.inner.decode_images(features, prompts, seeds, {}, self.batch))

    def detect(self, images: Images, phrases: Sequence[str]) -> list[list[tuple[int, ...]]]:
        """Boxes (left, top, right, bottom in pixels) of each phrase in its image."""
        _, options = self.image_arguments(images)
        detections = self.inner.detect(images, list(phrases), **options)
        return [detection.boxes for detection in detections]


@dataclass(frozen=True)
class Tokens:
    """The codes of an image; if encoded also the image, the selection's seed, and the mask `[g, g]`
    of selected patches."""

    codes: list[int]
    image: Image.Image | None = None
    seed: int = 0
    patches: Tensor | None = None

    def dimmed(self) -> Image.Image:
        """The image with unselected patches greyed out."""
        assert self.image is not None and self.patches is not None
        mask = Image.fromarray(255 * self.patches.numpy().astype(np.uint8))
        grey = Image.new("RGB", self.image.size, (128, 128, 128))
        return Image.composite(
            self.image, Image.blend(grey, self.image, 0.25), mask.resize(self.image.size, 0)
        )


class LavitSystem(System):
    """A LaVIT; image n is encoded and generated with `seed` + n."""

    def __init__(self, inner: Any, batch: int = 64, seed: int = 0) -> None:
        super().__init__(inner, batch, seed)
        inner.log = None
        inner.family.lemmatizer = lambda text: " ".join(
            text.lower().split()
        )  # independent of spaCy
        self.patches = inner.tokenizer.vocabulary.tokens_per_image
        self.samples = inner.images.selection == "draw"

    def encode(self, images: Images) -> list[Any]:
        seeds = list(range(self.seed, self.seed + len(images)))
        codec = self.inner.images
        codes = [row.tolist() for row in codec.encode(images, seed=seeds)]
        patches = codec.encode_by(self.kept_patches, images, seeds)
        return list(map(Tokens, codes, images, seeds, patches))

    def kept_patches(self, pixels: Tensor, mode: str, generator: Any) -> list[Tensor]:
        """Which patches of each image are kept, `[g, g]` bool, on the CPU."""
        tokenizer = self.inner.images.code_tokenizer
        features_BND = tokenizer.patch_features(pixels)
        keep_BN = tokenizer.select(features_BND, mode=mode, generator=generator).keep_BN
        side = math.isqrt(tokenizer.n_patches)
        return list(keep_BN.bool().unflatten(1, (side, side)).cpu())

    def decode(self, encoded: Sequence[Any], ratio: str = "1:1") -> list[Image.Image]:
        """See `System`; `ratio`: of the sides."""
        return list(
            self.inner.images.draw(
                [image.codes for image in encoded],
                seeds=[self.seed] * len(encoded),
                ratio=ratio,
                batch_size=self.batch,
            )
        )

    def image_arguments(self, encoded: Sequence[Any]) -> tuple[Sequence[Any], dict[str, Any]]:
        return [image.image for image in encoded], {
            "seed": [image.seed for image in encoded],
            "batch_size": self.batch,
        }

    def draw(self, texts: Sequence[str]) -> list[Any]:
        return self.generate([[text] for text in texts], "draw")

    def edit(self, encoded: Sequence[Any], instructions: Sequence[str]) -> list[Any]:
        return self.generate(
            [[image.codes, text] for image, text in zip(encoded, instructions, strict=True)], "edit"
        )

    def generate(self, contents: Sequence[Sequence[Any]], task: str) -> list[Any]:
        answers = self.answers(contents, task, range(self.seed, self.seed + len(contents)))
        return [
            Tokens(list(answer.image_inputs[0])) if len(answer.image_inputs) == 1 else None
            for answer in answers
        ]

    @torch.inference_mode()
    def losses(self, encoded: Sequence[Any]) -> tuple[FloatArray, FloatArray]:
        """1 − cosine between the vision encoder's features and those decoded from the codes, mean
        over patches, [N]; and the same for the mean image."""
        codec = self.inner.images
        features = list[Tensor]()
        rebuilt = list[Tensor]()
        # 1. Features of the images and those decoded from their codes, [N, patches, D].
        for start in range(0, len(encoded), self.batch):
            rows = encoded[start : start + self.batch]
            with codec.encoding():
                pixels = torch.stack(
                    [codec.code_tokenizer.transform(codec.open(image.image)) for image in rows]
                ).to(codec.device)
                features.append(codec.code_tokenizer.patch_features(pixels).float().cpu())
                codes = [
                    codec.code_tokenizer.embed_codes(
                        torch.tensor(image.codes, device=codec.code_tokenizer.device)
                    )
                    for image in rows
                ]
            rebuilt.append(codec.decoder.decoder.features(codes).float().cpu())
        # 2. Distance of the decoded features, and of the mean image, to the true ones.
        true = torch.cat(features)
        mean_image = true.mean(0, keepdim=True).expand_as(true)
        near = 1 - F.cosine_similarity(true, torch.cat(rebuilt), dim=-1).mean(1)
        blind = 1 - F.cosine_similarity(true, mean_image, dim=-1).mean(1)
        return near.numpy(), blind.numpy()


ADAPTERS: dict[str, type[System]] = {
    "seed_llama": SeedLlamaSystem,
    "seed_x": SeedXSystem,
    "lavit": LavitSystem,
}


def load_system(model: str | Path, *, batch: int = 64, seed: int = 0, **options: Any) -> System:
    """The system of a folder or name; `options` and errors as of
    `MultimodalSystem.from_pretrained`."""
    system = MultimodalSystem.from_pretrained(model, **options)
    return ADAPTERS[system.config.system](system, batch, seed)
