"""SEED-LLaMA as one object: it describes, answers, draws, edits and chats with pictures in both directions.

    pictures ─► PictureCodec.tokenize ─► codes ─► prompt ids ─► LLaMA ─► answer ids ─► texts and codes ─► pictures

    seed = SeedLlama.from_pretrained("pretrained/nano")
    print(seed.describe("cat.png"))
    seed.draw("a blue fish").save("fish.png")

`describe`, `ask` and `chat` are those of all systems (`talking`). Only the choice of the device and words and
pictures unlike those of the training go to `log`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, overload

import torch
from PIL import Image
from torch import Tensor

from seed_multimodal.device import BESIDE_8BIT, choose_device, choose_for_pictures
from seed_multimodal.errors import CheckpointError
from seed_multimodal.language.answer import ImagePart
from seed_multimodal.language.generation import GenerationSettings, generate_ids
from seed_multimodal.language.llama import load_llm
from seed_multimodal.language.prompts import get_template
from seed_multimodal.language.tokenizer import MultimodalTokenizer
from seed_multimodal.system.config import SystemConfig
from seed_multimodal.systems.batch import BATCH, Written, written_images
from seed_multimodal.systems.chat import Content, as_text, to_turns
from seed_multimodal.systems.picture_half import Picture
from seed_multimodal.systems.pictures import PictureCodec, is_picture, load_codec
from seed_multimodal.systems.speaker import Speaker
from seed_multimodal.systems.talking import Log, Painted, Request, TalkingSystem

DECODE_KEYS = ("num_inference_steps", "guidance_scale", "noise_level", "scheduler", "negative_codes")


class SeedLlama(TalkingSystem):
    """A loaded system; make one with `from_pretrained`.

    Every method takes generation settings (`GenerationSettings`: `max_new_tokens`, `temperature`, `top_p`, `top_k`,
    `num_beams`, `do_sample`, `seed`, `constrain`) and de-tokenizer settings (`num_inference_steps`, `guidance_scale`,
    `noise_level`, `scheduler`) as keywords; defaults are the system's own in `system.json`.
    """

    decode_keys = DECODE_KEYS

    def __init__(self, spec: SystemConfig, tokenizer: MultimodalTokenizer, llm: Any, pictures: PictureCodec,
                 log: Log = None) -> None:
        self.spec, self.tasks, self.log = spec, spec.tasks, log
        self.tokenizer, self.llm, self.pictures = tokenizer, llm, pictures
        self.template = get_template(spec.template)
        self.speaker = Speaker(llm, tokenizer, self.template.turn_marker)
        if llm.config.vocab_size != tokenizer.vocabulary.size:
            raise CheckpointError(f"{spec.name}: the language model has {llm.config.vocab_size} words, but the "
                                  f"tokenizer has {tokenizer.vocabulary.size}; they do not belong together.")
        self.settings()  # wrong defaults in system.json are reported now, not at the first question

    @classmethod
    def from_pretrained(
        cls, name: str | Path | SystemConfig | None = None, *, llm: str | Path | None = None,
        tokenizer: str | Path | None = None, detokenizer: str | Path | None = None, vision: str | Path | None = None,
        template: str | None = None, device: str = "auto", dtype: Any = "auto", quantization: str | None = None,
        image_device: str | None = None, load_decoder: bool = True, offload_encoder: bool = False,
        offload_decoder: bool = False, log: Log = print,
    ) -> SeedLlama:
        """Load a system; its de-tokenizer is loaded when the first picture is drawn.

        Args:
            name: `nano`, `8b`, `14b`, a folder with `system.json` or of a LLaMA, or a config.
            llm, tokenizer, detokenizer, vision, template: single parts, see `SystemConfig.find`.
            device, dtype: see `choose_device`; the choice goes to `log`. On CUDA `auto` is float16 for pictures and
                beside 8-bit weights, bfloat16 for other language models.
            quantization: "8bit" or "4bit" for the language model, on CUDA devices and CPUs.
            image_device: where pictures are read and drawn, if not on `device`.
            load_decoder: False: a system that never draws.
            offload_encoder, offload_decoder: keep that part on the CPU while it is not in use.

        Raises:
            CheckpointError: a part that is missing or damaged: one sentence, with what to put where.
        """
        spec = name if isinstance(name, SystemConfig) else SystemConfig.find(
            name, system="seed_llama", llm=llm, tokenizer=tokenizer, detokenizer=detokenizer, vision=vision,
            template=template)
        spec.require("llm", "tokenizer")
        assert spec.llm is not None and spec.tokenizer is not None
        runtime = choose_device(device, dtype, log=log, fp16=BESIDE_8BIT if quantization == "8bit" else "")
        here = choose_for_pictures(runtime.device if image_device is None else image_device, dtype, runtime, log)
        words = MultimodalTokenizer.from_pretrained(spec.tokenizer)
        model = load_llm(spec.llm, device=runtime.device, dtype=runtime.dtype, quantization=quantization,
                         vocabulary=words.vocabulary)
        pictures = load_codec(spec, words.vocabulary, device=here.device, dtype=here.dtype, load_decoder=load_decoder)
        pictures.offload(encoder=offload_encoder, decoder=offload_decoder)
        return cls(spec, words, model, pictures, log)

    # ---- pictures ⇄ codes

    def transform(self, image: Image.Image) -> Tensor:
        """A PIL picture -> normalised pixels [3, S, S]."""
        return self.pictures.transform(image)

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """Normalised pixels [B, 3, S, S] -> codes [B, 32] int64."""
        return self.pictures.encode(pixels)

    def tokenize(self, images: Picture | Sequence[Picture]) -> Tensor:
        """One picture or several (PIL, path, bytes) -> codes [B, 32] int64."""
        several = list(images) if isinstance(images, (list, tuple)) else [images]
        self._remark(self.pictures.note(several))
        return self.pictures.tokenize(several)

    def encode_all(self, images: Sequence[Picture], *, batch_size: int = BATCH) -> Tensor:
        """Many images -> codes [N, 32] int64."""
        return torch.cat([self.pictures.tokenize(images[start:start + batch_size])
                          for start in range(0, max(len(images), 1), batch_size)])

    def reconstruct(self, images_or_codes: Any, seed: int = 0, *, codes: Any = None,
                    **decode: Any) -> list[Image.Image]:
        """Pictures, or their codes ([B, 32] or the 32 of one), drawn again; `decode` goes to the de-tokenizer.

        Args:
            codes: progressive drawing, from so many of the 32 codes: one number for all, one each, or several for one
                picture. What released weights make of few codes: see `CodeTokenizer.decode`.
        """
        several = isinstance(images_or_codes, (list, tuple)) and len(images_or_codes) > 0
        first = images_or_codes[0] if several else images_or_codes
        if isinstance(first, str) or is_picture(first):
            images_or_codes = self.tokenize(images_or_codes)
        return self.pictures.draw(images_or_codes, seed=seed, first=codes, **decode)

    # ---- tasks

    @overload
    def draw(self, text: str, seed: int = 0, *, codes: int | None = None, **options: Any) -> Image.Image: ...

    @overload
    def draw(self, text: str, seed: int = 0, *, codes: Sequence[int], **options: Any) -> list[Image.Image]: ...

    def draw(self, text: str, seed: int = 0, *, codes: int | Sequence[int] | None = None, verbatim: bool = False,
             **options: Any) -> Image.Image | list[Image.Image]:
        """A picture of `text`, which is put into the system's drawing request unless `verbatim`.

        Args:
            codes: progressive drawing, see `reconstruct`; several numbers give a list, one picture for each.
        Raises:
            GenerationError: no whole picture.
        """
        request = self.drawing_request(text, verbatim)
        drawn = self._drawn("draw", [request], self.tasks.draw_response, {**options, "seed": seed}, codes,
                            self.tasks.draw_words)
        return drawn if isinstance(codes, list | tuple | range) or getattr(codes, "ndim", None) else drawn[0]

    def edit(self, image: Any, instruction: str, seed: int = 0, **options: Any) -> Image.Image:
        """`image` (a picture or its codes) after `instruction`; raises `GenerationError` as `draw`."""
        content = [*self._shown(image), as_text(instruction, "The instruction")]
        return self._drawn("edit", content, self.tasks.edit_response, {**options, "seed": seed},
                           words=self.tasks.edit_words)[0]

    # ---- building blocks

    def prompt_ids(self, turns: Sequence[Any]) -> list[int]:
        """`<s>` and a conversation (turns of texts and codes) up to where the answer begins."""
        return self.tokenizer.encode_parts(self.template.render(turns), add_bos=True)

    def generate(self, prompt: Sequence[int], settings: GenerationSettings,
                 watch: Callable[[], None] | None = None) -> list[int]:
        """Prompt ids -> the ids of the answer, which ends where the model ends it or begins a user's turn.

        `watch` is called before each token; what it raises ends the generation.
        """
        return self.speaker.answer(prompt, settings, watch=watch)

    def answer_batch(self, contents: Sequence[Content], task: str, settings: GenerationSettings,
                     opening: Sequence[int] = (), seeds: Sequence[int] | None = None) -> list[Written]:
        turns = to_turns(contents, self._known_codes, self.pictures.check_codes)
        prompts = [[*self.prompt_ids([turn]), *opening] for turn in turns]
        with self.speaker.working():
            ids = generate_ids(self.llm, prompts, settings, self.tokenizer, seeds=seeds)
        answers = [self._read_answer(row) for row in ids]
        return [Written(one, [list(part.codes) for part in written_images(one)]) for one in answers]

    def draw_written(self, written: Sequence[Written], seeds: Sequence[int], batch_size: int,
                     decode: dict[str, Any]) -> list[Image.Image]:
        return self.pictures.draw([one.images[0] for one in written], seed=seeds, batch_size=batch_size, **decode)

    # ---- inside

    def to_request(self, contents: Sequence[Content], opening: str = "", task: str = "") -> Request:
        turns = to_turns(contents, self._known_codes, self.pictures.check_codes)
        seen = any(not isinstance(part, str) for turn in turns for part in turn.content)
        return Request(self.prompt_ids(turns), self._paint, seen=seen,
                       note=self.note(contents[-1][1]))

    def _paint(self, parts: Sequence[ImagePart], seed: int | None, decode: dict[str, Any]) -> Painted:
        return list(self.pictures.draw([part.codes for part in parts], seed=seed or 0, **decode))

    def _known_codes(self, images: Sequence[Picture]) -> Tensor:
        """Codes [B, 32] of the pictures of a conversation, each encoded once."""
        return self.pictures.tokenize(images, once=True)

    def _drawn(self, task: str, content: list[Any], opening: str, options: dict[str, Any], first: Any = None,
               words: int = 0) -> list[Image.Image]:
        decode = self._take_decode(options)
        self.pictures.check_counts(first)
        _, part, seed = self._one_picture(task, content, opening, options, decode, words)
        return self.pictures.draw([part.codes], seed=seed, first=first, **decode)
