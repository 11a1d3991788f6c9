"""LaVIT as its released programs called it: `build_model` and the classes it gives, around `Lavit`.

    model = build_model("pretrained/LaVIT-7B-v2", model_dtype="bf16", understanding=True).to("cuda")
    model.generate({"image": "cat.jpg"})                               # ["a cat sitting on a table"]
    model = build_model("pretrained/LaVIT-7B-v2", understanding=False)
    model.generate_image("a red apple", width=1024, height=1024)[0].save("apple.png")

Names, arguments and defaults are the released ones; like there, everything random comes from torch's global generators.
Different: `.to(…)` is not needed, no autocast has to be put around calls, and `top_p` and `top_k` hold wherever words
are drawn. `image_size` and `use_xformers` have no effect. `load_tokenizer=False` leaves the tokenizer on the CPU.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from seed_multimodal.device import DTYPES, choose_device
from seed_multimodal.errors import ConfigError, RequestError
from seed_multimodal.images.transforms import ImageTransform, normalise, seed_image_processor
from seed_multimodal.language.lavit import QUESTION, QuestionProcessor, several
from seed_multimodal.language.lavit_generation import CodeSettings
from seed_multimodal.language.padding import padded_left
from seed_multimodal.lavit.decoder import Conditions
from seed_multimodal.system.config import SystemConfig
from seed_multimodal.systems.lavit import Lavit
from seed_multimodal.systems.lavit_parts import GENERATION, UNDERSTANDING, load_pictures
from seed_multimodal.systems.lavit_pictures import LavitPictures

LLM = "language_model"
HERE = ("", ".", "./")  # the default of `model_path`
LaVITQuestionProcessor = QuestionProcessor


def LaVITImageProcessor(image_size: int = 224) -> ImageTransform:  # noqa: N802 (the released name)
    """A PIL picture → normalised pixels `[3, S, S]`: squashed, bicubic."""
    return seed_image_processor(image_size)


def build_model(
    model_path: str | Path = "./", model_dtype: str = "bf16", device_id: int | None = None, image_size: int = 224,
    use_xformers: bool = False, understanding: bool = True, load_tokenizer: bool = True,
    pixel_decoding: str = "highres", check_safety: bool = True, local_files_only: bool = False,
    model_sub_dir: str = LLM,
) -> LaVITforUnderstanding | LaVITforGeneration:
    """A model for understanding, or for generation.

    Args:
        model_path: a released folder, one with `system.json`, or `nano-lavit`; the default stands for
            `pretrained/LaVIT-7B-v2` where the current folder is none.
        model_dtype: "bf16" or "fp16" ("fp32" is ours).
        device_id: number of the CUDA device; None: that of the process, or the CPU.
        understanding: which of the two; they see and draw with different weights.
        load_tokenizer: False: pictures are seldom read, so the tokenizer stays on the CPU.
        pixel_decoding: "lowres", or anything else for highres, as released.
        check_safety: drawings that the safety checker flags become black.
        local_files_only: without effect: HF_HUB_OFFLINE decides about downloads.
        model_sub_dir: the language model's folder.

    Raises:
        CheckpointError: weights that are missing or damaged: one sentence, with what to put where.
    """
    if understanding:
        return LaVITforUnderstanding(model_path, model_dtype, device_id=device_id, model_sub_dir=model_sub_dir,
                                     local_files_only=local_files_only)
    return LaVITforGeneration(model_path, model_dtype, check_safety=check_safety, load_tokenizer=load_tokenizer,
                              pixel_decoding=pixel_decoding, device_id=device_id, model_sub_dir=model_sub_dir,
                              local_files_only=local_files_only)


class _Model:
    """What all share; `system` is the `Lavit` inside, None for a model of pictures alone."""

    system: Any = None
    pictures: LavitPictures

    def to(self, device: str | torch.device) -> Self:
        """Move everything; returns self."""
        if self.system is not None:
            self.system.llm.to(device)
        self.pictures.to(torch.device(device))
        return self

    def eval(self) -> Self:
        """It always is; returns self."""
        return self

    @property
    def device(self) -> torch.device:
        """Where pictures are read and drawn."""
        return self.pictures.device

    def ratio_size(self, ratio: str) -> tuple[int, int]:
        """Height and width of a ratio (1:1, 4:3, 3:2, 16:9, 2:3, 3:4) in the U-Net's size."""
        height, width = self.pictures.decoder.ratio_size(ratio)
        return height, width


class LaVITforUnderstanding(_Model):
    """Captions and answers; arguments as of `build_model`."""

    def __init__(self, model_path: str | Path = "", model_dtype: str = "bf16", use_xformers: bool = True,
                 device_id: int | None = None, model_sub_dir: str = LLM, local_files_only: bool = False) -> None:
        self.system = Lavit.from_pretrained(
            original_spec(model_path, model_sub_dir), device=original_device(device_id),
            dtype=original_dtype(model_dtype), modes=(UNDERSTANDING,), log=None)
        self.pictures = self.system.pictures

    def generate(
        self, samples: Mapping[str, Any], use_nucleus_sampling: bool = False, num_beams: int = 2, max_length: int = 36,
        min_length: int = 8, top_p: float = 1.0, top_k: int = 50, repetition_penalty: float = 1,
        length_penalty: float = 1, num_captions: int = 1, temperature: float = 1,
    ) -> list[str]:
        """Captions of `samples["image"]` (a file, a list of files, or pixels `[B, 3, S, S]`), behind which
        `samples["prompt"]` (a text, or one each) is put; `num_captions` of each picture, one after the other."""
        captions: list[str] = self.system.describe_all(
            _images(samples), samples.get("prompt"), seed=None, do_sample=use_nucleus_sampling, num_beams=num_beams,
            max_new_tokens=max_length, min_new_tokens=min_length, top_p=top_p, top_k=top_k, number=num_captions,
            repetition_penalty=repetition_penalty, length_penalty=length_penalty, temperature=temperature)
        return captions

    def predict_answers(
        self, samples: Mapping[str, Any], use_nucleus_sampling: bool = False, num_beams: int = 5, max_len: int = 10,
        min_len: int = 2, prompt: str = QUESTION, temperature: float = 1, top_p: float = 1.0, top_k: int = 50,
        length_penalty: float = 0,
    ) -> list[str]:
        """Answers to `samples["text_input"]` (a text, or one each) about `samples["image"]`; without a `prompt` the
        texts are asked as they are."""
        if "text_input" not in samples:
            raise RequestError("samples['text_input'] is missing: the question, or one for each picture.")
        answers: list[str] = self.system.ask_all(
            _images(samples), samples["text_input"], short=bool(prompt), prompt=prompt or QUESTION, seed=None,
            do_sample=use_nucleus_sampling, num_beams=num_beams, max_new_tokens=max_len, min_new_tokens=min_len,
            temperature=temperature, top_p=top_p, top_k=top_k, length_penalty=length_penalty)
        return answers


class LaVITforGeneration(_Model):
    """Drawings of words, and of pictures and words; arguments as of `build_model`."""

    def __init__(
        self, model_path: str | Path = "", model_dtype: str = "bf16", use_xformers: bool = True,
        check_safety: bool = False, load_tokenizer: bool = False, pixel_decoding: str = "highres",
        device_id: int | None = None, model_sub_dir: str = LLM, local_files_only: bool = False,
    ) -> None:
        spec = original_spec(model_path, model_sub_dir, _head(pixel_decoding))
        self.system = Lavit.from_pretrained(
            spec, device=original_device(device_id), dtype=original_dtype(model_dtype), modes=(GENERATION,),
            check_safety=check_safety, offload=() if load_tokenizer else ("encoder",), log=None)
        self.pictures = self.system.pictures

    def generate_image(
        self, prompts: Any, width: int = 512, height: int = 512, original_size: Sequence[int] | None = None,
        crops_coords_top_left: Sequence[int] | None = None, use_nucleus_sampling: bool = True, top_p: float = 1.0,
        top_k: int = 50, num_beams: int = 1, temperature: float = 1, num_return_images: int = 1,
        length_penalty: float = 1, max_length: int = 200, min_length: int = 20, num_inference_steps: int = 25,
        guidance_scale_for_llm: float = 4.0, guidance_scale_for_decoder: float = 7.0, uncond_input_ids: Any = None,
        is_token_prompt: bool = False, legacy_max_length: bool = False,
    ) -> list[Image.Image]:
        """Pictures of texts, `num_return_images` of each.

        Args:
            prompts: a text or several; with `is_token_prompt` rows of ids.
            uncond_input_ids: what the language model is steered away from, ids `[B, L]` with the picture's start at the
                end; None: that start alone.
            legacy_max_length: prompts of ids limit the picture to their own length, as released.

        Raises:
            GenerationError: a picture without codes.
        """
        decode = {"height": height, "width": width, "num_inference_steps": num_inference_steps,
                  "guidance_scale": guidance_scale_for_decoder, "original_size": original_size,
                  "crops_coords_top_left": crops_coords_top_left or (0, 0)}
        self.system.spec.require("decoder", "pixels")
        self.pictures.check_drawing(**decode)
        ids = self.generate_image_tokenids(
            prompts, use_nucleus_sampling, top_p, top_k, num_beams, temperature, num_return_images, length_penalty,
            max_length, min_length, guidance_scale_for_llm, uncond_input_ids, is_token_prompt, legacy_max_length)
        return self.pictures.draw(self._codes(ids), seed=None, **decode)

    def multimodal_synthesis(self, prompts: Sequence[tuple[Any, str]], *, guidance_scale_for_llm: float = 5.0,
                             **options: Any) -> list[Image.Image]:
        """A picture of pictures and texts in their order.

        Args:
            prompts: pairs (file or picture, "image") and (words, "text").
            options: of `generate_image`.
        """
        ids: list[int] = []
        for pair in several(prompts, "What is drawn together"):
            if not isinstance(pair, (tuple, list)) or len(pair) != 2 or pair[1] not in ("image", "text"):
                raise RequestError(f"A part of the prompt is (file, 'image') or (words, 'text'), not {pair!r:.80}.")
            words = self.system.tokenizer
            ids += words.text_ids(pair[0]) if pair[1] == "text" else words.drawing_ids(
                [self.pictures.codes_of(pair[0], None)])
        options |= {"guidance_scale_for_llm": guidance_scale_for_llm, "is_token_prompt": True}
        return self.generate_image([ids], **options)

    def generate_image_tokenids(
        self, prompts: Any, use_nucleus_sampling: bool = True, top_p: float = 0.9, top_k: int = 50, num_beams: int = 1,
        temperature: float = 1, num_return_images: int = 1, length_penalty: float = 1, max_length: int = 200,
        min_length: int = 20, guidance_scale: float = 3.0, uncond_input_ids: Any = None, is_token_prompt: bool = False,
        legacy_max_length: bool = False,
    ) -> Tensor:
        """The ids that the language model writes to each prompt, `[R, L]`, padded on the left with 2."""
        settings = CodeSettings(
            do_sample=use_nucleus_sampling, top_p=top_p, top_k=top_k, num_beams=num_beams, temperature=temperature,
            number=num_return_images, length_penalty=length_penalty, max_new_tokens=max_length,
            min_new_tokens=min_length, guidance=guidance_scale, legacy_max_length=legacy_max_length and is_token_prompt)
        words = self.system.tokenizer
        rows = prompts if is_token_prompt else [
            words.text_ids(one) for one in ([prompts] if isinstance(prompts, str) else several(prompts, "The prompts"))]
        written = self.system.language.write_ids(rows, settings, None, uncond_input_ids)
        return padded_left([one.ids for one in written], words.pad_id)[0]

    def generate_image_embeds(self, image_tokens: Any) -> Conditions:
        """What the pixel decoder is told of pictures, from rows of ids `[R, L]`."""
        drawer = self.pictures.decoder
        conditions: Conditions = drawer.decoder(self.pictures.rows_of(self._codes(image_tokens)))
        return conditions

    def _codes(self, ids: Any) -> list[Tensor]:
        """Ids that are no codes are left out; `CodesError` for a row without any."""
        words = self.system.tokenizer.vocabulary
        rows = ids[None] if isinstance(ids, Tensor) and ids.ndim == 1 else ids
        return self.pictures.check_codes([words.codes_of(row)[:words.tokens_per_image] for row in rows])


class LaVITDetokenizer(_Model):
    """Pictures drawn again from their codes, without a language model."""

    def __init__(self, model_path: str | Path = "", model_dtype: str = "bf16", use_xformers: bool = True,
                 pixel_decoding: str = "highres", device_id: int | None = None, local_files_only: bool = False) -> None:
        spec = original_spec(model_path, head=_head(pixel_decoding))
        runtime = choose_device(original_device(device_id), original_dtype(model_dtype), None)
        self.pictures = load_pictures(spec, runtime, runtime, (GENERATION,))

    def reconstruct_from_token(
        self, x: Tensor, width: int = 1024, height: int = 1024, original_size: Sequence[int] | None = None,
        num_inference_steps: int = 50, guidance_scale: float = 5.0,
    ) -> list[Image.Image]:
        """Pictures in 0…1 `[B, 3, h, w]` of any size, drawn again."""
        if not isinstance(x, Tensor) or x.ndim != 4 or x.shape[1] != 3 or not x.is_floating_point() or (
                0 in x.shape[2:] or bool(((x < -0.25) | (x > 1.25)).any())):  # resizing may leave 0…1 a little
            raise RequestError("reconstruct_from_token takes pictures in 0…1 as a floating tensor [B, 3, h, w].")
        writer = self.pictures.writer
        assert writer is not None
        size = writer.config.vit.image_size
        pixels = F.interpolate(x.float(), (size, size), mode="bicubic", antialias=False)
        codes = self.pictures.tokenize(normalise(pixels.cpu() * 255), seed=None)
        return self.pictures.draw(codes, seed=None, width=width, height=height, original_size=original_size,
                                  num_inference_steps=num_inference_steps, guidance_scale=guidance_scale)


def original_spec(model_path: str | Path, model_sub_dir: str = LLM, head: str | None = None) -> SystemConfig:
    """The parts at a path; the default path stands for the released folder below `pretrained/`.

    Args:
        head: of a released folder; one with `system.json` has its own.
    """
    place = Path(model_path)
    usual = str(model_path) in HERE and not any((place / one).exists() for one in ("visual_tokenizer", "system.json"))
    name: str | Path = "lavit" if usual else model_path
    spec = SystemConfig.find(name, system="lavit")
    spec = SystemConfig.find(name, head=head) if spec.original else spec
    if model_sub_dir != LLM and spec.llm is not None:
        spec.llm = spec.llm.parent / model_sub_dir
    return spec


def _images(samples: Mapping[str, Any]) -> list[Any]:
    if "image" not in samples:
        raise RequestError("samples['image'] is missing: a file, a list of files, or pixels [B, 3, S, S].")
    image = samples["image"]
    return list(image) if isinstance(image, (list, tuple, Tensor)) else [image]


def _head(pixel_decoding: str) -> str:
    return "lowres" if pixel_decoding == "lowres" else "highres"


def original_dtype(name: str) -> torch.dtype:
    """`model_dtype`; raises `ConfigError` for another name."""
    if name not in DTYPES:
        raise ConfigError(f"model_dtype {name!r}: use bf16 or fp16 (or fp32).")
    return DTYPES[name]


def original_device(device_id: int | None) -> str:
    """`device_id`; None: the process's own, or "auto" without CUDA."""
    if device_id is None and not torch.cuda.is_available():
        return "auto"
    number = int(os.environ.get("LOCAL_RANK", "0")) if device_id is None else device_id
    return f"cuda:{number % max(torch.cuda.device_count(), 1) if device_id is None else number}"
