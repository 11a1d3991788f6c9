"""GLM-Image: it draws texts in any size, and edits one or several images; it writes no text.

text, codes of source images ─► language model ─► codes ─► de-tokenizer ─► image
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from PIL import Image
from torch import Tensor

from seed_glm_image.diffusion import DrawingInput, GlmImageDetokenizer, GlmImageSettings
from seed_glm_image.modeling import CodeNetwork
from seed_glm_image.processing import (
    CONTEXT,
    DrawingRequest,
    GlmImageTokenizer,
    Source,
    build_prompt,
    read_grids,
    source_grid,
)
from seed_glm_image.spec import PIXELS, READ_PIXELS, GlmImageConfig
from seed_multimodal.disk import read_json_object
from seed_multimodal.errors import CheckpointError, ConfigError, RequestError
from seed_multimodal.images.io import ImageSource, is_image
from seed_multimodal.images.transforms import (
    ImageTransform,
    Normalisation,
    read_keys,
    to_bytes,
)
from seed_multimodal.inference.base_engine import GeneratedSequence
from seed_multimodal.inference.prompt import Prompt
from seed_multimodal.language.answer import ImagePart
from seed_multimodal.language.llm import check_vocab_size
from seed_multimodal.language.messages import Message
from seed_multimodal.pipelines.family import Family, load_language_model
from seed_multimodal.pipelines.images import (
    CodeCodec,
    Encoded,
    ImageCodec,
    ImageInput,
    Options,
    Placement,
    Seed,
)
from seed_multimodal.pipelines.tasks import Notes, TaskKind
from seed_multimodal.settings import positive, setting

PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")
# Temperature and top_p of the published examples, top_k of transformers; greedy answers are flat.
SAMPLING: Options = {
    "do_sample": True,
    "temperature": 0.9,
    "top_p": 0.75,
    "top_k": 50,
    "max_new_tokens": CONTEXT,
}


@dataclass(frozen=True)
class SourceSize:
    """Pixels of input images, the squares of the sides between which they are scaled."""

    shortest_edge: int = positive()
    longest_edge: int = positive(maximum=CONTEXT * PIXELS**2)


@dataclass(frozen=True, kw_only=True)
class SourceKeys(Normalisation):
    """Keys of a processor's file."""

    size: SourceSize
    patch_size: int = setting(READ_PIXELS, choices=(READ_PIXELS,))
    merge_size: int = setting(1, choices=(1,))
    temporal_patch_size: int = setting(1, choices=(1,))
    resample: int = setting(3, choices=(3,))  # bicubic


class GlmImageCodec(CodeCodec):
    """Images ⇄ codes `[h, w]`, one of 32 x 32 pixels.

    side: pixels of a square drawing, if no size is given, and of images of data sets.
    keys: of the processor's file.
    """

    model: CodeNetwork
    drawing_settings = tuple(entry.name for entry in fields(GlmImageSettings))
    preprocess = ImageCodec.preprocess  # sizes differ

    def __init__(
        self,
        model: CodeNetwork,
        placement: Placement,
        side: int,
        keys: SourceKeys,
    ) -> None:
        super().__init__(
            model,
            placement,
            transform=ImageTransform(
                side // 2, interpolation="bicubic", mean=keys.image_mean, std=keys.image_std
            ),
            codebook_size=model.n_codes,
            codes_per_image=CONTEXT,
            min_codes=1,
        )
        self.side = side
        self.shortest = round(keys.size.shortest_edge**0.5)
        self.longest = round(keys.size.longest_edge**0.5)
        self.min_side = self.longest  # of any image: sizes differ

    def encode(self, images: Sequence[ImageSource], *, seed: Seed = 0) -> list[Tensor]:
        """Codes `[h, w]` int64 of each image, on the CPU."""
        return [image.value.codes for image in self.read(images)]

    def read(self, images: Sequence[ImageSource], *, seed: Seed = 0) -> list[Encoded]:
        """Each image as a `Source`: resized once, for its codes and for the de-tokenizer.

        Pillow resizes, as in transformers' slow processor.
        """
        resized: list[Image.Image] = []
        rows: list[Tensor] = []
        for image in map(self.open, images):
            height, width = source_grid(image.size, self.shortest, self.longest)
            image = image.resize((PIXELS * width, PIXELS * height), Image.Resampling.LANCZOS)
            read_size = (READ_PIXELS * width, READ_PIXELS * height)
            small = image.resize(read_size, Image.Resampling.BICUBIC)
            resized.append(image)
            rows.append(self.transform.normalise(to_bytes(small)))
        codes = self._encode_batcher(None, rows)
        return [Encoded(Source(*pair)) for pair in zip(resized, codes, strict=True)]

    @torch.inference_mode()
    def encode_batch(self, key: object, rows: Sequence[Tensor]) -> list[Tensor]:
        """Normalised pixels `[3, 16 h, 16 w]` of each image → its codes."""
        with self.encoding():
            return [codes.cpu() for codes in self.model.codes(rows)]

    def image_size(
        self, settings: Options | None, sources: Sequence[Source] = ()
    ) -> tuple[int, int]:
        """Height and width of a drawing with these settings, or with the de-tokenizer's; those of
        the first source image where they do not say, or `side`."""
        sizes = (self.side, self.side)
        if sources:
            sizes = tuple(PIXELS * side for side in sources[0].codes.shape)
        defaults = self.decoder.defaults
        given = {
            name: (settings or {}).get(name) or getattr(defaults, name) or side
            for name, side in zip(("height", "width"), sizes, strict=True)
        }
        return self.decoder.image_size(self.decoder.check_settings(**given))

    def draw(
        self,
        image_codes: Sequence[Any],
        *,
        seeds: Sequence[int],
        requests: Sequence[DrawingRequest] = (),
        **settings: Any,
    ) -> list[Image.Image]:
        """Codes `[h, w]` → images of 32 pixels a code; requests: of each, none: the codes alone."""
        self.check_drawing(**settings)
        grids = [
            read_grids(codes, self.codebook_size, f"Image {index}")[-1]
            for index, codes in enumerate(image_codes)
        ]
        for grid in grids:
            for name, side in zip(("height", "width"), grid.shape, strict=True):
                if int(settings.get(name) or PIXELS * side) != PIXELS * side:
                    raise ConfigError(
                        f"The option {name!r} is {settings[name]}, but the codes are of "
                        f"{PIXELS * side} pixels."
                    )
        inputs = map(DrawingInput, grids, requests or [DrawingRequest()] * len(grids))
        return self.draw_batched(settings, list(inputs), seeds)

    @torch.inference_mode()
    def draw_batch(
        self, key: Mapping[str, Any], rows: Sequence[tuple[DrawingInput, int]]
    ) -> list[Image.Image]:
        """Input and seed of each image → images; those of a `group` are one batch."""
        # 1. Which images are one batch.
        groups: dict[object, list[int]] = {}
        for index, (row, _) in enumerate(rows):
            groups.setdefault(self.decoder.group(row), []).append(index)

        # 2. The images, in the order of the rows.
        drawn: dict[int, Image.Image] = {}
        for indices in groups.values():
            inputs = [rows[index][0] for index in indices]
            height, width = (PIXELS * side for side in inputs[0].codes.shape)
            settings = {**key, "height": height, "width": width}
            images = self.decoder(inputs, seeds=[rows[index][1] for index in indices], **settings)
            drawn.update(zip(indices, images, strict=True))
        return [drawn[index] for index in range(len(rows))]


class SeedGlmImageFamily(Family):
    """Single requests for an image; `height` and `width` are part of the prompt."""

    tokenizer: GlmImageTokenizer
    images: GlmImageCodec
    defaults = {"draw": SAMPLING, "edit": SAMPLING}
    context = CONTEXT

    @classmethod
    def check_decoder(cls, config: GlmImageConfig) -> None:
        GlmImageDetokenizer.check_folder(config.decoder)

    @classmethod
    def load(cls, config: GlmImageConfig, placement: Placement) -> Self:
        tokenizer = GlmImageTokenizer.from_pretrained(config.path("tokenizer"))
        images = load_images(config, placement)
        if images.codebook_size != tokenizer.vocabulary.n_codes:
            raise CheckpointError(
                f"{config.tokenizer}: has {tokenizer.vocabulary.n_codes} codes, but the image "
                f"tokenizer has {images.codebook_size}."
            )
        llm = load_language_model(config, tokenizer, placement)
        if llm is not None:
            check_vocab_size(llm.config.vocab_size, tokenizer.vocabulary, config.name)
        return cls(config, tokenizer, llm, images)

    def settings(self, task: str) -> Options:
        stop = (self.tokenizer.vocabulary.eoi_id,)
        return {**super().settings(task), "stop_token_ids": stop}

    # ---- prompts

    def encode(
        self, images: Sequence[ImageSource], task: TaskKind, seeds: Sequence[int | None]
    ) -> list[Encoded]:
        return self.images.read(images)

    def prompt(
        self, conversation: Sequence[Message], task: TaskKind, encoded: Iterator[Source]
    ) -> Prompt:
        """The request alone; `prompts` completes it."""
        texts: list[str] = []
        sources: list[Source] = []
        for item in conversation[-1].content:
            if isinstance(item, str):
                texts.append(item.strip())
            elif is_image(item):
                sources.append(next(encoded))
            else:
                raise RequestError("GLM-Image edits pictures; codes alone are not enough.")
        return Prompt(source=DrawingRequest(" ".join(filter(None, texts)), sources))

    def prompts(
        self,
        conversations: Sequence[Sequence[Message]],
        task: TaskKind,
        seeds: Sequence[int | None] | None = None,
        notes: Sequence[Notes] = (),
        drawing: Options | None = None,
    ) -> list[Prompt]:
        prompts: list[Prompt] = []
        for prompt in super().prompts(conversations, task, seeds, notes):
            height, width = self.images.image_size(drawing, prompt.source.sources)
            grid = (height // PIXELS, width // PIXELS)
            request = replace(prompt.source, grid=grid)
            codes = [source.codes for source in request.sources]
            complete = build_prompt(self.tokenizer, request.text, grid, codes)
            prompts.append(replace(complete, source=request))
        return prompts

    # ---- images

    def image_inputs(
        self, parts: Sequence[ImagePart], request: GeneratedSequence
    ) -> Sequence[ImageInput]:
        """The codes of the image itself, behind those of its preview."""
        height, width = request.prompt.source.grid
        rows = [torch.tensor(part.codes[-height * width :], device="cpu") for part in parts]
        return [row.view(height, width) for row in rows]

    def draw(
        self,
        inputs: Sequence[ImageInput],
        prompts: Sequence[Prompt],
        seeds: Sequence[int],
        settings: Options,
    ) -> list[Image.Image]:
        requests = [prompt.source for prompt in prompts]
        return self.images.draw(inputs, seeds=seeds, requests=requests, **settings)


# ---- loading


def load_images(config: GlmImageConfig, placement: Placement) -> GlmImageCodec:
    """The image tokenizer now, the de-tokenizer when it is first needed."""
    network = CodeNetwork.from_pretrained(
        config.path("encoder"), placement.load_device("encoder"), placement.images.dtype
    )
    codec = GlmImageCodec(network, placement, config.side, read_processor(config.path("tokenizer")))
    if placement.load_decoder:
        codec.load_decoder = partial(_load_decoder, config, placement)
    return codec


def _load_decoder(config: GlmImageConfig, placement: Placement) -> GlmImageDetokenizer:
    return GlmImageDetokenizer.from_pretrained(
        config.path("decoder"), device=placement.drawing.device, dtype=placement.drawing.dtype
    )


def read_processor(folder: Path) -> SourceKeys:
    """The keys of a processor's folder. Raises CheckpointError: no file; ConfigError: a value that
    is not followed."""
    for file in (folder / name for name in PROCESSOR_FILES):
        values = read_json_object(file, CheckpointError) if file.is_file() else {}
        values = values.get("image_processor", values)
        # Earlier releases of transformers wrote both files, the sizes into the second one.
        if isinstance(values, dict) and "size" not in values:
            continue
        keys = read_keys(SourceKeys, values, str(file))
        if keys.size.shortest_edge > keys.size.longest_edge:
            raise ConfigError(f"{file}: size: shortest_edge is larger than longest_edge.")
        return keys
    raise CheckpointError(f"{folder}: no {' or '.join(PROCESSOR_FILES)} with the size of images.")
