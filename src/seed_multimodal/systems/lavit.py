"""LaVIT as one object: it describes, answers, draws in six ratios, and draws what pictures and words say together.

    picture ─► selector, merger ─► rows ─► LLaMA ─► words                                       describe, ask
    words and codes of pictures ─► LLaMA, guided ─► codes ─► decoder ─► U-Net ─► picture        draw, compose

    lavit = Lavit.from_pretrained("lavit")
    print(lavit.describe("cat.png"))
    lavit.draw("a red apple on a white plate", ratio="3:2").save("apple.png")
    lavit.compose([Path("dog.jpg"), "It is running in the snow."]).save("snow.png")

A picture has as many tokens as there is to see. It is not a system for conversations: `chat` answers one message.
Several pictures at once (`describe_all`, `ask_all`, `draw_all`) give what each alone gives.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from seed_multimodal.device import BESIDE_8BIT, choose_device, choose_for_pictures
from seed_multimodal.errors import GenerationError, RequestError
from seed_multimodal.language.lavit import (
    QUESTION,
    LavitTokenizer,
    Side,
    answer_of,
    caption_of,
    question_prompts,
)
from seed_multimodal.language.lavit_generation import CodeSettings, WrittenPicture
from seed_multimodal.language.lemmatizer import Lemmatizer
from seed_multimodal.language.tasks import answer_in
from seed_multimodal.system.config import SystemConfig
from seed_multimodal.systems.batch import BATCH
from seed_multimodal.systems.chat import as_text
from seed_multimodal.systems.lavit_language import Inputs, LavitLanguage, Seeds, Watch
from seed_multimodal.systems.lavit_message import MessageSystem
from seed_multimodal.systems.lavit_parts import MODES, check_belonging, load_language, load_pictures
from seed_multimodal.systems.lavit_pictures import LavitPictures, composed_parts, drawn_texts
from seed_multimodal.systems.picture_half import off_loaded, one_seed_each, resident
from seed_multimodal.systems.pictures import is_picture
from seed_multimodal.systems.talking import Log

DECODE_KEYS = ("num_inference_steps", "guidance_scale", "height", "width", "ratio", "scheduler", "original_size",
               "crops_coords_top_left", "batch_size")
Part = Any  # of what is composed: a text, a picture, or codes
Prompts = str | Sequence[str] | None  # one for all, or one each


class Lavit(MessageSystem):
    """A loaded system.

    Methods take generation settings (`WritingSettings`; where they draw `CodeSettings`, and those of
    `LavitPictures.draw`) as keywords. Defaults are the released programs', or the system's own in `system.json`.

    Attributes:
        lemmatizer: of answers; None: spaCy's, if it is there, loaded with the first.
    """

    decode_keys = DECODE_KEYS
    tokenizer: LavitTokenizer
    lemmatizer: Callable[[str], str] | None = None

    def __init__(self, spec: SystemConfig, tokenizer: LavitTokenizer, llm: Any, pictures: LavitPictures,
                 log: Log = None, *, resident: Callable[..., Any] | None = None) -> None:
        """`resident`: inside it, the language model is where it computes."""
        self.spec, self.log, self.tokenizer, self.llm, self.pictures = spec, log, tokenizer, llm, pictures
        inside = {} if resident is None else {"resident": resident}
        self.language = LavitLanguage(tokenizer, llm, spec.generation, spec.name, elsewhere=DECODE_KEYS, **inside)

    @classmethod
    def from_pretrained(
        cls, name: str | Path | SystemConfig, *, head: str | None = None, device: str = "auto", dtype: Any = "auto",
        quantization: str | None = None, image_device: str | None = None, drawing_device: str | None = None,
        modes: Collection[str] = MODES, check_safety: bool = False, offload: bool | Collection[str] = False,
        log: Log = print, **parts: Any,
    ) -> Lavit:
        """Load a system; its decoders are loaded when the first picture is drawn.

        Args:
            name: `lavit`, `nano-lavit`, a released folder, one with `system.json`, or parts found before.
            head: "highres" or "lowres", of a released folder, which has both pixel decoders.
            device, dtype: of the language model, see `choose_device`.
            quantization: "8bit" or "4bit" for the language model, on CUDA devices and CPUs.
            image_device, drawing_device: where pictures are read and drawn, if not on `device`.
            modes: "understanding", "generation" or both: parts of the other are not read.
            check_safety: drawings that the folder's safety checker flags become black.
            offload: each part is on its device only while it works, or these of "llm", "encoder" and "decoder".
            parts: single parts, see `SystemConfig.find`.

        Raises:
            CheckpointError: a part that is missing or damaged: one sentence, with what to put where.
        """
        spec = name if isinstance(name, SystemConfig) else SystemConfig.find(name, system="lavit", head=head, **parts)
        spec.require("llm", "words", "tokenizer")
        runtime = choose_device(device, dtype, log=log, fp16=BESIDE_8BIT if quantization == "8bit" else "")
        here = choose_for_pictures(runtime.device if image_device is None else image_device, dtype, runtime, log)
        there = choose_for_pictures(here.device if drawing_device is None else drawing_device, dtype, here, log)
        leaves = "llm" in off_loaded(offload) and quantization is None
        words, llm = load_language(spec, runtime, quantization, leaves)
        pictures = load_pictures(spec, here, there, modes, offload, check_safety)
        check_belonging(spec, words, llm, pictures)
        pictures.log = log
        return cls(spec, words, llm, pictures, log, resident=partial(resident, llm, runtime.device, leaves))

    # ---- reading

    def describe(self, image: Any, prompt: str | None = None, **options: Any) -> str:
        """A caption of a picture (or of several in one prompt); `prompt` is put behind it."""
        return self.describe_all([self._shown(image)], prompt, **options)[0]

    def describe_all(self, images: Sequence[Any], prompts: Prompts = None, *,
                     selection: str | None = None, batch_size: int = BATCH, **options: Any) -> list[str]:
        """Captions of pictures, each as `describe` gives it.

        Args:
            prompts: one for all, or one each.
            selection: how patches are chosen, see `LavitPictures.read`.
            options: of `WritingSettings`; `seed` may be one for each picture, or None for torch's global generator.
        """
        said = self._say_all("describe", images, prompts, prompts, selection, batch_size, options)
        return [caption_of(text) for text in said]

    def ask(self, image: Any, question: str, *, short: bool = True, **options: Any) -> str:
        """The answer to `question` about a picture (or several in one prompt); without `short` the words are the prompt
        as they are."""
        return self.ask_all([self._shown(image)], as_text(question, "The question"), short=short, **options)[0]

    def ask_all(self, images: Sequence[Any], questions: str | Sequence[str], *, short: bool = True,
                prompt: str = QUESTION, selection: str | None = None, batch_size: int = BATCH,
                **options: Any) -> list[str]:
        """Answers about pictures, each as `ask` gives it; arguments as of `describe_all`.

        Args:
            prompt: with "{}" for the question.
        """
        asked = question_prompts(questions, prompt if short else None)
        self.lemmatizer = self.lemmatizer or Lemmatizer()
        said = self._say_all("ask", images, asked[0] if isinstance(questions, str) else asked, questions, selection,
                             batch_size, options)
        return [self.lemmatizer(answer_of(answer_in(text, self.spec.answer_after))) for text in said]

    def _say_all(self, task: str, images: Sequence[Any], prompts: Prompts, words: Prompts, selection: str | None,
                 batch_size: int, options: dict[str, Any]) -> list[str]:
        """`words`: of the caller, without the text around a question."""
        settings, seeds = self.language.asked(task, images, options)
        side: Side = "caption" if task == "describe" else "answer"
        said: list[str] = []
        for start in range(0, len(images), batch_size):
            rows = slice(start, start + batch_size)
            own = None if seeds is None else seeds[rows]
            inputs = self._inputs(images[rows], _of(prompts, rows), own, selection, side)
            self._remark_on(images[rows], _of(words, rows))
            said += self.language.say(inputs, settings, own) if inputs else ()
        return said

    def encode_all(self, images: Sequence[Any], *, seed: Any = 0, selection: str | None = None) -> list[Tensor]:
        """Codes of each picture, as many as there is to see; `seed` of the selection: one for all, or one each."""
        return self.pictures.tokenize(self._shown(images), seed=seed, selection=selection)

    def _remark_on(self, images: Sequence[Any], words: Prompts) -> None:
        pictures = [one for image in images for one in self._shown(image)]
        self._remark(self.note([*pictures, *([words] if isinstance(words, str) else words or ())]))

    def _inputs(self, images: Sequence[Any], prompts: Prompts, seeds: Seeds, selection: str | None,
                side: Side) -> Inputs | None:
        """What the language model reads of pictures, or lists of them; None for none."""
        self.spec.require("understanding")
        groups = [list(image) if isinstance(image, (list, tuple)) else [image] for image in images]
        if not all(groups):
            raise RequestError("A request needs a picture.")
        each = None if seeds is None else [seed for seed, group in zip(seeds, groups, strict=True) for _ in group]
        rows = iter(self.pictures.read([self._shown([one])[0] for group in groups for one in group], seed=each,
                                       selection=selection))
        read = [[next(rows) for _ in group] for group in groups]
        return self.language.inputs(read, prompts, side) if read else None

    # ---- drawing

    def draw(self, text: str, seed: int = 0, *, codes: Any = None, **options: Any) -> Image.Image:
        """A picture of `text`; `codes` are refused, as there are no pictures of the first of them.

        Args:
            options: `CodeSettings` (`guidance`, `top_k`, …), `negative` (words to steer away from), and of
                `LavitPictures.draw`: `ratio` ("3:2") or `height` and `width`, `num_inference_steps`, `guidance_scale`.

        Raises:
            GenerationError: the model wrote no code.
        """
        self.pictures.refuse_first(codes)
        return self.draw_all([text], seed=seed, **options)[0]

    def draw_all(self, texts: Sequence[str], *, seed: Any = 0, **options: Any) -> list[Image.Image]:
        """`number` pictures (1) of each text, one after the other; arguments as of `draw`, `seed` one for all or one
        each."""
        return self._drawn(drawn_texts(texts), "draw", seed, options)

    def compose(self, parts: Sequence[Part], seed: int = 0, **options: Any) -> Image.Image:
        """A picture of texts and pictures in their order; arguments and errors as of `draw`.

        Args:
            parts: texts (`str`), pictures (PIL, `Path`, bytes, …) and rows of codes.
        """
        return self._drawn([composed_parts(parts)], "compose", seed, options)[0]

    def edit(self, image: Any, instruction: str, seed: int = 0, **options: Any) -> Image.Image:
        """What pictures and words say together: `compose`, which is as near as LaVIT comes to editing."""
        return self.compose([*self._shown(image), as_text(instruction, "The instruction")], seed, **options)

    def edit_all(self, images: Sequence[Any], instructions: str | Sequence[str], *, seed: Any = 0,
                 **options: Any) -> list[Image.Image]:
        """Edits, each as `edit` gives it; `instructions` and `seed`: one for all, or one each."""
        texts = [instructions] * len(images) if isinstance(instructions, str) else instructions
        return self._drawn([[*self._shown(image), text] for image, text in zip(images, texts, strict=True)],
                           "compose", seed, options)

    def reconstruct(self, images_or_codes: Any, seed: Any = 0, *, codes: Any = None, selection: str | None = None,
                    **decode: Any) -> list[Image.Image]:
        """Pictures, or their codes, drawn again; `decode` as of `LavitPictures.draw`."""
        self.pictures.refuse_first(codes)
        several = images_or_codes if isinstance(images_or_codes, (list, tuple)) else [images_or_codes]
        if len(several) and (isinstance(several[0], str) or is_picture(several[0])):
            shown = self._shown(images_or_codes)
            images_or_codes = self.pictures.tokenize(shown, seed=seed, selection=selection)
            self._remark(self.pictures.note(shown))
        return self.pictures.draw(images_or_codes, seed=seed, **decode)

    def write(self, prompts: Sequence[Sequence[Part]], task: str = "draw", *, seed: Any = 0,
              negative: str | Sequence[int] | None = None, selection: str | None = None, watch: Watch = None,
              **options: Any) -> list[WrittenPicture]:
        """The codes of `number` pictures (1) of each prompt of texts, pictures and codes, not yet drawn.

        Args:
            task: "draw" or "compose", whose settings hold. negative, watch: see `LavitLanguage.write`.

        Raises:
            ImageError, CodesError, RequestError: a part that cannot be read.
        """
        settings, seeds = self.language.asked(task, prompts, {**options, "seed": seed})
        assert isinstance(settings, CodeSettings)
        own: list[int] | list[None] = [None] * len(prompts) if seeds is None else seeds
        coded = [[part if isinstance(part, str) else self.pictures.codes_of(part, one, selection) for part in prompt]
                 for prompt, one in zip(prompts, own, strict=True)]
        return self.language.write(coded, settings, seeds, negative, self.log, watch)

    def _drawn(self, prompts: list[list[Part]], task: str, seed: Any, options: dict[str, Any]) -> list[Image.Image]:
        decode = self._take_decode(options)
        checked = {key: value for key, value in decode.items() if key != "batch_size"}  # of the half, not the decoder
        written = self._written(prompts, task, seed, options, checked)
        self._remark(self.note([part for prompt in prompts for part in prompt]))
        seeds = one_seed_each(0 if seed is None else seed, len(prompts))
        number = len(written) // max(len(prompts), 1)
        each = [(one + place) % 2**63 for one in seeds for place in range(number)]  # as the codes were drawn with
        return self.pictures.draw([one.codes for one in written], seed=each, **decode)

    def _written(self, prompts: list[list[Part]], task: str, seed: Any, options: dict[str, Any],
                 decode: dict[str, Any]) -> list[WrittenPicture]:
        """Pictures as the model wrote them, each with a code; wrong settings of drawing are refused before."""
        self.spec.require("decoder", "pixels")
        self.pictures.check_drawing(**decode)
        written = self.write(prompts, task, seed=seed, **options)
        for one in written:
            if not len(one.codes):
                raise GenerationError(one.note)
            if one.note and self.log:
                self.log(one.note)
        return written


def _of(prompts: Prompts, rows: slice) -> Prompts:
    return prompts[rows] if isinstance(prompts, (list, tuple)) else prompts
