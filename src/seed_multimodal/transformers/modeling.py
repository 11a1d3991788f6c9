"""Models: the language model of a `MultimodalSystem`, generating texts, images or both.

text and interleaved   transformers' `generate`, with images kept well-formed by a logits processor
image                  `MultimodalSystem.generate`: as its `draw` and `edit`
"""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn
from transformers import (
    BitsAndBytesConfig,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteriaList,
)

from seed_multimodal.disk import replace_folder
from seed_multimodal.errors import ConfigError, GenerationError
from seed_multimodal.inference.engines import torch_engine
from seed_multimodal.inference.prompt import Prompt, rows_end_at_stops
from seed_multimodal.inference.sampling import ImageConstraints, read_answer
from seed_multimodal.language.vocabulary import ImageGrammar, ImageVocabulary
from seed_multimodal.pipelines.base import MultimodalSystem
from seed_multimodal.pipelines.config import SystemConfig
from seed_multimodal.pipelines.tasks import TaskKind
from seed_multimodal.state_dicts import tensors_below
from seed_multimodal.transformers.configuration import SeedMultimodalConfig
from seed_multimodal.transformers.systems import remember

# Arguments of `from_pretrained` for downloads and remote code, which local folders do not need.
HUB_ARGUMENTS = (
    "_from_auto",
    "_from_pipeline",
    "adapter_kwargs",
    "cache_dir",
    "code_revision",
    "force_download",
    "local_files_only",
    "low_cpu_mem_usage",
    "revision",
    "token",
    "trust_remote_code",
    "use_safetensors",
)
LLM = "language_model."  # before the names of its weights
# Settings of `GenerationSettings` with the same name in `GenerationConfig`.
SHARED_SETTINGS = ("max_new_tokens", "num_beams", "repetition_penalty")
SAMPLING_SETTINGS = ("temperature", "top_p", "top_k")
# Options of transformers that read the ids of prompts.
NEED_IDS = ("assistant_model", "guidance_scale", "negative_prompt_ids", "prompt_lookup_num_tokens")
BEAM_SETTINGS = ("length_penalty", "early_stopping")


@dataclass(frozen=True)
class GeneratedFeatures:
    """Features `[N, W]`, or a grid of codes `[h, w]`, of each generated image, and the sources of
    the prompts: as the images of which those are edits (or None).

    Like a tensor where transformers' pipeline takes rows from a batch.
    """

    features: list[Tensor]
    sources: list[Any]

    @property
    def shape(self) -> torch.Size:
        return torch.Size([len(self.features)])

    def __getitem__(self, row: int) -> GeneratedFeatures:
        return GeneratedFeatures([self.features[row]], [self.sources[row]])

    def to(self, *args: Any, **kwargs: Any) -> GeneratedFeatures:
        return replace(self, features=[rows.to(*args, **kwargs) for rows in self.features])


class SeedMultimodalForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """A system's language model, with its image tokenizer and de-tokenizer.

    system: the `MultimodalSystem`, whose other methods may be used, too.
    drawing: settings of `decode_image_tokens` that its caller (the pipeline) does not give.
    """

    config: SeedMultimodalConfig
    base_model_prefix = LLM[:-1]
    input_modalities = ("image", "text")
    output_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True

    def __init__(self, config: SeedMultimodalConfig, system: MultimodalSystem) -> None:
        super().__init__(config)
        if system.llm is None:
            raise ConfigError("A model of transformers needs engine='torch'.")
        self.language_model: Any = system.llm
        config.text_config = system.llm.config
        self.system = system
        self.drawing: dict[str, Any] = {}
        self.generation_config = self._generation_config(
            "chat" if system.abilities.writes else "draw"
        )
        if not getattr(system.llm, "is_quantized", False):
            self.language_model.requires_grad_(True)  # SEED-X freezes it
        self.image_tokenizer = system.images.model
        # Further networks of a family, as SEED-X's resamplers.
        for name, part in vars(system.family).items():
            if isinstance(part, nn.Module) and part is not system.llm:
                self.add_module(name, part)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        config: SeedMultimodalConfig | None = None,
        dtype: str | torch.dtype | None = "auto",
        torch_dtype: str | torch.dtype | None = None,
        device_map: Any = None,
        attn_implementation: str | None = None,
        quantization_config: Any = None,
        **options: Any,
    ) -> Self:
        """Load a system's folder.

        device_map: a device; None or "auto": chosen as by `MultimodalSystem.from_pretrained`, which
        takes the other `options` (`quantization`, `offload`, parts, …).
        """
        folder = str(pretrained_model_name_or_path)
        if config is None:
            config = cls.config_class.from_pretrained(folder)
        for name in HUB_ARGUMENTS:
            options.pop(name, None)
        if isinstance(device_map, Mapping):
            if len(device_map) != 1:
                raise ConfigError("device_map: a system's language model is on one device.")
            (device_map,) = device_map.values()
        device = f"cuda:{device_map}" if isinstance(device_map, int) else str(device_map or "auto")
        if quantization_config is not None:
            options["quantization"] = _quantization_name(quantization_config)
        options.setdefault("log", None)
        system = MultimodalSystem.from_pretrained(
            folder, device=device, dtype=torch_dtype or dtype or "auto", **options
        )
        remember(folder, system)
        # The Auto classes put it into the configuration, in which the model then puts its default.
        attn_implementation = attn_implementation or config._attn_implementation
        model = cls(config, system)
        if attn_implementation is not None:
            model.language_model.set_attn_implementation(attn_implementation)
        return model

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        state_dict: Mapping[str, Tensor] | None = None,
        **kwargs: object,
    ) -> None:
        """Write the system's folder, with the weights that the language model has now.

        Parts of an earlier system in the folder are replaced; other files, as checkpoints, stay.
        state_dict: of this model, where its own weights are sharded.
        """
        # 1. The system next to the folder.
        folder = Path(save_directory).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".") as temporary:
            written = self.system.save_pretrained(Path(temporary) / folder.name)
            weights = tensors_below(state_dict or {}, LLM)
            self.language_model.save_pretrained(
                SystemConfig.read(written).path("llm"), state_dict=weights or None
            )

            # 2. Its parts into the folder.
            for part in written.iterdir():
                if part.is_dir():
                    replace_folder(part, folder / part.name)
                else:
                    os.replace(part, folder / part.name)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """Also move the de-tokenizer, and renew the engine with a cache of the same dtype."""
        before = (self.device, self.dtype)
        moved: Self = super()._apply(fn, recurse)
        if (self.device, self.dtype) != before:
            self.system.images.to(self.device)
            # The old engine's cache is freed first; weights that were moved rest there.
            del self.system.engine
            options = replace(self.system.engine_options, offload_device=None)
            family = self.system.family
            self.system.engine = torch_engine(
                self.language_model, family.tokenizer, options, family.embed_features
            )
        return moved

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()

    def forward(
        self,
        input_ids: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        prompts: Sequence[Prompt] = (),
        **kwargs: Any,
    ) -> Any:
        """The language model's output (`loss` with `labels`).

        prompts: those of the processor, of systems that read images as features.
        """
        if inputs_embeds is None:
            assert input_ids is not None
            inputs_embeds = self._embed(input_ids, prompts)
        return self.language_model(inputs_embeds=inputs_embeds, **kwargs)

    def _embed(self, input_ids: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Embeddings `[B, L, D]` of prompts, which are padded at the left."""
        embed = self.get_input_embeddings()
        embeds: Tensor = embed(input_ids.to(embed.weight.device))
        for row, prompt in enumerate(prompts):
            padding = input_ids.shape[1] - len(prompt)
            for image in prompt.images:
                rows = self.system.family.embed_features([image.features]).to(embeds)
                positions = torch.tensor(list(image.positions)) + padding
                embeds = embeds.index_put((torch.tensor(row), positions), rows)
        return embeds

    # ---- generation

    @torch.no_grad()
    def generate(  # type: ignore[override]
        self,
        inputs: Tensor | None = None,
        *,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        prompts: Sequence[Any] = (),
        task: TaskKind | Sequence[TaskKind] | None = None,
        generation_mode: str = "text",
        **options: Any,
    ) -> Any:
        """Answers to prompts of the processor, without the prompts.

        prompts, task: what the processor returns with the ids.

        generation_mode: "text": ids `[B, n]` of texts, and of images between `<img>` and `</img>`
        where the model writes some; `options` are those of transformers' `generate`.
        "image": for `decode_image_tokens` the ids of one image for each prompt, or
        `GeneratedFeatures`, where images are features (SEED-X); `options` are `GenerationSettings`.
        """
        input_ids = inputs if input_ids is None else input_ids
        assert input_ids is not None
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        tasks = _of_rows(task, len(input_ids))
        prompts = _of_rows(prompts, len(prompts))
        if generation_mode == "image":
            if not prompts:
                masked = zip(input_ids, attention_mask.bool(), strict=True)
                prompts = [Prompt(ids[mask].tolist()) for ids, mask in masked]
            return self._generate_images(prompts, tasks, options)
        if len(set(tasks)) > 1:
            raise ConfigError(f"The prompts of a batch have different tasks: {set(tasks)}.")
        embeds = self._embed(input_ids, prompts)
        return self._generate_texts(embeds, attention_mask, tasks[0] or "chat", options)

    def _generate_texts(
        self, embeds: Tensor, attention_mask: Tensor, task: TaskKind, options: dict[str, Any]
    ) -> Any:
        """Answers by transformers' `generate`, cut at their ends."""
        if task in ("draw", "edit"):
            raise ConfigError(f"{self.name_or_path} can only draw this: it has no image.")

        # 1. Settings: the caller's, over those of the model or the task.
        base = options.pop("generation_config", None)
        if base is None:
            base = self.generation_config if task == "chat" else self._generation_config(task)
        generation_config = copy.deepcopy(base)
        options = generation_config.update(**options)
        stops = options.pop("stop_strings", None) or generation_config.stop_strings or ()
        generation_config.stop_strings = None
        options.pop("tokenizer", None)
        for name in NEED_IDS:
            value = options.get(name, getattr(generation_config, name, None))
            if value is not None and value != 1:  # no guidance
                raise ConfigError(f"generate: {name} needs prompts as ids; here are embeddings.")
        settings = self.system.settings(task, stop=[stops] if isinstance(stops, str) else stops)

        # 2. Images stay well-formed, and an answer ends before the next turn.
        tokenizer = self.system.tokenizer
        budgets = self._budgets(generation_config, attention_mask.sum(1).tolist())
        starts = [ImageGrammar(tokenizer.vocabulary, budget=budget) for budget in budgets]
        processors = LogitsProcessorList(
            [ImageConstraints(starts), *options.pop("logits_processor", ())]
        )
        finds_stops = settings.num_beams == 1

        def is_complete(ids: Tensor, scores: object, **kwargs: object) -> Tensor:
            rows_per_prompt = len(ids) // len(budgets)  # of beams
            is_done = ids.shape[1] >= ids.new_tensor(budgets).repeat_interleave(rows_per_prompt)
            if finds_stops:
                is_done |= rows_end_at_stops(tokenizer, settings, ids)
            return is_done

        criteria = StoppingCriteriaList([*options.pop("stopping_criteria", ()), is_complete])

        # 3. The ids, without what follows a stop.
        generated = self.language_model.generate(
            inputs_embeds=embeds,
            attention_mask=attention_mask.to(embeds.device),
            generation_config=generation_config,
            logits_processor=processors,
            stopping_criteria=criteria,
            **options,
        )
        if not isinstance(generated, Tensor):
            return generated
        rows: list[list[int]] = []
        for row, ids in enumerate(generated.tolist()):
            budget = budgets[row * len(budgets) // len(generated)]
            rows.append(read_answer(tokenizer, ids[:budget], settings).ids)
        return _padded(rows, tokenizer.eos_token_id).to(generated.device)

    def _budgets(self, generation_config: GenerationConfig, lengths: Sequence[int]) -> list[int]:
        """New tokens for prompts of these lengths; the longest answer's is set as the limit.

        Raises GenerationError: the context leaves none to a prompt.
        """
        context = self.system.engine.context
        longest = max(lengths)
        if longest >= context:
            raise GenerationError(
                f"The prompt has {longest} tokens, but the model's context ends at {context}; "
                "leave out the oldest turns."
            )
        limit = generation_config.max_new_tokens
        if limit is None:  # the caller's `max_length` counts
            return [context - length for length in lengths]
        budgets = [min(limit, context - length) for length in lengths]
        generation_config.max_new_tokens = max(budgets)
        return budgets

    def _generate_images(
        self, prompts: Sequence[Prompt], tasks: Sequence[TaskKind | None], options: dict[str, Any]
    ) -> Tensor | GeneratedFeatures:
        """The ids or features of one image for each prompt."""
        # 1. What the prompts ask for.
        vocabulary = self.system.tokenizer.vocabulary
        row_tasks: list[TaskKind] = [
            task or ("edit" if _has_image(prompt, vocabulary) else "draw")
            for prompt, task in zip(prompts, tasks, strict=True)
        ]
        if not {*row_tasks} <= {"draw", "edit"}:
            raise ConfigError(
                f"{self.name_or_path}: the prompt was built to be answered with text; pass "
                "processor_kwargs={'generation_mode': 'image'}, too."
            )

        # 2. The answers; `seed` is that of sampled codes, in `self.drawing` that of the drawing.
        seed = options.pop("seed", 0)
        for name in options.keys() & set(self.system.images.drawing_settings):
            raise ConfigError(
                f"{name}: set model.drawing, or pass it to `decode_image_tokens`; a size that is "
                "part of the prompt, to the processor."
            )
        images: dict[int, Any] = {}
        for task in sorted({*row_tasks}):
            rows = [row for row, row_task in enumerate(row_tasks) if row_task == task]
            settings = self.system.settings(task, seed=seed, images="forced", **options)
            limit = options.get("max_new_tokens")
            image_tasks = [
                self.system.image_task(task, prompts[row], settings, limit) for row in rows
            ]
            answers = [item for batch in self.system.generate(image_tasks) for item in batch]
            images |= zip(rows, [answer.single_image() for answer in answers], strict=True)

        # 3. In the order of the prompts.
        inputs = [images[row] for row in range(len(prompts))]
        abilities = self.system.abilities
        if not (abilities.draws_codes and abilities.codes_are_rows):
            sources = [prompt.source for prompt in prompts]
            return GeneratedFeatures(inputs, sources)
        return _padded([vocabulary.image_ids(codes) for codes in inputs], vocabulary.eoi_id)

    @torch.no_grad()
    def decode_image_tokens(
        self, image_tokens: Tensor | GeneratedFeatures, **drawing: object
    ) -> Tensor | list[Tensor]:
        """Draw images from what `generate` returns: the first one of each row.

        drawing: `seed` and settings of the de-tokenizer, over those of `self.drawing`.
        Returns uint8 pixels `[B, H, W, 3]`, or of each image where their sizes differ.
        """
        settings = {"seed": 0, **self.drawing, **drawing}
        seed = settings.pop("seed")
        inputs: list[Any]
        abilities = self.system.abilities
        if isinstance(image_tokens, Tensor):
            if not (abilities.draws_codes and abilities.codes_are_rows):
                raise ConfigError("decode_image_tokens: give it what `generate` returns, not ids.")
            vocabulary = self.system.tokenizer.vocabulary
            inputs = [vocabulary.first_codes(ids) for ids in image_tokens.tolist()]
            prompts = [Prompt() for _ in inputs]
        else:
            inputs = [rows.cpu() for rows in image_tokens.features]
            prompts = [Prompt(source=source) for source in image_tokens.sources]
        images = self.system.family.draw(inputs, prompts, [seed] * len(inputs), settings)
        pixels = [torch.from_numpy(np.array(image)) for image in images]
        if len({rows.shape for rows in pixels}) == 1:
            return torch.stack(pixels)
        return pixels

    def _generation_config(self, task: TaskKind) -> GenerationConfig:
        """A task's settings of `system.json` in transformers' form."""
        settings = self.system.settings(task)
        names = [*SHARED_SETTINGS]
        if settings.samples:
            names += SAMPLING_SETTINGS
        if settings.num_beams > 1:
            names += BEAM_SETTINGS
        if settings.min_new_tokens:
            names.append("min_new_tokens")
        values = {name: getattr(settings, name) for name in names}
        tokenizer = self.system.tokenizer
        return GenerationConfig(
            do_sample=settings.samples,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=list(settings.stop_token_ids or tokenizer.eos_token_ids),
            pad_token_id=tokenizer.pad_token_id,
            use_cache=True,
            **values,
        )


def _quantization_name(config: Any) -> str:
    """The argument `quantization` for a configuration of transformers."""
    if isinstance(config, BitsAndBytesConfig):
        if config.load_in_8bit:
            return "8bit"
        if config.load_in_4bit and config.bnb_4bit_quant_type == "nf4":
            return "4bit"
    raise ConfigError(
        "quantization_config: only bitsandbytes with 8 bit or NF4; otherwise pass quantization="
        "'8bit', '4bit', 'int8' or 'int4' instead."
    )


def _of_rows(value: Any, n_rows: int) -> list[Any]:
    """A value of all rows, or a list of those of each; a batch of the pipeline's nests them."""
    if not isinstance(value, list):
        return [value] * n_rows
    if isinstance(value[0], list):
        return [row_value for row_values in value for row_value in row_values]
    return value


def _has_image(prompt: Prompt, vocabulary: ImageVocabulary) -> bool:
    return bool(prompt.images) or any(map(vocabulary.is_image_token, prompt.ids))


def _padded(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    """Rows of ids as one tensor, padded at the right."""
    tensors = [torch.tensor(list(row), dtype=torch.long) for row in rows]
    return nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)
