"""SEED-X: a language model that reads image features of several views and outputs image features.

    images ─► views ─► QwenVit ─► features ─► agent ─► texts, boxes and features ─► SDXL ─► images

The agent is LLaMA with two resamplers; output features are at 64 placeholder tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, Self

import torch
from PIL import Image
from torch import Tensor

from seed_multimodal.disk import read_json_object
from seed_multimodal.errors import CheckpointError, CodesError, ConfigError, RequestError
from seed_multimodal.images.io import ImageSource, code_row, is_image
from seed_multimodal.images.sheet import draw_boxes
from seed_multimodal.images.views import (
    UNIT,
    AnyResolution,
    Ratio,
    drawing_size,
    patch_positions,
    read_grids,
    with_ratio,
)
from seed_multimodal.inference.backends.torch import joined
from seed_multimodal.inference.base_engine import GeneratedSequence
from seed_multimodal.inference.batching import ResultCache, weights_state
from seed_multimodal.inference.prompt import Prompt, PromptImage
from seed_multimodal.language.answer import Answer, ImagePart
from seed_multimodal.language.hub_tokenizer import load_text_tokenizer
from seed_multimodal.language.llm import check_vocab_size, load_llm
from seed_multimodal.language.lora import load_base, merge_into, read_trained
from seed_multimodal.language.messages import ContentPart, Images, Message, flatten_images
from seed_multimodal.language.prompts import Turn, interleave, split_verdict
from seed_multimodal.language.text_tokenizer import Part, TextTokenizer
from seed_multimodal.language.vocabulary import PLACEHOLDER, Ids
from seed_multimodal.models.seed_x.diffusion import SdxlDetokenizer, SdxlSettings
from seed_multimodal.models.seed_x.modeling import AgentSettings, ContinuousLVLM, load_agent
from seed_multimodal.models.seed_x.processing import (
    Box,
    SeedXPrompts,
    answer_text,
    read_boxes,
    seed_x_vocabulary,
    with_repeated_images,
    without_tags,
)
from seed_multimodal.models.seed_x.spec import SeedXConfig
from seed_multimodal.nn.pretrained import InitialValues
from seed_multimodal.nn.vision.qwen import (
    INPUT_RESAMPLER,
    OUTPUT_RESAMPLER,
    QwenVit,
    Resampler,
    ResamplerConfig,
)
from seed_multimodal.pipelines.family import Edges, Family
from seed_multimodal.pipelines.images import Encoded, ImageCodec, Options, Placement, Seed
from seed_multimodal.pipelines.tasks import TaskKind
from seed_multimodal.pipelines.world import open_familiarity
from seed_multimodal.settings import check_value, read_settings

BOX_SIDE = 10**6  # pixels of a square on which boxes are computed and then divided by
CACHED_IMAGES = 16  # images in the cache of features: about 10 MB each in float16
ENCODER_BATCH_SIZE = 8  # views in one pass of the vision encoder


@dataclass(frozen=True)
class EncodedImage:
    """An encoded input image."""

    features: Tensor  # [V, N, K], of its views
    positions: Tensor  # [V, 2], their centres
    image: Image.Image


@dataclass(frozen=True)
class Detection:
    """The boxes of an answer."""

    image: Image.Image  # in the size of the file
    boxes: list[tuple[int, int, int, int]]  # left, top, right, bottom in its pixels, clipped
    grid: list[Box]  # the same in 224ths of the image
    text: str  # the answer with its box tokens
    problems: list[str]  # a message for each malformed box

    def drawn(self, width: int = 2) -> Image.Image:
        """The image with the boxes on it; width: of their lines, in pixels."""
        return draw_boxes(self.image, self.boxes, width)


class SeedXImageCodec(ImageCodec):
    """Images ⇄ features.

    grids: allowed grids of views of input images.
    edit_grids: those of images to edit.
    """

    codec_settings = ("ratio", "conditions")
    drawing_settings = (*(entry.name for entry in fields(SdxlSettings)), "ratio")

    def __init__(
        self, model: QwenVit, grids: Sequence[str], edit_grids: Sequence[str], placement: Placement
    ) -> None:
        size = model.image_size
        longest_side = size * max(max(grid) for grid in read_grids(grids))
        super().__init__(model, placement, min_side=2 * longest_side)
        self.views = AnyResolution(size, tuple(grids))
        self.edit_views = AnyResolution(size, tuple(edit_grids))
        self._cache: ResultCache[Encoded] = ResultCache(CACHED_IMAGES)
        self._null_state: object = None  # of the unconditional embeddings, if computed

    def read(self, images: Sequence[ImageSource], editing: bool = False) -> list[Encoded]:
        """Each image in its views; `ImageError` names one that cannot be read."""
        views = self.edit_views if editing else self.views
        opened = [self.open(image) for image in images]
        rows = self._encode_batcher(None, [views.cut(image) for image in opened])
        encoded: list[Encoded] = []
        for image, (features, distance) in zip(opened, rows, strict=True):
            positions = patch_positions(views.grid(image.size))
            encoded.append(Encoded(EncodedImage(features, positions, image), distance))
        return encoded

    @torch.inference_mode()
    def encode_batch(self, key: None, rows: Sequence[Tensor]) -> list[Encoded]:
        """Views [V, 3, S, S] of each image → features [V, N, K] on the CPU."""
        state = (self.encoder_state(), self.familiarity, self.model.preprocessing)
        return self._cache.of(rows, self._encode_new, state)

    def encoder_state(self) -> object:
        """A value that changes with what features of images depend on."""
        return self._n_forgotten, weights_state(self.model)

    def _encode_new(self, rows: list[Tensor]) -> list[Encoded]:
        dtype = next(self.model.parameters()).dtype
        pixels = self.model.preprocessing.normalise(torch.cat(rows))
        batches: list[Tensor] = []
        with self.encoding():
            for batch in pixels.split(ENCODER_BATCH_SIZE):
                batches.append(self.model(batch.to(self.device, dtype)))
        n_views = [len(views) for views in rows]
        features = torch.cat(batches).cpu().split(n_views)

        # The last view is that of the complete image.
        views = pixels.split(n_views)
        squares = torch.stack([image_views[-1] for image_views in views])
        encoded = self.measured(
            features, squares, lambda: torch.stack([image_views[-1] for image_views in features])
        )
        return [*map(self._measured_in_views, encoded, views)]

    def _measured_in_views(self, image: Encoded, views: Tensor) -> Encoded:
        """An image that is unknown as a whole can be known in its views, of which the second
        nearest counts.

        views: normalised pixels [V, 3, S, S].
        """
        if image.distance is None or image.distance <= 0 or len(views) < 3:
            return image
        distances: Any = self.familiarity.distances(lambda: image.value[:-1], views[:-1])
        return image._replace(distance=min(image.distance, sorted(distances)[1]))

    def encode(
        self, images: Sequence[ImageSource], embeddings: int | None = None, *, seed: Seed = 0
    ) -> Tensor:
        """Features [B, N, K] of images, each squashed to one square view; no effect of `seed`.

        embeddings: so many means of neighbours instead of N; `ConfigError` if they do not divide N.
        """
        # The last view is that of the complete image.
        squares = [self.views.cut(self.open(image))[-1:] for image in images]
        features = torch.cat([image.value for image in self._encode_batcher(None, squares)])
        if embeddings is None:
            return features
        check_value(int, embeddings, "embeddings", minimum=1)
        if features.shape[1] % embeddings:
            raise ConfigError(
                f"embeddings must divide the vision encoder's {features.shape[1]}, not "
                f"{embeddings}."
            )
        return features.unflatten(1, (embeddings, -1)).mean(dim=2)

    def reconstruct(
        self,
        inputs: Sequence[Any],
        *,
        seeds: Sequence[int],
        condition: Images | None = None,
        embeddings: int | None = None,
        **settings: Any,
    ) -> list[Image.Image]:
        """Images → images from their features.

        condition: condition image of a second stage, one for all or one each.
        embeddings: see `encode`; None: all features.
        """
        if not inputs:
            return []
        features = self.encode([self.open(image) for image in inputs], embeddings)
        conditions = None
        if condition is not None:
            conditions = [self.open(image) for image in flatten_images(condition)]
            if len(conditions) == 1:  # for all images
                conditions = conditions * len(inputs)
            if len(conditions) != len(inputs):
                raise CodesError(
                    f"{len(inputs)} images were given with {len(conditions)} conditions."
                )
        return self.draw(list(features), seeds=seeds, conditions=conditions, **settings)

    def check_drawing(self, **settings: object) -> None:
        check_value(Ratio, settings.get("ratio", "restore"), "ratio")
        super().check_drawing(**settings)
        # Unconditional embeddings for guidance, unless the decoder came with them.
        state = self.encoder_state()
        if self.decoder.null_embeds is None or self._null_state not in (None, state):
            with self.encoding():
                self.decoder.set_null_embeds(self.model, self.views.image_size)
            self._null_state = state

    def draw(
        self,
        values: Sequence[Tensor],
        *,
        seeds: Sequence[int],
        conditions: Sequence[Image.Image | None] | None = None,
        ratio: Ratio = "restore",
        **settings: object,
    ) -> list[Image.Image]:
        """Features [N, W] of each image → images.

        conditions: of a second stage, the condition image (or None) of each drawn one.
        ratio: "restore" stretches a drawn square to its condition's aspect ratio, "keep" draws in
            that ratio, "square" draws a square. Without effect if `settings` have a size.
        settings: as of `ImageCodec`.
        """
        self.check_drawing(ratio=ratio, **settings)
        if conditions is None:
            conditions = [None] * len(values)
        if "height" in settings:
            ratio = "square"

        # 1. Rows by the size in which they are drawn; None: the default.
        side, _ = self.decoder.image_size(self.decoder.defaults)
        unit = UNIT if side % UNIT == 0 else max(8, self.decoder.factor)
        rows_by_size: dict[tuple[int, int] | None, list[int]] = {}
        for row, condition in enumerate(conditions):
            size = None
            if condition is not None and ratio == "keep":
                size = drawing_size(condition.size, side, unit)
            rows_by_size.setdefault(size, []).append(row)

        # 2. Images of a size are drawn together.
        images: dict[int, Image.Image] = {}
        for size, rows in rows_by_size.items():
            size_settings = settings
            if size is not None:
                size_settings = {**settings, "width": size[0], "height": size[1]}
            columns = [[column[row] for row in rows] for column in (values, conditions, seeds)]
            size_images = self.draw_batched(size_settings, *columns)
            images |= zip(rows, size_images, strict=True)

        # 3. Stretched to the ratios of the conditions.
        for row, condition in enumerate(conditions):
            if condition is not None and ratio != "square":
                images[row] = with_ratio(images[row], condition.size)
        return [images[row] for row in range(len(conditions))]

    @torch.inference_mode()
    def draw_batch(
        self, key: Mapping[str, object], rows: Sequence[tuple[Tensor, Image.Image | None, int]]
    ) -> list[Image.Image]:
        """Features, condition and seed of each image → images; the key holds the settings."""
        values, conditions, seeds = zip(*rows, strict=True)
        return self.decoder(torch.stack(values), seeds=seeds, condition_images=conditions, **key)


class SeedXFamily(Family):
    """What differs in SEED-X: images are features of views, answers can have boxes.

    Settings of drawing:

    num_inference_steps, guidance_scale, image_guidance_scale, height, width: of `SdxlSettings`.
    preset: "fast" or "original".
    ratio: of edits, see `SeedXImageCodec.draw`.
    condition, embeddings: of reconstructions, see `SeedXImageCodec.reconstruct`.
    """

    def __init__(
        self,
        config: SeedXConfig,
        tokenizer: TextTokenizer,
        agent: ContinuousLVLM,
        images: SeedXImageCodec,
    ) -> None:
        self.agent = agent
        self.prompt_writer = SeedXPrompts(tokenizer)
        super().__init__(config, tokenizer, agent.llm, images, self.prompt_writer.template)

    @classmethod
    def check_decoder(cls, config: SeedXConfig) -> None:
        SdxlDetokenizer.check_folder(config.sdxl)

    @classmethod
    def load(cls, config: SeedXConfig, placement: Placement) -> Self:
        config.require("llm", "agent", "tokenizer", "vision")
        tokenizer = load_text_tokenizer(config.path("tokenizer"))
        images = load_images(config, placement)  # before the language model, which takes longest
        decoder = config.detokenizer
        images.familiarity = open_familiarity(config.known_images, decoder, config.sdxl)
        agent = load_agent_model(config, tokenizer, placement)
        resampler = agent.input_resampler.config
        input_width = resampler.kv_dim or resampler.embed_dim
        feature_width = images.model.config.output_dim
        if feature_width != input_width:
            raise CheckpointError(
                f"{config.vision}: its features have width {feature_width}, but {config.agent} "
                f"reads width {input_width}; they do not belong together."
            )
        return cls(config, tokenizer, agent, images)

    # ---- answers

    def settings(self, task: str) -> Options:
        settings = super().settings(task)
        return settings if self.config.tuned else {**settings, "stop": ()}

    def read_chat(self, conversation: list[Message], draws: bool) -> tuple[TaskKind, list[Message]]:
        """As tuned models learned it (`data.Chat`): images of answers are output tokens."""
        task, conversation = super().read_chat(conversation, draws)
        if not self.config.tuned:
            return task, conversation
        output_indices = [*range(self.tokenizer.vocabulary.tokens_per_image)]
        messages: list[Message] = []
        turns = [(message.role, message.content) for message in conversation]
        for role, parts in with_repeated_images(turns):
            content: list[ContentPart] = []
            for part in parts:
                if role == "assistant" and is_image(part):  # how clients send it
                    part = ImagePart(output_indices, image=self.images.open(part))
                elif role == "user" and isinstance(part, ImagePart) and part.image:
                    part = part.image
                content.append(part)
            messages.append(Message(role, tuple(content)))
        return task, messages

    def text(self, answer: Answer, task: TaskKind) -> str:
        return without_tags(answer.text).strip()

    def boxes(self, answer: Answer) -> tuple[list[Edges], list[str]]:
        n_locations = self.prompt_writer.vocabulary.n_locations
        detection = self.detection(Image.new("1", (1, 1)), answer.ids, opened=False)
        boxes: list[Edges] = []
        for box in detection.grid:
            corners = box.corners((BOX_SIDE, BOX_SIDE), n_locations)
            boxes.append(tuple(edge / BOX_SIDE for edge in corners))
        return boxes, detection.problems

    def detection(self, image: Image.Image, ids: Sequence[int], opened: bool) -> Detection:
        """The boxes of an answer.

        opened: whether the prompt ended inside a box.
        """
        _, text = split_verdict(answer_text(ids, self.tokenizer), self.tasks.answer_after)
        text = text.removesuffix("</s>").strip()
        n_locations = self.prompt_writer.vocabulary.n_locations
        boxes, problems = read_boxes(text, opened, n_locations)
        corners = [box.corners(image.size, n_locations) for box in boxes]
        return Detection(image, corners, boxes, text, problems)

    def image_inputs(
        self, parts: Sequence[ImagePart], request: GeneratedSequence
    ) -> Sequence[Tensor]:
        """Features [64, K] of each image of a request's answer."""
        image_states = [request.states_at(part.positions) for part in parts]
        with torch.inference_mode():
            return list(self.agent.output_features(torch.stack(image_states)).cpu())

    def draw(
        self,
        inputs: Sequence[Tensor],
        prompts: Sequence[Prompt],
        seeds: Sequence[int],
        settings: Options,
    ) -> list[Image.Image]:
        # A second stage also reads the image that is edited.
        if self.images.decoder.reads_condition:
            settings = {**settings, "conditions": [prompt.source for prompt in prompts]}
        return super().draw(inputs, prompts, seeds, settings)

    # ---- prompts

    def encode(
        self, images: Sequence[ImageSource], task: TaskKind, seeds: Sequence[int | None]
    ) -> list[Encoded]:
        return self.images.read(images, editing=task == "edit")

    def prompt(
        self, conversation: Sequence[Message], task: TaskKind, encoded: Iterator[EncodedImage]
    ) -> Prompt:
        if not self.config.tuned and task == "edit":
            raise ConfigError(
                f"{self.config.name} continues texts and was not tuned to follow instructions; "
                f"SEED-X-Edit edits."
            )
        # 1. Turns, input images, and all images that an edit may start from.
        system: list[str] = []
        turns: list[Turn] = []
        images: list[EncodedImage] = []
        sources: list[Image.Image] = []
        for message in conversation:
            message_images = [next(encoded) for _ in message.images]
            images += message_images
            sources += [image.image for image in message_images]
            for part in message.content:
                if isinstance(part, ImagePart) and part.image:
                    sources.append(part.image)
            if message.role == "system":
                system.append(message.text)
            else:
                turns.append((message.role, self._turn_content(message, message_images)))

        # 2. Ids: of a dialogue, or of a text that is continued.
        if self.config.tuned and conversation[0].role != "raw":
            ids = self.prompt_writer.dialogue(turns, "\n".join(system))
        else:
            content: list[Part] = []
            for _, turn_content in turns:
                content += turn_content
            ids = self.prompt_writer.completion(content, task)

        # 3. The positions of each image's embeddings, of all its views.
        positions = self.prompt_writer.feature_positions(ids, turns)
        prompt_images = list(map(PromptImage, images, positions))
        source = sources[-1] if sources else None
        return Prompt(ids, prompt_images, source=source)

    def embed_features(self, features: Sequence[EncodedImage | Tensor]) -> Tensor:
        if isinstance(features[0], Tensor):  # embedded before
            return joined(features)
        return self.agent.read_images(
            [image.features for image in features], [image.positions for image in features]
        )

    def _turn_content(self, message: Message, images: Sequence[EncodedImage]) -> list[Part]:
        """A message's texts, and its images as ids."""
        # 1. `<image>` in a user's text is replaced by an image.
        inputs = [self.prompt_writer.image(len(image.features)) for image in images]
        texts = [item for item in message.content if isinstance(item, str)]
        if message.role != "assistant" and any(PLACEHOLDER in text for text in texts):
            return interleave("".join(texts), inputs)

        # 2. Otherwise they are in order; codes are the image tokens of an earlier answer.
        remaining = iter(inputs)
        vocabulary = self.tokenizer.vocabulary
        content: list[Part] = []
        for item in message.content:
            if code_row(item) not in (None, [*range(vocabulary.tokens_per_image)]):
                raise RequestError("Images of SEED-X have no codes; give the image itself.")
            if isinstance(item, str):
                content.append(item)
            elif is_image(item):
                content.append(next(remaining))
            else:
                content.append(Ids(self.prompt_writer.vocabulary.run()))
        return content


@dataclass(frozen=True)
class AgentConfig:
    """`agent/config.json`; the defaults are the original ones."""

    input_resampler: ResamplerConfig = INPUT_RESAMPLER
    output_resampler: ResamplerConfig = OUTPUT_RESAMPLER
    settings: AgentSettings = AgentSettings()


def read_agent_config(config: SeedXConfig) -> tuple[AgentConfig, Mapping[str, Any] | None]:
    """Sizes of a system's agent, and the fields of the LoRA whose weights its file holds."""
    agent = config.path("agent")
    folder = agent if agent.is_dir() else agent.parent

    # 1. A tuning writes `agent.json` with its checkpoint.
    tuning_file = folder / "agent.json"
    tuning: dict[str, Any] = {}
    if tuning_file.is_file():
        tuning = read_json_object(tuning_file, ConfigError)
    sizes = config.found.sizes
    lora = sizes.get("lora", tuning.get("lora"))

    # 2. Sizes of config.json, of an original YAML, of the tuning, or the original ones.
    config_file = folder / "config.json"
    if config_file.is_file():
        values = read_json_object(config_file, ConfigError)
        return read_settings(AgentConfig, values, str(config_file)), lora
    if "agent" in sizes:
        return sizes["agent"], lora
    values = {key: tuning[key] for key in ("input_resampler", "output_resampler") if key in tuning}
    values["settings"] = tuning.get("losses", {})
    return read_settings(AgentConfig, values, str(tuning_file)), lora


def load_agent_model(
    config: SeedXConfig, tokenizer: TextTokenizer, placement: Placement
) -> ContinuousLVLM:
    """The language model with its two resamplers, in eval mode and frozen.

    Raises:
        CheckpointError, ConfigError: parts that are missing, damaged, or of different sizes.
    """
    weights = config.path("agent")
    llm_folder = config.path("llm")
    vocabulary = seed_x_vocabulary(tokenizer)
    sizes, lora = read_agent_config(config)

    # 1. The language model, with the agent's LoRA merged into it.
    device = placement.load_device("llm")
    dtype = placement.llm.dtype
    if lora is not None and (placement.quantization or not placement.load_llm):
        raise ConfigError(
            f"{weights}: its LoRA can be merged neither into quantised weights nor into those of a "
            f"server: use the folder that src/tools/merge_lora_weights.py writes."
        )
    if lora is None:
        llm = load_llm(
            llm_folder,
            device=device,
            dtype=dtype,
            quantization=placement.quantization,
            tokenizer=tokenizer,
            layers=placement.load_llm,
        )
        check_vocab_size(llm.config.vocab_size, vocabulary, str(llm_folder))
    else:
        trained = read_trained(weights, lora)
        llm = load_base(llm_folder, trained, tokenizer, device=device, dtype=dtype)
        merge_into(llm, trained)

    # 2. The resamplers. They are on the device also where the language model is off-loaded.
    with torch.device("cpu"), InitialValues():
        input_resampler = Resampler(sizes.input_resampler)
        output_resampler = Resampler(sizes.output_resampler)
        agent = ContinuousLVLM(llm, input_resampler, output_resampler, sizes.settings)
    load_agent(agent, weights, language=lora is None)
    input_resampler.to(placement.llm.device, dtype)
    output_resampler.to(placement.llm.device, dtype)
    if sizes.settings.add_patch_pos:
        agent.patch_pos_embed.data = agent.patch_pos_embed.data.to(placement.llm.device, dtype)
    return agent.requires_grad_(False).eval()


def load_images(config: SeedXConfig, placement: Placement) -> SeedXImageCodec:
    """Vision encoder and de-tokenizer of a system. Raises `CheckpointError`."""
    model = QwenVit.from_pretrained(
        config.path("vision"),
        config=config.found.sizes.get("vision"),
        device=placement.load_device("encoder"),
        dtype=placement.images.dtype,
    )
    codec = SeedXImageCodec(model, config.grids, config.edit_grids, placement)
    if placement.load_decoder and config.detokenizer is not None:
        codec.load_decoder = partial(_load_decoder, config, placement.drawing.dtype)
    return codec


def _load_decoder(config: SeedXConfig, dtype: torch.dtype) -> SdxlDetokenizer:
    config.require("sdxl", "detokenizer")
    return SdxlDetokenizer.from_pretrained(
        config.path("sdxl"),
        config.path("detokenizer"),
        dtype=dtype,
        sizes=config.found.sizes.get("detokenizer"),
    )
