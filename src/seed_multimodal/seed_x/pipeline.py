"""SEED-X: its language model reads images as features of their views, and writes them as features at 64 fixed words.

    images ─► views ─► QwenVit ─► features ─► agent (LLaMA and two resamplers) ─► texts, boxes and features ─► SDXL
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, Self

import torch
from PIL import Image
from torch import Tensor

from seed_multimodal.device import Runtime
from seed_multimodal.disk import read_json_object
from seed_multimodal.errors import CheckpointError, ConfigError, RequestError
from seed_multimodal.images.sheet import draw_boxes
from seed_multimodal.images.transforms import normalise
from seed_multimodal.language.answer import ImagePart
from seed_multimodal.language.generation import HiddenStates, Prompt
from seed_multimodal.language.generator import Task
from seed_multimodal.language.llama import load_llm
from seed_multimodal.language.lora import merge_into
from seed_multimodal.language.messages import (
    Answer,
    DrawnPart,
    Message,
    grouped,
    is_codes,
    is_image,
    texts_for,
    user_message,
)
from seed_multimodal.language.tasks import answer_in
from seed_multimodal.language.tokenizer import MultimodalTokenizer
from seed_multimodal.language.vocabulary import PLACEHOLDER
from seed_multimodal.seed_x.diffusion import SdxlDetokenizer, SdxlSettings
from seed_multimodal.seed_x.modeling import AgentSettings, ContinuousLVLM, load_agent
from seed_multimodal.seed_x.processing import (
    Box,
    Content,
    ReadImage,
    SeedXPrompts,
    WrittenImage,
    answer_text,
    place_images,
    read_boxes,
    seed_x_words,
    without_words,
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
from seed_multimodal.seed_x.vision import INPUT_RESAMPLER, OUTPUT_RESAMPLER, QwenVit, Resampler, ResamplerConfig
from seed_multimodal.settings import check_value, read_settings
from seed_multimodal.system.base import MultimodalSystem
from seed_multimodal.system.config import SystemConfig
from seed_multimodal.system.images import ImageCodec, Log, Remembered, Runtimes, load_domain, one_seed_each

REMEMBERED = 16  # images whose features are kept: about 10 MB each in float16
AT_ONCE = 8  # views in one pass of the vision encoder


@dataclass(frozen=True)
class Seen:
    """An image as the language model reads it: features [V, N, K] of its views, their centres [V, 2], itself."""

    features: Tensor
    positions: Tensor
    image: Image.Image


@dataclass(frozen=True)
class Detection:
    """What was found in an image; iterating yields its boxes.

    Attributes:
        boxes: (left, top, right, bottom) in whole pixels of `image`, cut off at its edges. grid: the same in 224ths.
        text: of the answer, words of boxes included. problems: a sentence about each malformed box.
    """

    image: Image.Image
    boxes: list[tuple[int, int, int, int]]
    grid: list[Box]
    text: str
    problems: list[str]

    def __iter__(self) -> Iterator[tuple[int, int, int, int]]:
        return iter(self.boxes)

    def __len__(self) -> int:
        return len(self.boxes)

    def drawn(self, **options: Any) -> Image.Image:
        """The image with the boxes on it; `options` of `draw_boxes`."""
        return draw_boxes(self.image, self.boxes, **options)


class FeatureImages(ImageCodec):
    """Images ⇄ features.

    Args:
        grids: into which images are cut that are read, `edit_grids` those that are edited.
    """

    own_settings = ("ratio", "conditions", "callback")
    drawing_settings = (*(entry.name for entry in fields(SdxlSettings)), "ratio", "callback")

    def __init__(self, model: QwenVit, grids: Sequence[str], edit_grids: Sequence[str], **options: Any) -> None:
        size = model.config.image_size
        largest = max(max(grid) for grid in read_grids(grids))
        super().__init__(model, at_least=2 * size * largest, **options)
        self.views, self.edit_views = AnyResolution(size, tuple(grids)), AnyResolution(size, tuple(edit_grids))
        self._known = Remembered(REMEMBERED)

    def read(self, images: Sequence[Any], editing: bool = False) -> list[Seen]:
        """Each image in its views; `ImageError` names one that cannot be read."""
        views = self.edit_views if editing else self.views
        opened = [self.open(image) for image in images]

        def encode(new: list[Tensor]) -> list[Tensor]:
            features = self.features(normalise(torch.cat(new)))
            return [part.cpu() for part in features.split([len(one) for one in new])]

        with self.encoding():
            features = self._known.of([views.cut(image) for image in opened], encode)
        return [Seen(one, patch_positions(views.grid(image.size)), image)
                for one, image in zip(features, opened, strict=True)]

    @torch.inference_mode()
    def features(self, pixels: Tensor) -> Tensor:
        """Normalised pixels [B, 3, S, S] → features [B, N, K]."""
        with self.encoding():
            like = next(self.model.parameters())
            return torch.cat([self.model(part.to(like)) for part in pixels.split(AT_ONCE)])

    def encode(self, images: Sequence[Any]) -> Tensor:
        """Features [B, N, K] of whole images in one view each, squashed to a square (as they are drawn again from)."""
        alone = AnyResolution(self.views.image_size, ("1x1",), self.views.interpolation)
        return self.features(normalise(torch.stack([alone.cut(self.open(image))[-1] for image in images])))

    @property
    def reads_condition(self) -> bool:
        """Whether the de-tokenizer is of the second stage, which draws beside a condition image."""
        return bool(self.decoder.adapter.reads_condition)

    def check_drawing(self, **settings: Any) -> None:
        check_value(Ratio, settings.get("ratio", "restore"), "ratio")
        super().check_drawing(**settings)
        if self.decoder.null_embeds is None:  # what guidance steers away from
            with self.encoding():
                self.decoder.set_null_embeds(self.model, self.views.image_size)

    @torch.inference_mode()
    def draw(self, values: Sequence[Tensor], *, seeds: Sequence[int], batch_size: int = 8,
             conditions: Sequence[Image.Image | None] | None = None, ratio: Ratio = "restore",
             **settings: Any) -> list[Image.Image]:
        """Features [N, W] of each image → images.

        Args:
            conditions: for a second stage, an image (or None) for each drawn one, whose aspect ratio it gets.
            ratio: how, see `images.aspect`; "square" leaves it square. settings: of `SdxlDetokenizer`.
        """
        self.check_drawing(ratio=ratio, **settings)
        conditions = [None] * len(values) if conditions is None else conditions
        if any(conditions) and not self.reads_condition:
            raise ConfigError("This system's de-tokenizer is of the first stage and reads no condition image; the "
                              "second stage (seed_detokenizer/second_stage) does.")
        sized = "height" in settings
        sizes = [None if one is None or sized else self._size(one, ratio) for one in conditions]
        drawn: dict[int, Image.Image] = {}
        for size in dict.fromkeys(sizes):  # images of one size together
            rows = [row for row, one in enumerate(sizes) if one == size]
            chosen = settings if size is None else {**settings, "width": size[0], "height": size[1]}
            with self.drawing() as decoder:
                given = {"condition_images": [conditions[row] for row in rows]} if self.reads_condition else {}
                images = decoder(torch.stack([values[row] for row in rows]), seeds=[seeds[row] for row in rows],
                                 batch_size=batch_size, **given, **chosen)
            drawn |= zip(rows, images, strict=True)
        return [drawn[row] if one is None or ratio == "square" or sized else with_ratio(drawn[row], one.size)
                for row, one in enumerate(conditions)]

    def _size(self, condition: Image.Image, ratio: Ratio) -> tuple[int, int]:
        """(width, height) to draw beside a condition image."""
        side = self.decoder.size(self.decoder.defaults)[0]
        return drawing_size(condition.size, side, ratio, UNIT if side % UNIT == 0 else max(8, self.decoder.factor))


class SeedX(MultimodalSystem):
    """SEED-X; settings of drawing: `num_inference_steps`, `guidance_scale`, `image_guidance_scale`, `height`, `width`,
    `ratio` ("restore", "keep", "square": of edits), `scheduler`, `callback`."""

    images: FeatureImages

    def __init__(self, config: SystemConfig, tokenizer: MultimodalTokenizer, agent: ContinuousLVLM,
                 images: FeatureImages, log: Log = None, **options: Any) -> None:
        super().__init__(config, tokenizer, agent.llm, images, log, **options)
        self.agent, self.prompts = agent, SeedXPrompts(tokenizer, config.tuned)
        self.template = self.prompts.template

    @classmethod
    def load(cls, config: SystemConfig, runtimes: Runtimes, log: Log = None) -> Self:
        config.require("llm", "agent", "tokenizer", "vision")
        words = MultimodalTokenizer.from_pretrained(config.tokenizer)  # type: ignore[arg-type]
        agent = load_agent_model(config, words, runtimes)
        width = agent.output_resampler.config.embed_dim
        images = load_images(config, runtimes, width)
        reads = agent.input_resampler.config.kv_dim or agent.input_resampler.config.embed_dim
        if images.model.config.output_dim != reads:
            raise CheckpointError(f"{config.vision}: the vision encoder's features have width "
                                  f"{images.model.config.output_dim}, but the agent {config.agent} reads width {reads}"
                                  f"; they do not belong together.")
        return cls(config, words, agent, images, log, llm_device=runtimes.llm_device)

    # ---- what a family defines

    def stops(self, task: Task) -> Sequence[str]:
        return (self.template.turn_marker,) if self.config.tuned else ()

    def said(self, answer: Answer, task: Task) -> str:
        return without_words(answer.text).strip()

    def requests(self, conversations: Sequence[Sequence[Message]], task: Task, opening: str = "",
                 seeds: Sequence[int | None] | None = None) -> list[Prompt]:
        if not self.config.tuned and task == "edit":
            raise ConfigError(f"{self.config.name} continues texts and was not tuned to follow instructions; "
                              f"SEED-X-Edit edits.")
        images = [image for conversation in conversations for message in conversation for image in message.images]
        seen = iter(self.images.read(images, editing=task == "edit"))
        end = self.tokenizer.encode_parts([opening]) if opening else []
        return [self._request(conversation, task, seen, end) for conversation in conversations]

    def _request(self, conversation: Sequence[Message], task: Task, images: Iterator[Seen],
                 end: list[int]) -> Prompt:
        turns: list[tuple[str, list[Content]]] = []
        seen: list[Seen] = []
        sources: list[Image.Image] = []
        system = "\n".join(message.text for message in conversation if message.role == "system")
        for message in conversation:
            own = [next(images) for _ in message.images]
            seen += own
            sources += [one.image for one in own]
            sources += [part.image for part in message.content if isinstance(part, DrawnPart) and part.image]
            if message.role != "system":
                turns.append((message.role, self._spans(message, [len(one.features) for one in own])))
        alone = [part for _, content in turns for part in content]
        dialogue = self.config.tuned and conversation[0].role != "raw"
        ids = self.prompts.dialogue(turns, system) if dialogue else self.prompts.alone(alone, task)
        places = self.prompts.places(ids, turns)
        ids = [*ids, *end]
        mask = torch.zeros(1, len(ids), dtype=torch.bool)
        mask[0, places] = True
        embeds = None
        if seen:
            device = self.llm.get_input_embeddings().weight.device
            with torch.inference_mode():
                embeds = self.agent.embed(torch.tensor([ids], device=device), mask.to(device),
                                          torch.cat([one.features for one in seen]).to(device),
                                          torch.cat([one.positions for one in seen]).to(device))[0]
        return Prompt(ids, embeds, answered=end, source=sources[-1] if sources else None)

    def _spans(self, message: Message, views: list[int]) -> list[Content]:
        """A message's texts and images as parts of a prompt; `<image>` in a user's text stands for an image."""
        texts = [item for item in message.content if isinstance(item, str)]
        if message.role != "assistant" and any(PLACEHOLDER in text for text in texts):
            return place_images("".join(texts), views)
        rest = iter(views)
        spans: list[Content] = []
        whole = list(range(self.tokenizer.vocabulary.tokens_per_image))
        for item in message.content:
            if is_codes(item) and [int(code) for code in item] != whole:
                raise RequestError("Images of SEED-X have no codes; give the image itself.")
            spans.append(item if isinstance(item, str) else ReadImage(next(rest)) if is_image(item) else WrittenImage())
        return spans

    def values(self, parts: Sequence[ImagePart], states: HiddenStates, row: int) -> Sequence[Tensor]:
        places = [range(part.place, part.place + len(part.codes)) for part in parts]
        with torch.inference_mode():
            return list(self.agent.written_features(torch.stack([states.at(row, one) for one in places])).cpu())

    def draw_values(self, values: Sequence[Any], requests: Sequence[Prompt], seeds: Sequence[int],
                    batch_size: int, drawing: dict[str, Any]) -> list[Image.Image]:
        sources = [request.source for request in requests]
        if not (any(sources) and self.images.reads_condition):
            drawing = {key: value for key, value in drawing.items() if key not in ("ratio", "image_guidance_scale")}
            return self.images.draw(values, seeds=seeds, batch_size=batch_size, **drawing)
        return self.images.draw(values, seeds=seeds, batch_size=batch_size, conditions=sources, **drawing)

    # ---- tasks of its own

    def detect(self, images: Any, phrase: str | Sequence[str], *, batch_size: int = 16, **options: Any) -> Any:
        """Where `phrase` is in an image: a `Detection`; a list of them for a list of images. A model that follows
        instructions is asked for it; the base model completes it, so its last words name the thing."""
        groups, single = grouped(images)
        asked = [str(self.tasks.detect_request(one)) if self.config.tuned else one for one in texts_for(phrase, groups)]
        conversations = [user_message([*group, text]) for group, text in zip(groups, asked, strict=True)]
        written = self.write(conversations, "detect", self.settings("detect", **options), batch_size=batch_size)
        found = [self.detection(one.request.source, one.answer.ids) for one in written]
        return found[0] if single else found

    def detection(self, image: Image.Image | None, ids: Sequence[int], opened: bool | None = None) -> Detection:
        """The boxes of an answer; `opened`: the prompt ended inside a box."""
        if image is None:
            raise RequestError("Things are looked for in an image.")
        text, places = answer_in(answer_text(ids, self.tokenizer), self.tasks.answer_after), self.prompts.vocabulary
        boxes, problems = read_boxes(text, not self.config.tuned if opened is None else opened, places.n_locations)
        for problem in problems:
            self._log_note(problem)
        return Detection(image, [box.corners(image.size, places.n_locations) for box in boxes], boxes, text, problems)

    def reconstruct(self, images: Any, seed: Any = 0, *, condition: Any = None, embeddings: int | None = None,
                    batch_size: int = 8, **drawing: Any) -> list[Image.Image]:
        """Images drawn again from their features: a list.

        Args:
            condition: for a second stage, the image (or one for each) that shows what it may take over.
            embeddings: draw from means of neighbours' features, so many (64: as the language model writes them); None:
                from all, as the original scripts did.
        """
        opened = [self.images.open(image) for group in grouped(images)[0] for image in group]
        self._log_note(self.images.note(opened))
        features = mean_features(self.images.encode(opened), embeddings)
        shown = None
        if condition is not None:
            shown = [self.images.open(one) for group in grouped(condition)[0] for one in group]
            shown *= len(opened) if len(shown) == 1 else 1
        return self.images.draw(list(features), seeds=one_seed_each(seed, len(opened)), conditions=shown,
                                batch_size=batch_size, **drawing)

    def tokenize(self, images: Any) -> Any:
        raise ConfigError(f"{self.config.name} reads images as features, so they have no codes; `images.encode` gives "
                          f"the features.")


@dataclass(frozen=True)
class AgentSizes:
    """`agent/config.json`: sizes of both resamplers, and `AgentSettings`; the defaults are the original ones."""

    input_resampler: ResamplerConfig = INPUT_RESAMPLER
    output_resampler: ResamplerConfig = OUTPUT_RESAMPLER
    settings: AgentSettings = AgentSettings()


def read_agent_sizes(config: SystemConfig) -> tuple[AgentSizes, Mapping[str, Any] | None]:
    """Sizes of a system's agent (beside its weights in `config.json`, of a tuning in `agent.json`, or the original
    ones), and the fields of the LoRA whose weights its file holds."""
    assert config.agent is not None
    folder = config.agent if config.agent.is_dir() else config.agent.parent
    file = folder / "agent.json"
    tuned = read_json_object(file, ConfigError) if file.is_file() else {}
    lora = tuned.get("lora") if config.lora is None else config.lora
    if "agent" in config.sizes:
        return config.sizes["agent"], lora
    if (folder / "config.json").is_file():
        values = read_json_object(folder / "config.json", ConfigError)
        return read_settings(AgentSizes, values, f"{folder}/config.json"), lora
    given: dict[str, Any] = {key: tuned[key] for key in ("input_resampler", "output_resampler") if key in tuned}
    return read_settings(AgentSizes, {**given, "settings": tuned.get("losses", {})}, str(file)), lora


def mean_features(features: Tensor, number: int | None) -> Tensor:
    """Features [B, N, K] → means of neighbours [B, `number`, K]; None: all. `ConfigError`: it does not divide N."""
    if number is None:
        return features
    if features.shape[1] % number:
        raise ConfigError(f"embeddings must divide the vision encoder's {features.shape[1]}, not {number}.")
    return features.unflatten(1, (number, -1)).mean(dim=2)


def load_agent_model(config: SystemConfig, words: MultimodalTokenizer, runtimes: Runtimes) -> ContinuousLVLM:
    """The language model with its two resamplers, in eval mode and frozen.

    Raises:
        CheckpointError: missing or damaged files, or parts of different sizes. ConfigError: another tokenizer.
    """
    parts: Any = config
    runtime, vocabulary = runtimes.llm, seed_x_words(words)
    llm = load_llm(parts.llm, device=runtimes.llm_home, dtype=runtime.dtype, quantization=runtimes.quantization,
                   vocabulary=vocabulary)
    sizes, lora = read_agent_sizes(config)
    read, write = sizes.input_resampler, sizes.output_resampler
    width = llm.config.hidden_size
    if (read.embed_dim, write.kv_dim or write.embed_dim) != (width, width):
        raise CheckpointError(f"{config.agent}: its resamplers are for a language model of width {read.embed_dim}, but "
                              f"{config.llm} has width {width}; they do not belong together.")
    if lora is not None and runtimes.quantization is not None:
        raise ConfigError(f"{config.agent}: a LoRA is put into the language model's weights, so these cannot be in "
                          f"{runtimes.quantization}: leave the quantisation out, or use the folder that "
                          f"src/tools/merge_lora_weights.py makes of both once.")
    if lora is not None:
        merge_into(llm, parts.agent, lora)
    agent = ContinuousLVLM(llm, Resampler(read), Resampler(write), sizes.settings)
    load_agent(agent, parts.agent, language=lora is None)
    for part in (agent.input_resampler, agent.output_resampler):
        part.to(runtime.device, runtime.dtype)
    if sizes.settings.add_patch_pos:
        agent.patch_pos_embed.data = agent.patch_pos_embed.data.to(runtime.device, runtime.dtype)
    return agent.requires_grad_(False).eval()


def load_images(config: SystemConfig, runtimes: Runtimes, width: int | None = None) -> FeatureImages:
    """Vision encoder and de-tokenizer of a system; `width`: of the features that are drawn, None for the encoder's.

    Raises:
        CheckpointError: missing or damaged files.
    """
    parts: Any = config.require("vision")
    home = "cpu" if "encoder" in runtimes.offload else runtimes.images.device
    model = QwenVit.from_pretrained(parts.vision, config=config.sizes.get("vision"), device=home,
                                    dtype=runtimes.images.dtype)
    load = None
    if runtimes.load_decoder and config.detokenizer is not None:
        load = partial(_load_decoder, config, width or model.config.output_dim, runtimes.drawing)
    images = FeatureImages(model, config.grids, config.edit_grids, load_decoder=load, device=runtimes.images.device,
                           drawing_device=runtimes.drawing.device, offload=runtimes.offload)
    images.domain = load_domain(config.domain, config.domain_threshold)
    return images


def _load_decoder(config: SystemConfig, width: int, runtime: Runtime) -> SdxlDetokenizer:
    config.require("sdxl", "detokenizer")
    decoder = SdxlDetokenizer.from_pretrained(config.sdxl, config.detokenizer,  # type: ignore[arg-type]
                                              dtype=runtime.dtype, sizes=config.sizes.get("detokenizer"))
    if decoder.embedding_dim != width:
        raise CheckpointError(f"{config.detokenizer}: reads features of width {decoder.embedding_dim}, but they have "
                              f"width {width} here; the parts do not belong together.")
    return decoder
