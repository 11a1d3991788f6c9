"""LaVIT's original interface: `build_model` and the classes it returns.

    model = build_model("pretrained/LaVIT-7B-v2", model_dtype="bf16", understanding=True)
    model.generate({"image": "cat.jpg"})                           # ["a cat sitting on a table"]
    model = build_model("pretrained/LaVIT-7B-v2", understanding=False)
    model.generate_image("a red apple", width=1024, height=1024)[0].save("apple.png")

Names, arguments and defaults are the original ones; randomness comes from torch's global
generators. `.to(…)`, `.half()` and an autocast around calls are not needed and have no effect; nor
have `image_size`, `img_size`, `apply_lemmatizer` (answers always are lemmatised, as in the
original), `use_xformers`, `local_files_only` and `is_token_prompt` (rows of ids are recognised);
`load_tokenizer=False` leaves the tokenizer on the CPU.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NotRequired, Self, TypedDict

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from seed_multimodal.config import read_table
from seed_multimodal.errors import SeedWarning
from seed_multimodal.images.io import ImageSource
from seed_multimodal.images.transforms import seed_image_processor
from seed_multimodal.inference.prompt import GenerationSettings, Prompt
from seed_multimodal.language.messages import input_images, user_message
from seed_multimodal.models.lavit.decoder import DecodedCodes
from seed_multimodal.models.lavit.modeling import DynamicTokenizer
from seed_multimodal.models.lavit.pipeline import LavitFamily, LavitImageCodec
from seed_multimodal.models.lavit.processing import QUESTION, LavitTokenizer, QuestionProcessor
from seed_multimodal.models.lavit.spec import LavitConfig
from seed_multimodal.pipelines.base import MultimodalSystem
from seed_multimodal.pipelines.config import system_names
from seed_multimodal.pipelines.images import open_images
from seed_multimodal.pipelines.tasks import TaskKind
from seed_multimodal.weights.catalogue import catalogue
from seed_multimodal.weights.find import download_part, is_hub_name, locate

if TYPE_CHECKING:
    from transformers import LlamaTokenizer

LLM = "language_model"
CURRENT_FOLDER = ("", ".", "./")  # the default of `model_path`
SETTING_NAMES: dict[str, str] = read_table(__file__)
ImagesOrPixels = ImageSource | Sequence[ImageSource] | Tensor  # files, or pixels [B, 3, S, S]
Texts = str | Sequence[str]  # one for all images, or one each
TextPrompts = Texts | Sequence[Sequence[int]]  # texts, or rows of ids
LaVITQuestionProcessor = QuestionProcessor
# By a size S: a PIL image → normalised pixels `[3, S, S]`.
LaVITImageProcessor = seed_image_processor


class Samples(TypedDict):
    """Input of the model for understanding.

    prompt: a text behind each image. text_input: questions about the images.
    """

    image: ImagesOrPixels
    prompt: NotRequired[Texts]
    text_input: NotRequired[Texts]


def build_model(
    model_path: str | Path = "./",
    model_dtype: str = "bf16",
    device_id: int | None = None,
    image_size: int = 224,
    use_xformers: bool = False,
    understanding: bool = True,
    load_tokenizer: bool = True,
    pixel_decoding: str = "highres",
    check_safety: bool = True,
    local_files_only: bool = False,
    model_sub_dir: str = LLM,
) -> LaVITforUnderstanding | LaVITforGeneration:
    """A model for understanding, or for generation.

    Args:
        model_path: an original folder, one with `system.json`, or `nano-lavit`; the default stands
            for `pretrained/LaVIT-7B-v2` where the current folder is none.
        model_sub_dir: the language model's folder.
        model_dtype: "bf16", "fp16" or "fp32".
        device_id: number of the CUDA device; None: that of the process, or CPU.
        pixel_decoding: "lowres", or anything else for highres.
        check_safety: flagged drawings become black.

    Raises:
        CheckpointError: missing or damaged weights.
    """
    if understanding:
        return LaVITforUnderstanding(
            image_size, model_path, model_dtype, device_id, model_sub_dir=model_sub_dir
        )
    return LaVITforGeneration(
        model_path,
        model_dtype,
        check_safety=check_safety,
        load_tokenizer=load_tokenizer,
        pixel_decoding=pixel_decoding,
        device_id=device_id,
        model_sub_dir=model_sub_dir,
    )


class _Model(nn.Module):
    """Base of the models.

    The networks are sub-modules under the original's names, and stay on the device and in the
    precision that they were loaded with.
    """

    images: LavitImageCodec
    system: MultimodalSystem
    visual_tokenizer: DynamicTokenizer | None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Called by `.to`, `.cuda`, `.half` …: no effect, `device_id` and `model_dtype` decide."""
        return self

    @property
    def device(self) -> torch.device:
        """The device of the first network."""
        return next(self.parameters()).device

    @functools.cached_property
    def llama_tokenizer(self) -> LlamaTokenizer:
        """transformers' tokenizer of the language model, as the original sets it up."""
        from transformers import LlamaTokenizer

        folder = self.system.config.words or self.system.config.llm
        return LlamaTokenizer.from_pretrained(
            str(folder), local_files_only=True, padding_side="left", pad_token="</s>"
        )  # noqa: S106  (no password)

    def ratio_size(self, ratio: str) -> tuple[int, int]:
        """Height and width of a ratio (1:1, 4:3, 3:2, 16:9, 2:3, 3:4) in the U-Net's size."""
        height, width = self.images.decoder.ratio_size(ratio)
        return height, width

    def _load(self, config: LavitConfig, device_id: int | None, dtype: str, **options: Any) -> None:
        """Load the language model and the image tokenizer; options of `from_pretrained`."""
        self.system = MultimodalSystem.from_pretrained(
            config, device=original_device(device_id), dtype=dtype, log=None, **options
        )
        self.images = self.system.family.images
        self.llama_model = self.system.llm

    def _add_decoder(self) -> None:
        """Load the pixel decoder now, as the original; it draws from codes."""
        self.visual_tokenizer = self.images.code_tokenizer
        decoder = self.images.decoder
        self.tokenizer_decoder = decoder.decoder
        self.unet = decoder.unet
        self.vae = decoder.vae

    def _draw(self, codes: Sequence[Tensor], **options: Any) -> list[Image.Image]:
        return self.images.draw(codes, seeds=_seeds(len(codes)), **options)

    def _settings(self, task: TaskKind, options: Mapping[str, object]) -> GenerationSettings:
        """Settings of a task, by the original's names or ours."""
        values = dict(LavitFamily.defaults[task])
        for name, value in options.items():
            values[SETTING_NAMES.get(name, name)] = value
        # The system allows one answer for each prompt, the engine any number.
        n_answers = values.pop("num_return_sequences", 1)
        values["seed"] = _seeds(1)[0]
        settings = self.system.settings(task, **values)
        images = "forced" if task == "draw" else "auto"
        return replace(settings, num_return_sequences=n_answers, images=images)


class LaVITforUnderstanding(_Model):
    """Captions and answers; arguments as of `build_model`."""

    def __init__(
        self,
        img_size: int = 224,
        model_path: str | Path = "",
        model_dtype: str = "bf16",
        device_id: int | None = None,
        apply_lemmatizer: bool = True,
        use_xformers: bool = False,
        model_sub_dir: str = LLM,
        local_files_only: bool = False,
    ) -> None:
        super().__init__()
        config = original_config(model_path, model_sub_dir)
        self._load(config, device_id, model_dtype, load_decoder=False)
        self.visual_tokenizer = self.images.understanding_tokenizer

    def generate(self, samples: Samples, **options: object) -> list[str]:
        """Captions of images.

        samples: "image" is a file, a list of files, or pixels `[B, 3, S, S]`; the optional "prompt"
            is a text, or one each, behind the image.
        options: `use_nucleus_sampling`, `num_beams`, `max_length`, `min_length`, `top_p`, `top_k`,
            `repetition_penalty`, `length_penalty`, `temperature`; `num_captions` of each image.
        """
        return self._texts(samples["image"], samples.get("prompt") or "", "describe", options)

    def predict_answers(
        self, samples: Samples, *, prompt: str = QUESTION, **options: object
    ) -> list[str]:
        """Answers to questions about images.

        samples: "image" as of `generate`; "text_input" is a question, or one each.
        prompt: template of the questions; "": they are the complete prompts.
        options: as of `generate`, with `max_len` and `min_len`; others are ignored with a warning
            (the original ignored them silently).
        """
        names = {*SETTING_NAMES, *(field.name for field in fields(GenerationSettings))}
        unknown = sorted(options.keys() - names)
        if unknown:
            warnings.warn(
                f"predict_answers: ignored unknown arguments: {', '.join(unknown)}.", SeedWarning, 2
            )
            options = {name: value for name, value in options.items() if name not in unknown}
        texts = _as_list(samples["text_input"])
        if prompt:
            texts = [prompt.format(text) for text in texts]
        return self._texts(samples["image"], texts, "ask", options)

    def _texts(
        self, image: ImagesOrPixels, texts: Texts, task: TaskKind, options: Mapping[str, object]
    ) -> list[str]:
        # 1. A conversation for each image: the image, and a text if there is one.
        if isinstance(image, Tensor):
            preprocessing = self.images.transform
            images = [preprocessing.uncropped(preprocessing.to_image(pixels)) for pixels in image]
        else:
            images = input_images(image)
        texts = _as_list(texts)
        if len(texts) == 1:
            texts = texts * len(images)
        conversations = []
        for single_image, text in zip(images, texts, strict=True):
            content = [single_image, text] if text else [single_image]
            conversations.append(user_message(content))

        # 2. Answers, cut at their ends.
        seeds = _seeds(len(images))
        prompts = self.system.family.prompts(conversations, task, seeds=seeds)
        settings = self._settings(task, options)
        rows = [replace(settings, seed=seed) for seed in seeds]
        answers: list[str] = []
        for ids in self.system.engine.generate(prompts, rows):
            answer = self.system.read_answer(ids, settings)
            answers.append(self.system.family.text(answer, task))
        return answers


class LaVITforGeneration(_Model):
    """Images from texts, and from images and texts; arguments as of `build_model`."""

    def __init__(
        self,
        model_path: str | Path = "",
        model_dtype: str = "bf16",
        device_id: int | None = None,
        use_xformers: bool = False,
        check_safety: bool = False,
        load_tokenizer: bool = False,
        pixel_decoding: str = "highres",
        model_sub_dir: str = LLM,
        **ignored: object,
    ) -> None:
        super().__init__()
        config = original_config(model_path, model_sub_dir, pixel_decoding, check_safety)
        offload = () if load_tokenizer else ("encoder",)
        self._load(config, device_id, model_dtype, offload=offload)
        self._add_decoder()

    def generate_image(
        self,
        prompts: TextPrompts,
        width: int = 512,
        height: int = 512,
        *,
        original_size: tuple[int, int] | None = None,
        crops_coords_top_left: tuple[int, int] | None = None,
        num_inference_steps: int = 25,
        guidance_scale_for_llm: float = 4.0,
        guidance_scale_for_decoder: float = 7.0,
        top_p: float = 1.0,
        **options: Any,
    ) -> list[Image.Image]:
        """Images of texts; options: of `generate_image_tokenids`."""
        # 1. The settings of the pixel decoder.
        drawing: dict[str, Any] = {
            "height": height,
            "width": width,
            "num_inference_steps": num_inference_steps,
            "guidance_scale": guidance_scale_for_decoder,
            "original_size": original_size,
            "crops_coords_top_left": crops_coords_top_left,
        }
        # Wrong settings are reported before the language model runs.
        self.images.check_drawing(**drawing)

        # 2. The codes by the language model, and their images.
        token_ids = self.generate_image_tokenids(
            prompts, guidance_scale=guidance_scale_for_llm, top_p=top_p, **options
        )
        return self._draw(self._codes(token_ids), **drawing)

    def multimodal_synthesis(
        self,
        prompts: Sequence[tuple[ImageSource, str]],
        *,
        guidance_scale_for_llm: float = 5.0,
        **options: Any,
    ) -> list[Image.Image]:
        """An image of pairs (file or image, "image") and (words, "text") in order.

        options: of `generate_image`.
        """
        parts = [value if kind == "text" else input_images(value)[0] for value, kind in prompts]
        conversation = user_message(parts)
        prompt = self.system.family.prompts([conversation], "edit", seeds=_seeds(1))[0]
        return self.generate_image(
            [prompt.ids], guidance_scale_for_llm=guidance_scale_for_llm, **options
        )

    def generate_image_tokenids(
        self,
        prompts: TextPrompts,
        *,
        uncond_input_ids: Tensor | None = None,
        is_token_prompt: bool = False,
        guidance_scale: float = 3.0,
        top_p: float = 0.9,
        **options: object,
    ) -> Tensor:
        """The ids that the language model generates for each prompt `[R, L]`, padded on the left.

        Args:
            prompts: a text or several, or rows of ids.
            uncond_input_ids: unconditional prompt for guidance, ids `[B, L]` ending with the image
                start; None: only the image start.
            options: as of `LaVITforUnderstanding.generate`; `num_return_images` of each prompt.
        """
        # 1. Prompts, each with its unconditional one.
        tokenizer = self.system.tokenizer
        assert isinstance(tokenizer, LavitTokenizer)
        rows = [
            tokenizer.text_ids(prompt) if isinstance(prompt, str) else list(prompt)
            for prompt in ([prompts] if isinstance(prompts, str) else prompts)
        ]
        negatives = [None] * len(rows) if uncond_input_ids is None else list(uncond_input_ids)
        all_prompts = [
            Prompt(row, negative=negative) for row, negative in zip(rows, negatives, strict=True)
        ]

        # 2. Their answers, without the forced start, padded on the left.
        seeds = _seeds(len(rows))
        options = {"guidance_scale": guidance_scale, "top_p": top_p, **options}
        settings = self._settings("draw", options)
        answers = self.system.engine.generate(
            all_prompts, [replace(settings, seed=seed) for seed in seeds]
        )
        answers = [ids[1:] for ids in answers]
        longest = max(map(len, answers))
        padded = [[tokenizer.pad_token_id] * (longest - len(ids)) + ids for ids in answers]
        return torch.tensor(padded)

    def generate_image_embeds(self, image_tokens: Tensor) -> DecodedCodes:
        """Input of the pixel decoder, from rows of ids `[R, L]`."""
        tokenizer = self.images.code_tokenizer
        device = self.images.device
        with self.images.encoding():  # `load_tokenizer=False` keeps the codebook on the CPU
            codes = [row.to(device) for row in self._codes(image_tokens)]
            embedded = [tokenizer.embed_codes(row) for row in codes]
        return self.images.decoder.decoder(embedded)

    def pixel_decoding_origin(
        self,
        image_tokens: Tensor,
        width: int = 512,
        height: int = 512,
        num_inference_steps: int = 50,
        guidance_scale_for_decoder: float = 5.0,
    ) -> list[Image.Image]:
        """Images of rows of ids, by the loaded pixel decoder (in the original by "lowres")."""
        return self._draw(
            self._codes(image_tokens),
            width=width,
            height=height,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale_for_decoder,
        )

    def _codes(self, ids: Tensor) -> list[Tensor]:
        """The codes of an image in each row of ids `[R, L]`."""
        vocabulary = self.system.tokenizer.vocabulary
        rows: list[Tensor] = []
        for row in ids.tolist():
            codes = vocabulary.first_codes(row)[: vocabulary.tokens_per_image]
            rows += self.images.check_codes([torch.tensor(codes)])
        return rows


class LaVITDetokenizer(_Model):
    """Reconstruction of images from their codes, without a language model."""

    def __init__(
        self,
        model_path: str | Path = "",
        model_dtype: str = "bf16",
        use_xformers: bool = True,
        pixel_decoding: str = "highres",
        device_id: int | None = None,
        **ignored: object,
    ) -> None:
        super().__init__()
        config = original_config(model_path, head=pixel_decoding, check_safety=False)
        self.images = open_images(config, device=original_device(device_id), dtype=model_dtype)
        self._add_decoder()

    def reconstruct_from_token(
        self,
        x: Tensor,
        width: int = 1024,
        height: int = 1024,
        original_size: tuple[int, int] | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 5.0,
    ) -> list[Image.Image]:
        """Images in 0…1 `[B, 3, h, w]` of any size, drawn again."""
        # 1. The images squashed to the vision encoder's size, as codes.
        preprocessing = self.images.transform
        size = preprocessing.image_size
        resized = F.interpolate(x.float(), (size, size), mode="bicubic", antialias=False)
        pixels = preprocessing.normalise(resized.cpu() * 255)
        codes = self.images.code_tokenizer.encode(pixels.to(self.images.device))

        # 2. Images of the codes.
        return self._draw(
            codes,
            width=width,
            height=height,
            original_size=original_size,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
        )


def original_config(
    model_path: str | Path,
    model_sub_dir: str = LLM,
    head: str | None = None,
    check_safety: bool = True,
) -> LavitConfig:
    """The parts at a path.

    model_path: the default is `pretrained/LaVIT-7B-v2` where the current folder is no model.
    head: of an original folder; None: highres.
    """
    # 1. The model: one in a folder, or the original one by its name.
    folder = Path(model_path)
    is_model = (folder / "visual_tokenizer").exists() or (folder / "system.json").exists()
    name = model_path
    if str(model_path) in CURRENT_FOLDER and not is_model:
        name = "lavit"
    elif not (locate(folder) or is_hub_name(model_path) or str(model_path) in system_names()):
        # As the original, which downloads its weights to a path that does not exist.
        download_part(replace(catalogue().parts["lavit"], folder=str(folder)))
    config = LavitConfig.find(name)
    if config.found.original and head is not None:
        config.override(head="lowres" if head == "lowres" else "highres")

    # 2. Its language model and safety checker.
    if model_sub_dir != LLM and config.llm is not None:
        config.llm = config.llm.parent / model_sub_dir
    # Without a folder of the checker no image is checked.
    config.safety = config.safety if check_safety else None
    return config


def original_device(device_id: int | None) -> str:
    """The CUDA device `device_id`; None: that of the process, or "auto" without CUDA."""
    if device_id is None:
        if not torch.cuda.is_available():
            return "auto"
        device_id = int(os.environ.get("LOCAL_RANK", "0"))
    return f"cuda:{device_id}"


def _as_list(texts: Texts) -> list[str]:
    return [texts] if isinstance(texts, str) else list(texts)


def _seeds(count: int) -> list[int]:
    """Seeds of torch's global generator."""
    return torch.randint(2**63 - 1, (count,)).tolist()
