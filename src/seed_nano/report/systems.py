"""The three systems as the report uses them: lists in, lists out, each image as its system reads and writes it.

SEED-LLaMA's images are lists of codes, SEED-X's PIL images or `Written` features, LaVIT's `Tokens`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from torch import Tensor

from seed_multimodal.evaluation.metrics import FloatArray
from seed_multimodal.images.any_resolution import AnyResolution
from seed_multimodal.language.answer import ImagePart, TextPart, split_answer
from seed_multimodal.language.generation import generate_ids
from seed_multimodal.language.lemmatizer import Lemmatizer
from seed_multimodal.language.prompts import Turn
from seed_multimodal.systems.batch import Written
from seed_multimodal.systems.open_system import kind_of, open_system
from seed_multimodal.systems.speaker import AnswerReader
from seed_multimodal.tokenizers.clip_weights import load_clip_vision

Images = Sequence[Image.Image]
LONGEST_TEXT = 110  # tokens: an answer without end would delay its whole batch


class System:
    """Base: `inner` is the library's system, `batch` the number of prompts or images at a time, `seed` that of every
    drawing and of sampling."""

    image_size, codebook_size = 64, 1

    def __init__(self, inner: Any, batch: int = 64, seed: int = 0) -> None:
        self.inner, self.batch, self.seed = inner, batch, seed

    def facts(self) -> dict[str, Any]:
        """Settings that the numbers depend on."""
        defaults, settings = self.inner.pictures.decoder.defaults, self.inner.settings()
        return {"steps": defaults.num_inference_steps, "guidance": defaults.guidance_scale, "beams": settings.num_beams,
                "sampling": settings.samples, "dtype": str(self.inner.llm.dtype).removeprefix("torch.")}

    def encode(self, images: Images) -> list[Any]:
        """Images as the language model reads them."""
        return list(images)

    def decode(self, encoded: Sequence[Any]) -> list[Image.Image]:
        """Images drawn from what `encode`, `draw` and `edit` return."""
        raise NotImplementedError

    def codes_of(self, encoded: Any) -> list[int]:
        """The codes of an image."""
        return list(encoded)

    def paint(self, written: Sequence[Any], **options: Any) -> list[Image.Image | None]:
        """`decode`, with None where no whole image was written."""
        drawn = iter(self.decode([one for one in written if one is not None], **options))
        return [None if one is None else next(drawn) for one in written]

    def describe(self, encoded: Sequence[Any]) -> list[str]:
        """A caption of each image."""
        return list(self.inner.describe_all(self.images(encoded), **self.short(encoded)))

    def ask(self, encoded: Sequence[Any], questions: Sequence[str]) -> list[str]:
        """A short answer to each question about its image."""
        return list(self.inner.ask_all(self.images(encoded), questions, **self.short(encoded)))

    def draw(self, texts: Sequence[str]) -> list[Any]:
        """An image for each text, not yet decoded; None where the answer holds no whole image."""
        return self.write([[self.inner.tasks.draw_request(text)] for text in texts], "draw")

    def edit(self, encoded: Sequence[Any], instructions: Sequence[str]) -> list[Any]:
        """Each image after its instruction, as `draw` returns them."""
        return self.write([[one, text] for one, text in zip(encoded, instructions, strict=True)], "edit")

    def write(self, contents: Sequence[Sequence[Any]], task: str) -> list[Any]:
        """The image that answers each message."""
        written = self.inner.write_all(contents, task, batch_size=self.batch, seed=self.seed)
        return [self.image_of(one) if len(one.images) == 1 else None for one in written]

    def image_of(self, written: Written) -> Any:
        """What `decode` needs of an answer."""
        return written

    def images(self, encoded: Sequence[Any]) -> Sequence[Any]:
        """What the library's methods are given for encoded images."""
        return encoded

    def short(self, encoded: Sequence[Any]) -> dict[str, Any]:
        """Options of short answers about encoded images."""
        most = min(self.inner.settings().max_new_tokens, LONGEST_TEXT)
        return {"seed": self.seed, "batch_size": self.batch, "max_new_tokens": most}


class SeedLlamaSystem(System):
    """SEED-LLaMA; also answers whole conversations."""

    def __init__(self, inner: Any, batch: int = 64, seed: int = 0) -> None:
        super().__init__(inner, batch, seed)
        self.image_size, self.codebook_size = inner.spec.image_size, inner.tokenizer.vocabulary.n_codes

    def facts(self) -> dict[str, Any]:
        return {"template": self.inner.template.name, **super().facts(), "codebook": self.codebook_size}

    def encode(self, images: Images) -> list[Any]:
        return list(self.inner.encode_all(images, batch_size=self.batch).tolist()) if images else []

    def decode(self, encoded: Sequence[Any], first: int | None = None) -> list[Image.Image]:
        """See `System`; `first`: draw from so many codes only."""
        return list(self.inner.pictures.draw(encoded, seed=self.seed, batch_size=self.batch, first=first)
                    ) if encoded else []

    def image_of(self, written: Written) -> Any:
        return written.images[0]

    def answer(self, dialogues: Sequence[Any], most: int) -> list[list[Any]]:
        """Texts and codes of the answer to each dialogue, in at most `most` tokens, nothing forced; nothing where the
        context has no room. Prompts of like length share a batch."""
        inner = self.inner
        prompts = [inner.prompt_ids([Turn(role, tuple(parts)) for role, parts in turns]) for turns in dialogues]
        room = inner.llm.config.max_position_embeddings - most
        order = sorted((row for row, ids in enumerate(prompts) if len(ids) <= room), key=lambda row: len(prompts[row]))
        settings = replace(inner.settings(seed=self.seed), max_new_tokens=most)
        answers: list[list[Any]] = [[] for _ in prompts]
        for start in range(0, len(order), self.batch):
            rows = order[start:start + self.batch]
            made = generate_ids(inner.llm, [prompts[row] for row in rows], settings, inner.tokenizer)
            for row, ids in zip(rows, made, strict=True):
                reader = AnswerReader(inner.tokenizer, inner.template.turn_marker)
                answers[row] = [list(part.codes) if isinstance(part, ImagePart) else part.text.strip() for part in
                                split_answer(reader.read_all(ids), inner.tokenizer)
                                if isinstance(part, ImagePart | TextPart)]
        return answers

    @torch.no_grad()
    def through_vae(self, images: Images) -> list[Image.Image]:
        """Images through the decoder's VAE alone: the ceiling of what it can show."""
        vae, pixels, made = self.inner.pictures.decoder.pipeline.vae, VaeImageProcessor(), list[Image.Image]()
        for start in range(0, len(images), self.batch):
            rows = pixels.preprocess(list(images[start:start + self.batch])).to(vae.device, vae.dtype)
            made += pixels.postprocess(vae.decode(vae.encode(rows).latent_dist.mode()).sample.float())
        return made

    @torch.no_grad()
    def through_embedding(self, images: Images) -> list[Image.Image] | None:
        """Images drawn from their true embeddings: the ceiling of codes; None without an image encoder for it."""
        folder = Path(self.inner.spec.detokenizer or "") / "image_encoder"
        if not folder.is_dir():
            return None
        device, made = self.inner.pictures.device, list[Image.Image]()
        encoder = load_clip_vision(folder, device=device, dtype=self.inner.pictures.model.dtype, log=None)
        for start in range(0, len(images), self.batch):
            pixels = torch.stack([self.inner.transform(one) for one in images[start:start + self.batch]])
            embeddings = encoder(pixel_values=pixels.to(device, encoder.dtype)).image_embeds
            made += self.inner.pictures.decoder.decode(embeddings, generator=[
                torch.Generator("cpu").manual_seed(self.seed) for _ in pixels])
        return made


class SeedXSystem(System):
    """A SEED-X that follows instructions."""

    def decode(self, encoded: Sequence[Any]) -> list[Image.Image]:
        if encoded and isinstance(encoded[0], Image.Image):
            return list(self.inner.pictures.rebuild(encoded, seed=self.seed))
        return list(self.inner.draw_written(encoded, self.seed, self.batch, {})) if encoded else []

    def rebuild(self, images: Images, conditions: Images) -> list[Image.Image]:
        """Images drawn from their features, each with a condition image."""
        return list(self.inner.pictures.rebuild(images, conditions, self.seed))

    def detect(self, images: Images, phrases: Sequence[str], views: bool = True) -> list[list[tuple[int, ...]]]:
        """Boxes (left, top, right, bottom in pixels) of each phrase in its image; `views`: see `say`."""
        with self._read_in(views):
            return [one.boxes for one in self.inner.detect_all(images, phrases, **self.short(images))]

    def say(self, images: Images, requests: Sequence[str], views: bool = True) -> list[str]:
        """An answer to each request about its image, which is read in one view without `views`."""
        with self._read_in(views):
            return list(self.inner.describe_all(images, requests, **self.short(images)))

    @contextmanager
    def _read_in(self, views: bool) -> Iterator[None]:
        pictures, own = self.inner.pictures, self.inner.pictures.views
        pictures.views = own if views else AnyResolution(own.image_size, ("1x1",), own.interpolation)
        try:
            yield
        finally:
            pictures.views = own


@dataclass(frozen=True)
class Tokens:
    """The codes of an image; of one that was encoded also the image, the selection's seed, and which patches `[g, g]`
    were kept."""

    codes: list[int]
    image: Image.Image | None = None
    seed: int = 0
    patches: Tensor | None = None

    def dimmed(self) -> Image.Image:
        """The image with all but its kept patches greyed."""
        assert self.image is not None and self.patches is not None
        mask = self.patches.float()[None, None]
        pixels = np.array(self.image, np.float32)
        kept = F.interpolate(mask, pixels.shape[:2], mode="nearest")[0, 0, :, :, None].numpy() > 0
        return Image.fromarray(np.where(kept, pixels, 128 + 0.25 * (pixels - 128)).astype(np.uint8))


class LavitSystem(System):
    """A LaVIT that reads and draws; image number n is encoded and written with `seed` + n."""

    def __init__(self, inner: Any, batch: int = 64, seed: int = 0) -> None:
        super().__init__(inner, batch, seed)
        inner.spec.require("understanding", "decoder", "pixels")
        inner.log = inner.pictures.log = None
        inner.lemmatizer = Lemmatizer("none")  # the same answers with and without a lemmatizer installed
        self.codebook_size = inner.tokenizer.vocabulary.n_codes
        self.patches = inner.tokenizer.vocabulary.tokens_per_image
        self.samples = inner.pictures.selection == "draw"

    def facts(self) -> dict[str, Any]:
        defaults, settings = self.inner.pictures.decoder.pixels.defaults, self.inner.language.settings
        drawn = settings("draw")
        return {"selection": self.inner.pictures.selection, "steps": defaults.num_inference_steps,
                "guidance": defaults.guidance_scale, "guidance of the language model": drawn.guidance,
                "temperature": drawn.temperature, "beams": settings("describe").num_beams,
                "dtype": str(self.inner.llm.dtype).removeprefix("torch.")}

    def encode(self, images: Images) -> list[Any]:
        seeds, pictures = self._seeds(images), self.inner.pictures
        rows = zip(pictures.tokenize(images, seed=seeds), images, seeds, pictures.kept(images, seed=seeds), strict=True)
        return [Tokens(codes.tolist(), *rest) for codes, *rest in rows]

    def decode(self, encoded: Sequence[Any], ratio: str = "1:1") -> list[Image.Image]:
        """See `System`; `ratio`: of the sides."""
        return list(self.inner.pictures.draw([one.codes for one in encoded], seed=self.seed, ratio=ratio,
                                             batch_size=self.batch)) if encoded else []

    def codes_of(self, encoded: Any) -> list[int]:
        return list(encoded.codes)

    def images(self, encoded: Sequence[Any]) -> Sequence[Any]:
        return [one.image for one in encoded]

    def short(self, encoded: Sequence[Any]) -> dict[str, Any]:
        return {"seed": [one.seed for one in encoded], "batch_size": self.batch}

    def draw(self, texts: Sequence[str]) -> list[Any]:
        return self.write([[text] for text in texts], "draw")

    def edit(self, encoded: Sequence[Any], instructions: Sequence[Any]) -> list[Any]:
        """See `System`; an instruction may be another image's `Tokens`."""
        return self.write([[one.codes, getattr(text, "codes", text)] for one, text in
                           zip(encoded, instructions, strict=True)], "compose")

    def write(self, contents: Sequence[Sequence[Any]], task: str) -> list[Any]:
        written, seeds = list[Any](), self._seeds(contents)
        for start in range(0, len(contents), self.batch):
            rows = slice(start, start + self.batch)
            written += self.inner.write(contents[rows], task, seed=seeds[rows])
        return [Tokens(one.codes.tolist()) if len(one.codes) else None for one in written]

    @torch.inference_mode()
    def losses(self, encoded: Sequence[Any]) -> tuple[FloatArray, FloatArray]:
        """1 − cosine between the vision encoder's features and those decoded from each image's codes, mean over
        patches, [N]; and the same with the mean image in place of every image."""
        half, seen, rebuilt = self.inner.pictures, list[Tensor](), list[Tensor]()
        for start in range(0, len(encoded), self.batch):
            rows = encoded[start:start + self.batch]
            with half.reading():
                pixels = half.writer.pixels([half.open(one.image) for one in rows])
                seen.append(half.writer.patch_features(pixels).float().cpu())
                codes = [half.writer.embed_codes(torch.tensor(one.codes, device=half.writer.device)) for one in rows]
            with half.drawing():
                rebuilt.append(half.decoder.decoder.features(codes).float().cpu())
        true = torch.cat(seen)
        near, blind = ((1 - F.cosine_similarity(true, other, dim=-1).mean(1)).numpy()
                       for other in (torch.cat(rebuilt), true.mean(0, keepdim=True).expand_as(true)))
        return near, blind

    def _seeds(self, items: Sequence[Any]) -> list[int]:
        return [self.seed + row for row in range(len(items))]


ADAPTERS: dict[str, type[System]] = {"seed_llama": SeedLlamaSystem, "seed_x": SeedXSystem, "lavit": LavitSystem}


def load_system(model: str | Path, *, batch: int = 64, seed: int = 0, **options: Any) -> System:
    """The system of a folder or name; `options` and errors as of `open_system`."""
    return ADAPTERS[kind_of(model)](open_system(model, **options), batch, seed)
