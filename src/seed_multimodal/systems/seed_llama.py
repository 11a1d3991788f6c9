"""SEED-LLaMA as one object: it describes, answers, draws, edits and chats with pictures in both directions.

    pictures ─► PictureCodec.tokenize ─► codes ─► prompt ids ─► LLaMA ─► answer ids ─► texts and codes ─► pictures

    seed = SeedLlama.from_pretrained("pretrained/nano")
    print(seed.describe("cat.png"))
    seed.draw("a blue fish").save("fish.png")

One instance may be used from several threads; its language model and its picture half each serve one at a time, and
answers are those of calls one after another. Only the choice of the device and words unknown to nano go to `log`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Literal, overload

from PIL import Image
from torch import Tensor

from seed_multimodal.device import BESIDE_8BIT, choose_device, choose_for_pictures
from seed_multimodal.errors import CheckpointError, ConfigError, GenerationError
from seed_multimodal.language.answer import AnswerPart, ImagePart, split_answer
from seed_multimodal.language.generation import GenerationSettings
from seed_multimodal.language.llama import load_llm
from seed_multimodal.language.prompts import get_template
from seed_multimodal.language.tokenizer import MultimodalTokenizer
from seed_multimodal.settings import check_value, nearest, read_settings
from seed_multimodal.systems.chat import Answer, DrawnPart, as_parts, as_text, to_turns, unknown_note
from seed_multimodal.systems.pictures import Picture, PictureCodec, is_picture, load_codec
from seed_multimodal.systems.speaker import Event, Speaker
from seed_multimodal.systems.system_spec import SystemSpec, find_system
from seed_multimodal.tokenizers.encoder import First, several_counts

Log = Callable[[str], None] | None
DECODE_KEYS = ("num_inference_steps", "guidance_scale", "noise_level", "scheduler", "negative_codes")


class SeedLlama:
    """A loaded system; make one with `from_pretrained`.

    Every method takes generation settings (`GenerationSettings`: `max_new_tokens`, `temperature`, `top_p`, `top_k`,
    `num_beams`, `do_sample`, `seed`, `constrain`) and de-tokenizer settings (`num_inference_steps`, `guidance_scale`,
    `noise_level`, `scheduler`) as keywords; defaults are the system's own in `system.json`.
    """

    def __init__(self, spec: SystemSpec, tokenizer: MultimodalTokenizer, llm: Any, pictures: PictureCodec,
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
        cls, name: str | Path | None = None, *, llm: str | Path | None = None, tokenizer: str | Path | None = None,
        detokenizer: str | Path | None = None, vision: str | Path | None = None, template: str | None = None,
        device: str = "auto", dtype: Any = "auto", quantization: str | None = None, image_device: str | None = None,
        load_decoder: bool = True, offload_encoder: bool = False, offload_decoder: bool = False, log: Log = print,
    ) -> SeedLlama:
        """Load a system; its de-tokenizer is loaded when the first picture is drawn.

        Args:
            name: `nano`, `8b`, `14b`, or a folder with `system.json`.
            llm, tokenizer, detokenizer, vision, template: single parts, see `system_spec.find_system`.
            device, dtype: see `choose_device`; the choice goes to `log`. On CUDA `auto` is float16 for pictures and
                beside 8-bit weights, bfloat16 for other language models.
            quantization: "8bit" or "4bit" for the language model, on CUDA devices and CPUs.
            image_device: where pictures are read and drawn, if not on `device`.
            load_decoder: False: a system that never draws.
            offload_encoder, offload_decoder: keep that part on the CPU while it is not in use.

        Raises:
            CheckpointError: a part that is missing or damaged: one sentence, with what to put where.
        """
        spec = find_system(name, llm=llm, tokenizer=tokenizer, detokenizer=detokenizer, vision=vision,
                           template=template)
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
        return self.pictures.tokenize(images)

    def reconstruct(self, images_or_codes: Any, seed: int = 0, *, codes: First = None,
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

    def describe(self, image: Any, prompt: str | None = None, **options: Any) -> str:
        """What `image` shows (a picture, its codes, or several of them); `prompt` replaces the usual request."""
        return self._say([*self._shown(image), self.tasks.describe if prompt is None
                          else as_text(prompt, "The request")], options)

    def ask(self, image: Any, question: str, *, short: bool = True, **options: Any) -> str:
        """The answer to `question` about `image` (or several); `short` adds the one-word-or-phrase suffix."""
        question = as_text(question, "The question")
        return self._say([*self._shown(image), self.tasks.question(question) if short else question], options)

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
        text = as_text(text, "The text to draw")
        request = text if verbatim else self.tasks.draw_request(text)
        drawn = self._one_picture([request], self.tasks.draw_response, {**options, "seed": seed}, codes)
        return drawn if several_counts(codes) else drawn[0]

    def edit(self, image: Any, instruction: str, seed: int = 0, **options: Any) -> Image.Image:
        """`image` (a picture or its codes) after `instruction`; raises `GenerationError` as `draw`."""
        return self._one_picture([*self._shown(image), as_text(instruction, "The instruction")],
                                 self.tasks.edit_response, {**options, "seed": seed}, words=self.tasks.edit_words)[0]

    @overload
    def chat(self, messages: Sequence[Any], stream: Literal[False] = False, **options: Any) -> Answer: ...

    @overload
    def chat(self, messages: Sequence[Any], stream: Literal[True], **options: Any) -> Iterator[Event]: ...

    def chat(
        self, messages: Sequence[Any], stream: bool = False, *, force_image: bool = False,
        previews: Sequence[int] | None = None, **options: Any
    ) -> Answer | Iterator[Event]:
        """Answer the last message of a conversation (see `systems.chat` for the form of messages).

        Args:
            stream: give events (see `systems.speaker`) while the answer is made, instead of the `Answer`.
            force_image: make the model answer with a picture.
            previews: after how many codes a stream shows what there is of a picture; None: as `system.json` says.
        """
        decode = _take(options, DECODE_KEYS)
        settings = self.settings(**options)
        turns = to_turns(messages, self._known_codes, self.pictures.check_codes)
        prompt, note, opening = self.prompt_ids(turns), unknown_note(self.spec.world, turns[-1].content), ""
        if force_image:
            seen = any(not isinstance(part, str) for turn in turns for part in turn.content)
            opening = self.tasks.edit_response if seen else self.tasks.draw_response
            settings = self._forced(settings, options)
        if stream:
            due = check_value(Sequence[int], self.spec.previews if previews is None else previews, "previews", least=1)
            events = self.speaker.events(prompt, settings, opening, due if self.pictures.can_draw else ())
            return self._stream(events, settings.seed, decode, note)
        return replace(self._finish(self.speaker.answer(prompt, settings, opening), settings.seed, decode), note=note)

    # ---- building blocks

    def settings(self, **options: Any) -> GenerationSettings:
        """The system's defaults with `options` over them.

        A given temperature, top_p or top_k switches drawing of tokens on, unless `do_sample` is given too.

        Raises:
            ConfigError: an unknown option (names the nearest) or a value out of range.
        """
        merged = {"max_new_tokens": 256, "do_sample": False, **self.spec.generation, **options}
        known = [field.name for field in fields(GenerationSettings)]
        for name in merged:
            if name not in known:
                raise ConfigError(f"Unknown option {name!r}{nearest(name, [*known, *DECODE_KEYS])}.")
        if "do_sample" not in options and any(key in options for key in ("temperature", "top_p", "top_k")):
            merged["do_sample"] = True
        return read_settings(GenerationSettings, merged, "Generation setting")

    def prompt_ids(self, turns: Sequence[Any]) -> list[int]:
        """`<s>` and a conversation (turns of texts and codes) up to where the answer begins."""
        return self.tokenizer.encode_parts(self.template.render(turns), add_bos=True)

    def generate(self, prompt: Sequence[int], settings: GenerationSettings,
                 watch: Callable[[], None] | None = None) -> list[int]:
        """Prompt ids -> the ids of the answer, which ends where the model ends it or begins a user's turn.

        `watch` is called before each token; what it raises ends the generation.
        """
        return self.speaker.answer(prompt, settings, watch=watch)

    # ---- inside

    def _known_codes(self, images: Sequence[Picture]) -> Tensor:
        """Codes [B, 32] of the pictures of a conversation, each encoded once."""
        return self.pictures.tokenize(images, once=True)

    def _shown(self, image: Any) -> list[Any]:
        """Pictures of a task's message; a string is a file name there."""
        return [Path(item) if isinstance(item, str) else item for item in as_parts(image, "The picture")]

    def _forced(self, settings: GenerationSettings, given: dict[str, Any]) -> GenerationSettings:
        """Settings that force a picture; the system's own limit is raised to leave room for it, a given one is kept,
        or refused (`ConfigError`) if no picture fits into it."""
        needed = self.tokenizer.vocabulary.tokens_per_image + 1
        if "max_new_tokens" in given and settings.max_new_tokens < needed:
            raise ConfigError(f"A picture needs {needed} new tokens: max_new_tokens {settings.max_new_tokens} is too "
                              f"small for a request that must be answered with one.")
        return replace(settings, force_image=True, max_new_tokens=max(settings.max_new_tokens, needed))

    def _say(self, content: list[Any], options: dict[str, Any]) -> str:
        """The text of an answer; pictures in it are not drawn."""
        ids = self.speaker.answer(self._task_ids(content), self.settings(**options))
        return Answer(split_answer(ids, self.tokenizer)).text

    def _task_ids(self, content: list[Any]) -> list[int]:
        turns = to_turns([{"role": "user", "content": content}], self._known_codes, self.pictures.check_codes)
        if self.log and (note := unknown_note(self.spec.world, content)):
            self.log(note)
        return self.prompt_ids(turns)

    def _one_picture(self, content: list[Any], opening: str, options: dict[str, Any],
                     first: First = None, words: int = 0) -> list[Image.Image]:
        decode = _take(options, DECODE_KEYS)
        settings = self._forced(self.settings(**options), options)
        settings = replace(settings, max_new_tokens=self.tokenizer.vocabulary.tokens_per_image + 1)  # no words after it
        # A missing de-tokenizer and wrong numbers of codes are reported before generation.
        _ = self.pictures.decoder, self.pictures.model.check_counts(first)
        prompt, answer = self._task_ids(content), Answer(())
        free = replace(settings, force_image=False, max_new_tokens=settings.max_new_tokens + words)
        for how, start in ((free, ""), (settings, opening))[not words:]:
            if len(answer.codes) != 1:
                answer = Answer(split_answer(self.speaker.answer(prompt, how, start), self.tokenizer))
        if len(answer.codes) != 1:
            raise GenerationError("The model's answer holds no whole picture"
                                  + (f": {answer.problems[0]}" if answer.problems else "."))
        return self.pictures.draw(answer.codes, seed=settings.seed or 0, first=first, **decode)

    def _stream(self, events: Iterator[Event], seed: int | None, decode: dict[str, Any], note: str) -> Iterator[Event]:
        """A speaker's events with the pictures drawn, and the whole answer at the end."""
        images: list[Image.Image | None] = []
        with contextlib.closing(events):  # type: ignore[type-var]
            for event in events:
                if event["type"] == "image_preview":
                    event = {**event, "image": self.pictures.preview(event["codes"], seed, **decode)}
                elif event["type"] == "image":
                    images += self._draw_codes([event["codes"]], seed, decode)
                    event = {**event, "image": images[-1]}
                elif event["type"] == "end":
                    event = {"type": "done", "answer": replace(self._answer(event["ids"], images), note=note)}
                yield event

    def _finish(self, ids: list[int], seed: int | None, decode: dict[str, Any]) -> Answer:
        codes = [part.codes for part in split_answer(ids, self.tokenizer) if isinstance(part, ImagePart)]
        return self._answer(ids, self._draw_codes(codes, seed, decode))

    def _draw_codes(self, codes: list[list[int]], seed: int | None, decode: dict[str, Any]) -> list[Image.Image | None]:
        if not codes or not self.pictures.can_draw:
            return [None] * len(codes)
        return list(self.pictures.draw(codes, seed=seed or 0, **decode))

    def _answer(self, ids: list[int], images: Sequence[Image.Image | None]) -> Answer:
        rest = iter(images)
        parts: list[AnswerPart] = [DrawnPart(part.codes, next(rest)) if isinstance(part, ImagePart) else part
                                   for part in split_answer(ids, self.tokenizer)]
        return Answer(tuple(parts), tuple(ids))


def _take(options: dict[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    """Remove `keys` from `options` and give them."""
    return {key: options.pop(key) for key in keys if key in options}
