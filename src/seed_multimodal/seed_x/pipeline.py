"""SEED-X: a language model with image features of several views as input, and features at 64 placeholders as output.

images ─► views ─► QwenVit ─► features ─► agent (LLaMA and two resamplers) ─► texts, boxes and features ─► SDXL
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, Self

import torch
from PIL import Image
from torch import Tensor

from seed_multimodal.disk import read_json_object
from seed_multimodal.errors import CheckpointError, CodesError, ConfigError, RequestError
from seed_multimodal.images.sheet import draw_boxes
from seed_multimodal.images.transforms import normalise
from seed_multimodal.inference.batching import ResultCache
from seed_multimodal.inference.generator import Task
from seed_multimodal.inference.prompt import HiddenStates, Prompt, PromptImage
from seed_multimodal.language.answer import ImagePart
from seed_multimodal.language.llama import load_llm
from seed_multimodal.language.lora import load_base, merge_into, read_trained
from seed_multimodal.language.messages import (
    Answer,
    Message,
    flatten_images,
    image_conversations,
    is_codes,
    is_image,
)
from seed_multimodal.language.prompts import without_verdict
from seed_multimodal.language.tokenizer import MultimodalTokenizer
from seed_multimodal.language.vocabulary import PLACEHOLDER
from seed_multimodal.seed_x.diffusion import SdxlDetokenizer, SdxlSettings
from seed_multimodal.seed_x.modeling import AgentSettings, ContinuousLVLM, load_agent
from seed_multimodal.seed_x.processing import (
    Box,
    Content,
    GeneratedImage,
    InputImage,
    SeedXPrompts,
    answer_text,
    insert_images,
    read_boxes,
    seed_x_vocabulary,
    without_tags,
)
from seed_multimodal.seed_x.views import (
    UNIT,
    AnyResolution,
    Ratio,
    drawing_size,
    patch_positions,
    read_grids,
    with_ratio,
)
from seed_multimodal.seed_x.vision import (
    INPUT_RESAMPLER,
    OUTPUT_RESAMPLER,
    QwenVit,
    Resampler,
    ResamplerConfig,
)
from seed_multimodal.settings import check_value, read_settings
from seed_multimodal.system.base import MultimodalSystem
from seed_multimodal.system.config import SystemConfig
from seed_multimodal.system.images import ImageCodec, Log, Placement, seed_per_image

REMEMBERED = 16  # images in the cache of features: about 10 MB each in float16
AT_ONCE = 8  # views in one pass of the vision encoder


@dataclass(frozen=True)
class EncodedImage:
    """An encoded input image: features [V, N, K] of its views, their centres [V, 2], and the image."""

    features: Tensor
    positions: Tensor
    image: Image.Image


@dataclass(frozen=True)
class Detection:
    """Detected `boxes` (left, top, right, bottom) in pixels, clipped to the image, the same in 224ths (`grid`), the
    answer with its box tokens, and a message for each malformed box."""

    image: Image.Image
    boxes: list[tuple[int, int, int, int]]
    grid: list[Box]
    text: str
    problems: list[str]

    def drawn(self, **options: Any) -> Image.Image:
        """The image with the boxes on it; `options` of `draw_boxes`."""
        return draw_boxes(self.image, self.boxes, **options)


class SeedXImageCodec(ImageCodec):
    """Images ⇄ features; `grids`: tile grids of input images, `edit_grids`: of images to edit."""

    codec_settings = ("ratio", "conditions")
    drawing_settings = (*(entry.name for entry in fields(SdxlSettings)), "ratio")

    def __init__(
        self, model: QwenVit, grids: Sequence[str], edit_grids: Sequence[str], **options: Any
    ) -> None:
        size = model.config.image_size
        largest = max(max(grid) for grid in read_grids(grids))
        super().__init__(model, min_side=2 * size * largest, **options)
        self.views, self.edit_views = (
            AnyResolution(size, tuple(grids)),
            AnyResolution(size, tuple(edit_grids)),
        )
        self._known = ResultCache(REMEMBERED)

    def read(self, images: Sequence[Any], editing: bool = False) -> list[EncodedImage]:
        """Each image in its views; `ImageError` names one that cannot be read."""
        views = self.edit_views if editing else self.views
        opened = [self.open(image) for image in images]
        features = self._encoded(None, [views.cut(image) for image in opened])
        return [
            EncodedImage(one, patch_positions(views.grid(image.size)), image)
            for one, image in zip(features, opened, strict=True)
        ]

    @torch.inference_mode()
    def encode_batch(self, key: Any, rows: Sequence[Tensor]) -> list[Tensor]:
        """Views [V, 3, S, S] of each image → features [V, N, K] on the CPU."""

        def encode(new: list[Tensor]) -> list[Tensor]:
            like, pixels = next(self.model.parameters()), normalise(torch.cat(new))
            with self.encoding():
                features = torch.cat(
                    [self.model(part.to(self.device, like.dtype)) for part in pixels.split(AT_ONCE)]
                )
            return [part.cpu() for part in features.split([len(one) for one in new])]

        return self._known.of(rows, encode)

    def encode(self, images: Sequence[Any], embeddings: int | None = None) -> Tensor:
        """Features [B, N, K] of whole images, each squashed to a square; `embeddings`: so many means of neighbours
        (`ConfigError` if they do not divide N)."""
        whole = AnyResolution(self.views.image_size, ("1x1",))
        features = torch.cat(
            self._encoded(None, [whole.cut(self.open(image))[-1:] for image in images])
        )
        if features.shape[1] % (embeddings or 1):
            raise ConfigError(
                f"embeddings must divide the vision encoder's {features.shape[1]}, not {embeddings}."
            )
        return (
            features if embeddings is None else features.unflatten(1, (embeddings, -1)).mean(dim=2)
        )

    def check_drawing(self, **settings: Any) -> None:
        check_value(Ratio, settings.get("ratio", "restore"), "ratio")
        super().check_drawing(**settings)
        if self.decoder.null_embeds is None:  # unconditional embeddings for guidance
            with self.encoding():
                self.decoder.set_null_embeds(self.model, self.views.image_size)

    def draw(
        self,
        values: Sequence[Tensor],
        *,
        seeds: Sequence[int],
        batch_size: int = 8,
        conditions: Sequence[Image.Image | None] | None = None,
        ratio: Ratio = "restore",
        **settings: Any,
    ) -> list[Image.Image]:
        """Features [N, W] of each image → images.

        Args:
            conditions: of a second stage, an image (or None) for each drawn one.
            ratio: "restore" stretches a drawn square to its condition's aspect ratio, "keep" draws in it, "square"
                leaves it a square. settings: of `SdxlDetokenizer`; a given size is kept.
        """
        self.check_drawing(ratio=ratio, **settings)
        conditions = [None] * len(values) if conditions is None else conditions
        side, ratio = (
            self.decoder.image_size(self.decoder.defaults)[0],
            "square" if "height" in settings else ratio,
        )
        unit = UNIT if side % UNIT == 0 else max(8, self.decoder.factor)
        sizes = [
            drawing_size(one.size, side, unit) if one is not None and ratio == "keep" else None
            for one in conditions
        ]
        drawn: dict[int, Image.Image] = {}
        for size in dict.fromkeys(sizes):  # images of one size together
            rows = [row for row, one in enumerate(sizes) if one == size]
            chosen = settings if size is None else {**settings, "width": size[0], "height": size[1]}
            images = self.draw_batched(
                chosen,
                batch_size,
                *([column[row] for row in rows] for column in (values, conditions, seeds)),
            )
            drawn |= zip(rows, images, strict=True)
        return [
            drawn[row] if one is None or ratio == "square" else with_ratio(drawn[row], one.size)
            for row, one in enumerate(conditions)
        ]

    @torch.inference_mode()
    def draw_batch(self, key: Any, rows: Sequence[Any]) -> list[Image.Image]:
        values, conditions, seeds = zip(*rows, strict=True)
        images: list[Image.Image] = self.decoder(
            torch.stack(values), seeds=seeds, condition_images=conditions, **key
        )
        return images


class SeedX(MultimodalSystem):
    """SEED-X; settings of drawing: `num_inference_steps`, `guidance_scale`, `image_guidance_scale`, `height`, `width`,
    `ratio` ("restore", "keep", "square": of edits), `preset` ("fast" or "original")."""

    images: SeedXImageCodec

    def __init__(
        self,
        config: SystemConfig,
        tokenizer: MultimodalTokenizer,
        agent: ContinuousLVLM,
        images: SeedXImageCodec,
        log: Log = None,
        **options: Any,
    ) -> None:
        self.agent, self.prompts = agent, SeedXPrompts(tokenizer)
        self.template = self.prompts.template
        super().__init__(config, tokenizer, agent.llm, images, log, **options)

    @classmethod
    def check_decoder(cls, config: SystemConfig) -> None:
        if config.sdxl is not None and config.sdxl.is_dir():
            SdxlDetokenizer.check_parts(config.sdxl, *SdxlDetokenizer.folders)

    @classmethod
    def load(cls, config: SystemConfig, placement: Placement, log: Log = None) -> Self:
        config.require("llm", "agent", "tokenizer", "vision")
        words = MultimodalTokenizer.from_pretrained(config.tokenizer)  # type: ignore[arg-type]
        images = load_images(config, placement)  # before the language model, which takes longest
        agent = load_agent_model(config, words, placement)
        read, made = agent.input_resampler.config, images.model.config.output_dim
        if made != (read.kv_dim or read.embed_dim):
            raise CheckpointError(
                f"{config.vision}: its features have width {made}, but {config.agent} reads width "
                f"{read.kv_dim or read.embed_dim}; they do not belong together."
            )
        return cls(config, words, agent, images, log, engine=placement.engine)

    # ---- defined by families

    def stop_sequences(self, task: str) -> tuple[str, ...]:
        return self.template.stop_sequences if self.config.tuned else ()

    def display_text(self, answer: Answer, task: Task) -> str:
        return without_tags(answer.text).strip()

    def build_prompts(
        self,
        conversations: Sequence[Sequence[Message]],
        task: Task,
        opening: str = "",
        seeds: Sequence[int | None] | None = None,
    ) -> list[Prompt]:
        if not self.config.tuned and task == "edit":
            raise ConfigError(
                f"{self.config.name} continues texts and was not tuned to follow instructions; "
                f"SEED-X-Edit edits."
            )
        images = [
            image
            for conversation in conversations
            for message in conversation
            for image in message.images
        ]
        seen = iter(self.images.read(images, editing=task == "edit"))
        end = self.tokenizer.encode_parts([opening]) if opening else []
        return [self._request(conversation, task, seen, end) for conversation in conversations]

    def _request(
        self,
        conversation: Sequence[Message],
        task: Task,
        images: Iterator[EncodedImage],
        end: list[int],
    ) -> Prompt:
        turns: list[tuple[str, list[Content]]] = []
        seen: list[EncodedImage] = []
        sources: list[Image.Image] = []
        system = "\n".join(message.text for message in conversation if message.role == "system")
        for message in conversation:
            own = [next(images) for _ in message.images]
            seen += own
            sources += [one.image for one in own]
            sources += [
                part.image for part in message.content if isinstance(part, ImagePart) and part.image
            ]
            if message.role != "system":
                turns.append(
                    (message.role, self._spans(message, [len(one.features) for one in own]))
                )
        alone = [part for _, content in turns for part in content]
        dialogue = self.config.tuned and conversation[0].role != "raw"
        ids = (
            self.prompts.dialogue(turns, system)
            if dialogue
            else self.prompts.completion(alone, task)
        )
        positions = iter(self.prompts.feature_positions(ids, turns))
        prompt_images: list[PromptImage] = []
        for image in seen:
            n_embeddings = (
                len(image.features) * self.tokenizer.vocabulary.tokens_per_image
            )  # of all its views
            prompt_images.append(
                PromptImage(image, list(itertools.islice(positions, n_embeddings)))
            )
        source = sources[-1] if sources else None
        return Prompt([*ids, *end], prompt_images, answered=end, source=source)

    def embed_features(self, features: Sequence[EncodedImage]) -> Tensor:
        return self.agent.read_images(
            [image.features for image in features], [image.positions for image in features]
        )

    def _spans(self, message: Message, views: list[int]) -> list[Content]:
        """A message's texts and images as parts of a prompt; `<image>` in a user's text stands for an image."""
        texts = [item for item in message.content if isinstance(item, str)]
        if message.role != "assistant" and any(PLACEHOLDER in text for text in texts):
            return insert_images("".join(texts), views)
        rest = iter(views)
        spans: list[Content] = []
        whole = list(range(self.tokenizer.vocabulary.tokens_per_image))
        for item in message.content:
            if is_codes(item) and [int(code) for code in item] != whole:
                raise RequestError("Images of SEED-X have no codes; give the image itself.")
            spans.append(
                item
                if isinstance(item, str)
                else InputImage(next(rest))
                if is_image(item)
                else GeneratedImage()
            )
        return spans

    def image_inputs(
        self, parts: Sequence[ImagePart], states: HiddenStates, row: int
    ) -> Sequence[Tensor]:
        places = [range(part.position, part.position + len(part.codes)) for part in parts]
        with torch.inference_mode():
            return list(
                self.agent.output_features(
                    torch.stack([states.at(row, one) for one in places])
                ).cpu()
            )

    def decode_images(
        self,
        values: Sequence[Any],
        requests: Sequence[Prompt],
        seeds: Sequence[int],
        batch_size: int,
        drawing: dict[str, Any],
    ) -> list[Image.Image]:
        edits = self.images.decoder.reads_condition
        sources = [request.source if edits else None for request in requests]
        return self.images.draw(
            values, seeds=seeds, batch_size=batch_size, conditions=sources, **drawing
        )

    # ---- further tasks

    def detect(
        self, images: Any, phrase: str | Sequence[str], *, batch_size: int = 16, **options: Any
    ) -> Any:
        """Where `phrase` is in an image: a `Detection`; a list of them for a list of images. A model that follows
        instructions is asked for it; the base model completes it, so its last words name the thing."""
        conversations, single = image_conversations(
            images, phrase, self.tasks.detect_request if self.config.tuned else str
        )
        written = self.generate_answers(
            conversations, "detect", self.settings("detect", **options), batch_size=batch_size
        )
        detections = [
            self.detection(one.prompt.source, one.answer.ids, not self.config.tuned)
            for one in written
        ]
        return detections[0] if single else detections

    def detection(self, image: Any, ids: Sequence[int], opened: bool) -> Detection:
        """The boxes of an answer; `opened`: the prompt ended inside a box."""
        text = (
            without_verdict(answer_text(ids, self.tokenizer), self.tasks.answer_after)
            .removesuffix("</s>")
            .strip()
        )
        places = self.prompts.vocabulary
        boxes, problems = read_boxes(text, opened, places.n_locations)
        for problem in problems:
            self._log_note(problem)
        return Detection(
            image,
            [box.corners(image.size, places.n_locations) for box in boxes],
            boxes,
            text,
            problems,
        )

    def reconstruct(
        self,
        images: Any,
        seed: Any = 0,
        *,
        condition: Any = None,
        embeddings: int | None = None,
        batch_size: int = 8,
        **drawing: Any,
    ) -> list[Image.Image]:
        """Images drawn again from all features of each, or so many means of neighbours (`embeddings`; 64: as the
        language model writes them); `condition`: of a second stage, the image, or one for each, to take over from."""
        opened = [self.images.open(image) for image in flatten_images(images)]
        features = self.images.encode(opened, embeddings)
        shown = None
        if condition is not None:
            shown = [self.images.open(one) for one in flatten_images(condition)]
            shown *= len(opened) if len(shown) == 1 else 1
            if len(shown) != len(opened):
                raise CodesError(f"{len(opened)} images were given with {len(shown)} conditions.")
        return self.images.draw(
            list(features),
            seeds=seed_per_image(seed, len(opened)),
            conditions=shown,
            batch_size=batch_size,
            **drawing,
        )

    def tokenize(self, images: Any) -> Any:
        raise ConfigError(
            f"{self.config.name} reads images as features, so they have no codes; `images.encode` gives "
            f"the features."
        )


@dataclass(frozen=True)
class AgentConfig:
    """`agent/config.json`: sizes of both resamplers, and `AgentSettings`; the defaults are the original ones."""

    input_resampler: ResamplerConfig = INPUT_RESAMPLER
    output_resampler: ResamplerConfig = OUTPUT_RESAMPLER
    settings: AgentSettings = AgentSettings()


def read_agent_sizes(config: SystemConfig) -> tuple[AgentConfig, Mapping[str, Any] | None]:
    """Sizes of a system's agent (with its weights in `config.json`, of a tuning in `agent.json`, or the original ones),
    and the fields of the LoRA whose weights its file holds."""
    place: Any = config.agent
    folder = place if place.is_dir() else place.parent
    sizes, tuning = folder / "config.json", folder / "agent.json"
    tuned = read_json_object(tuning, ConfigError) if tuning.is_file() else {}
    lora = tuned.get("lora") if config.lora is None else config.lora
    if "agent" in config.sizes:
        return config.sizes["agent"], lora
    if sizes.is_file():
        return read_settings(AgentConfig, read_json_object(sizes, ConfigError), str(sizes)), lora
    values: dict[str, Any] = {
        key: tuned[key] for key in ("input_resampler", "output_resampler") if key in tuned
    }
    return read_settings(
        AgentConfig, {**values, "settings": tuned.get("losses", {})}, str(tuning)
    ), lora


def load_agent_model(
    config: SystemConfig, words: MultimodalTokenizer, placement: Placement
) -> ContinuousLVLM:
    """The language model with its two resamplers, in eval mode and frozen. Raises `CheckpointError`, `ConfigError`."""
    parts: Any = config
    runtime, vocabulary = placement.llm, seed_x_vocabulary(words)
    sizes, lora = read_agent_sizes(config)
    if lora is not None and placement.quantization is not None:
        raise ConfigError(
            f"{config.agent}: its LoRA cannot be merged into {placement.quantization} weights: leave the "
            f"quantisation out, or use the folder that src/tools/merge_lora_weights.py writes."
        )
    if lora is None:
        llm = load_llm(
            parts.llm,
            device=placement.llm_load_device,
            dtype=runtime.dtype,
            quantization=placement.quantization,
            vocabulary=vocabulary,
        )
    else:
        trained = read_trained(parts.agent, lora)
        llm = load_base(
            parts.llm, trained, words, device=placement.llm_load_device, dtype=runtime.dtype
        )
        merge_into(llm, trained)
    agent = ContinuousLVLM(
        llm, Resampler(sizes.input_resampler), Resampler(sizes.output_resampler), sizes.settings
    )
    load_agent(agent, parts.agent, language=lora is None)
    for part in (agent.input_resampler, agent.output_resampler):
        part.to(runtime.device, runtime.dtype)
    if sizes.settings.add_patch_pos:
        agent.patch_pos_embed.data = agent.patch_pos_embed.data.to(runtime.device, runtime.dtype)
    return agent.requires_grad_(False).eval()


def load_images(config: SystemConfig, placement: Placement) -> SeedXImageCodec:
    """Vision encoder and de-tokenizer of a system. Raises `CheckpointError`."""
    parts: Any = config.require("vision")
    home = "cpu" if "encoder" in placement.offload else placement.images.device
    model = QwenVit.from_pretrained(
        parts.vision, config=config.sizes.get("vision"), device=home, dtype=placement.images.dtype
    )
    load = None
    if placement.load_decoder and config.detokenizer is not None:
        load = partial(_load_decoder, config, placement.drawing.dtype)
    images = SeedXImageCodec(
        model,
        config.grids,
        config.edit_grids,
        load_decoder=load,
        device=placement.images.device,
        drawing_device=placement.drawing.device,
        offload=placement.offload,
    )
    return images


def _load_decoder(config: SystemConfig, dtype: torch.dtype) -> SdxlDetokenizer:
    parts: Any = config.require("sdxl", "detokenizer")
    return SdxlDetokenizer.from_pretrained(
        parts.sdxl, parts.detokenizer, dtype=dtype, sizes=config.sizes.get("detokenizer")
    )
