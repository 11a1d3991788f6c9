"""SEED-X as one object: it describes, answers, finds things, draws, edits, rebuilds and chats with several pictures.

    pictures ─► views ─► tower ─► features ─► agent (LLaMA and two resamplers) ─► words, boxes and features ─► SDXL

    seed = SeedX.from_pretrained("seed-x-i")
    print(seed.describe("cat.png"))
    seed.detect("street.png", "the red car").drawn().save("found.png")

Pictures have no codes here: the model reads their features and writes features at 64 fixed words. `ask` and `chat` are
those of all systems (`talking`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from seed_multimodal.device import BESIDE_8BIT, choose_device, choose_for_pictures
from seed_multimodal.errors import ConfigError, RequestError
from seed_multimodal.images.sheet import draw_boxes
from seed_multimodal.language.answer import ImagePart
from seed_multimodal.language.generation import GenerationSettings, ImageStates
from seed_multimodal.language.seed_x import (
    Box,
    SeedXPrompts,
    ShownPicture,
    WrittenPicture,
    answer_text,
    place_pictures,
    read_boxes,
    without_words,
)
from seed_multimodal.language.seed_x import Content as Spans
from seed_multimodal.language.tasks import answer_in
from seed_multimodal.language.tokenizer import MultimodalTokenizer
from seed_multimodal.language.vocabulary import PLACEHOLDER
from seed_multimodal.seed_x.modeling import ContinuousLVLM, Prompt
from seed_multimodal.system.config import SystemConfig
from seed_multimodal.systems.batch import BATCH, Written, written_images
from seed_multimodal.systems.chat import Answer, Content, DrawnPart, as_text
from seed_multimodal.systems.picture_half import Picture, off_loaded, resident
from seed_multimodal.systems.pictures import is_codes, is_picture
from seed_multimodal.systems.seed_x_parts import load_agent_model, load_pictures
from seed_multimodal.systems.seed_x_pictures import FeaturePictures, SeenPicture
from seed_multimodal.systems.speaker import Speaker
from seed_multimodal.systems.talking import Log, Painted, Request, TalkingSystem

DECODE_KEYS = ("num_inference_steps", "guidance_scale", "image_guidance_scale", "scheduler", "height", "width", "ratio")


@dataclass(frozen=True)
class Detection:
    """What was found in a picture; iterating gives its boxes.

    Attributes:
        boxes: (left, top, right, bottom) in whole pixels of `picture`, cut off at its edges. grid: the same in 224ths.
        text: of the answer, words of boxes included. problems: a sentence about each malformed box.
    """

    picture: Image.Image
    boxes: list[tuple[int, int, int, int]]
    grid: list[Box]
    text: str
    problems: list[str]

    def __iter__(self) -> Iterator[tuple[int, int, int, int]]:
        return iter(self.boxes)

    def __len__(self) -> int:
        return len(self.boxes)

    def drawn(self, **options: Any) -> Image.Image:
        """The picture with the boxes on it; `options` of `draw_boxes`."""
        return draw_boxes(self.picture, self.boxes, **options)


class SeedX(TalkingSystem):
    """A loaded system; make one with `from_pretrained`.

    Every method takes generation settings (`GenerationSettings`) and, where it draws, de-tokenizer settings
    (`FeaturePictures.draw`) as keywords; defaults are the system's own in `system.json`.
    """

    decode_keys = DECODE_KEYS

    def __init__(self, spec: SystemConfig, tokenizer: MultimodalTokenizer, agent: ContinuousLVLM,
                 pictures: FeaturePictures, log: Log = None, *, offload_llm: bool = False) -> None:
        self.spec, self.tasks, self.log = spec, spec.tasks, log
        self.tokenizer, self.agent, self.llm, self.pictures = tokenizer, agent, agent.llm, pictures
        self.prompts = SeedXPrompts(tokenizer, spec.tuned)
        self.template = self.prompts.template
        device = next(agent.output_resampler.parameters()).device  # where the language model works
        self.speaker = Speaker(agent.llm, tokenizer, self.template.turn_marker if spec.tuned else "",
                               partial(resident, agent.llm, device, offload_llm))
        self.settings()  # wrong defaults in system.json are reported now, not at the first question

    @classmethod
    def from_pretrained(
        cls, name: str | Path | SystemConfig | None = None, *, llm: str | Path | None = None,
        agent: str | Path | None = None, tokenizer: str | Path | None = None, vision: str | Path | None = None,
        sdxl: str | Path | None = None, detokenizer: str | Path | None = None, tuned: bool | None = None,
        device: str = "auto", dtype: Any = "auto", quantization: str | None = None, image_device: str | None = None,
        drawing_device: str | None = None, load_decoder: bool = True, offload: bool | Collection[str] = False,
        log: Log = print,
    ) -> SeedX:
        """Load a system; its de-tokenizer is loaded when the first picture is drawn.

        Args:
            name: `seed-x`, `seed-x-i`, `seed-x-edit`, a folder with `system.json`, or parts that were found before.
            llm, agent, tokenizer, vision, sdxl, detokenizer, tuned: single parts (folders or hub names), see
                `SystemConfig.find`.
            device, dtype: of the language model and the agent, see `choose_device`.
            quantization: "8bit" or "4bit" for the language model, on CUDA devices and CPUs.
            image_device, drawing_device: where pictures are read and drawn, if not on `device`.
            load_decoder: False: a system that never draws.
            offload: each part is on its device only while it works, or these of "llm", "encoder" and "decoder"; a
                quantised language model stays there.

        Raises:
            CheckpointError: a part that is missing or damaged: one sentence, with what to put where.
        """
        spec = name if isinstance(name, SystemConfig) else SystemConfig.find(
            name, system="seed_x", llm=llm, agent=agent, tokenizer=tokenizer, vision=vision, sdxl=sdxl,
            detokenizer=detokenizer, tuned=tuned)
        spec.require("llm", "agent", "tokenizer", "vision")
        assert spec.tokenizer is not None
        runtime = choose_device(device, dtype, log=log, fp16=BESIDE_8BIT if quantization == "8bit" else "")
        here = choose_for_pictures(runtime.device if image_device is None else image_device, dtype, runtime, log)
        there = choose_for_pictures(here.device if drawing_device is None else drawing_device, dtype, here, log)
        words = MultimodalTokenizer.from_pretrained(spec.tokenizer)
        offload_llm = "llm" in off_loaded(offload) and quantization is None
        model = load_agent_model(spec, words, runtime, quantization, offload_llm)
        pictures = load_pictures(spec, here, there, load_decoder, offload)
        return cls(spec, words, model, pictures, log, offload_llm=offload_llm)

    # ---- tasks

    def detect(self, image: Any, phrase: str, **options: Any) -> Detection:
        """Where `phrase` is in a picture. A model that follows instructions is asked for it; the base model completes
        it, so its last words name the thing."""
        image = self._shown(image)
        if len(image) != 1 or not is_picture(image[0]):
            raise RequestError("Things are looked for in one picture.")
        request = self._task([*image, self._phrase(phrase)], "detect")
        self._remark(request.note)
        ids = self.speaker.answer(request.ids, self.settings(**options), reading=request.reading)
        return self._detection(image[0], ids)

    def detect_all(self, images: Sequence[Picture], phrases: Sequence[str], *, batch_size: int = BATCH,
                   **options: Any) -> list[Detection]:
        """Detections, each as `detect` gives it."""
        answers = self._answer_all(images, list(map(self._phrase, phrases)), "detect", batch_size, options)
        return [self._detection(image, answer.ids) for image, answer in zip(images, answers, strict=True)]

    def _phrase(self, phrase: str) -> str:
        phrase = as_text(phrase, "The phrase")
        return str(self.tasks.detect_request(phrase)) if self.spec.tuned else phrase

    def _detection(self, image: Picture, ids: Sequence[int]) -> Detection:
        text = answer_in(answer_text(ids, self.tokenizer), self.tasks.answer_after)
        grid, problems = read_boxes(text, not self.spec.tuned, self.prompts.vocabulary.n_locations)
        for problem in problems if self.log else ():
            self.log(problem)  # type: ignore[misc]
        picture = self.pictures.open(image)
        corners = [box.corners(picture.size, self.prompts.vocabulary.n_locations) for box in grid]
        return Detection(picture, corners, grid, text, problems)

    def draw(self, text: str, seed: int = 0, *, codes: None = None, verbatim: bool = False,
             **options: Any) -> Image.Image:
        """A picture of `text`, which is put into the system's drawing request unless `verbatim`; `GenerationError` for
        no whole picture. There are no `codes`: a picture is whole or not there."""
        if codes is not None:
            raise ConfigError(f"{self.spec.name} draws from features, not from codes, so not from the first of them.")
        return self._drawn("draw", [self.drawing_request(text, verbatim)], self.tasks.draw_response,
                           {**options, "seed": seed}, self.free_words("draw"))

    def edit(self, image: Any, instruction: str, seed: int = 0, **options: Any) -> Image.Image:
        """`image` after `instruction`, in its aspect ratio (`ratio`, see `seed_x.views`); raises as `draw`."""
        return self._drawn("edit", [*self._shown(image), as_text(instruction, "The instruction")],
                           self.tasks.edit_response, {**options, "seed": seed}, self.tasks.edit_words)

    def reconstruct(self, images: Picture | Sequence[Picture], condition: Picture | Sequence[Picture] | None = None,
                    seed: Any = 0, *, embeddings: int | None = None, **decode: Any) -> list[Image.Image]:
        """Pictures drawn again from their features, see `FeaturePictures.rebuild`."""
        self._remark(self.pictures.note(list(images) if isinstance(images, (list, tuple)) else [images]))
        return self.pictures.rebuild(images, condition, seed, embeddings=embeddings, **decode)

    def encode_all(self, images: Sequence[Picture]) -> list[Tensor]:
        """Features [views, N, K] of each image."""
        return [one.features for one in self.pictures.read(images)]

    def drawing_request(self, text: str, verbatim: bool) -> str:
        return super().drawing_request(text, verbatim or not self.spec.tuned)

    def free_words(self, task: str) -> int:
        return super().free_words(task) if self.spec.tuned or task == "edit" else 0

    def answer_batch(self, contents: Sequence[Content], task: str, settings: GenerationSettings,
                     opening: Sequence[int] = (), seeds: Sequence[int] | None = None) -> list[Written]:
        asked = [self.prompt([content], task) for content in contents]
        prompts = [replace(prompt, ids=[*prompt.ids, *opening]) for prompt, _ in asked]
        with self.speaker.working():
            answers = self.agent.generate(prompts, settings, self.tokenizer, seeds=seeds)
        written = []
        for one, (_, sources) in zip(answers, asked, strict=True):
            answer = self._read_answer(one.ids)
            written.append(Written(answer, one.features[:len(written_images(answer))].cpu(), *sources[-1:]))
        return written

    def draw_written(self, written: Sequence[Written], seeds: Sequence[int], batch_size: int,
                     decode: dict[str, Any]) -> list[Image.Image]:
        features = torch.stack([one.images[0] for one in written])
        return self._drawn_beside(features, [one.source for one in written], seeds, decode)

    def prompt_ids(self, contents: Sequence[Content], task: str = "") -> list[int]:
        """As the ids of `to_request`, of pictures that are not read: `ShownPicture`s stand for them."""
        return self._words_of([(role, self._placed(role, items, [])) for role, items in contents], task)[0]

    # ---- inside

    def _words(self, answer: Answer) -> str:
        return without_words(answer.text).strip()

    def _drawn(self, task: str, content: list[Any], opening: str, options: dict[str, Any],
               words: int) -> Image.Image:
        decode = self._take_decode(options)
        request, part, seed = self._one_picture(task, content, opening, options, decode, words)
        drawn = request.paint([part], seed, decode)[0]
        assert drawn is not None
        return drawn

    def to_request(self, contents: Sequence[Content], opening: str = "", task: str = "") -> Request:
        prompt, sources = self.prompt(contents, task)
        states = ImageStates(len(self.tokenizer.encode_parts([opening])) if opening else 0)
        reading = {"embed": self.agent.reader([prompt], self.tokenizer), "states": states}
        return Request(list(prompt.ids), partial(self._paint, states, sources[-1] if sources else None), reading,
                       seen=prompt.features is not None, note=self.note(contents[-1][1]))

    def prompt(self, contents: Sequence[Content], task: str = "") -> tuple[Prompt, list[Image.Image]]:
        """A conversation as the language model reads it, and its pictures, opened.

        Raises:
            ConfigError: a system that is not tuned, for a task that needs one. ImageError, RequestError: bad content.
        """
        if not self.spec.tuned and task not in ("ask", "detect", "draw", "text"):
            raise ConfigError(f"{self.spec.name} continues texts, it was not tuned to follow instructions: it "
                              f"describes, answers, detects and draws; take SEED-X-I to chat and SEED-X-Edit to edit.")
        turns: list[tuple[str, list[Spans]]] = []
        seen: list[SeenPicture] = []
        sources: list[Image.Image] = []
        for role, items in contents:
            pictures = self.pictures.read([item for item in items if is_picture(item)], editing=task == "edit")
            seen += pictures
            sources += [picture.picture for picture in pictures]
            sources += [item.image for item in items if isinstance(item, DrawnPart) and item.image is not None]
            turns.append((role, self._placed(role, items, [len(picture.features) for picture in pictures])))
        return self._prompt(turns, task, seen), sources

    def _words_of(self, turns: list[tuple[str, list[Spans]]], task: str) -> tuple[list[int], list[int]]:
        """A prompt's ids, and where in them features are put."""
        alone = not self.spec.tuned or task == "text"
        ids = self.prompts.alone(turns[0][1], task) if alone else self.prompts.dialogue(turns)
        return ids, self.prompts.places(ids, turns)

    def _prompt(self, turns: list[tuple[str, list[Spans]]], task: str, seen: list[SeenPicture]) -> Prompt:
        ids, places = self._words_of(turns, task)
        if not seen:
            return Prompt(ids, places=places)
        device = next(self.agent.input_resampler.parameters()).device
        return Prompt(ids, torch.cat([one.features for one in seen]).to(device),
                      torch.cat([one.positions for one in seen]).to(device), places)

    def _placed(self, role: str, items: list[Any], views: list[int]) -> list[Spans]:
        """A message's texts and pictures as parts of a prompt; `<image>` in a user's text stands for a picture."""
        texts = [item for item in items if isinstance(item, str)]
        if role == "user" and any(PLACEHOLDER in text for text in texts):
            if any(not isinstance(item, str) and not is_picture(item) for item in items):
                raise RequestError(f"A message with {PLACEHOLDER} holds pictures and texts only.")
            return place_pictures("".join(texts), views)
        rest = iter(views)
        spans: list[Spans] = []
        for item in items:
            if isinstance(item, str):
                spans.append(item)
            elif is_picture(item):
                spans.append(ShownPicture(next(rest)))
            elif isinstance(item, ShownPicture):
                spans.append(item)
            else:
                codes = item if is_codes(item) else item.codes
                if [int(code) for code in codes] != list(range(self.tokenizer.vocabulary.tokens_per_image)):
                    raise RequestError("Pictures of SEED-X have no codes; give the picture itself.")
                spans.append(WrittenPicture())
        return spans

    def _paint(self, states: ImageStates, source: Image.Image | None, parts: Sequence[ImagePart], seed: int | None,
               decode: dict[str, Any]) -> Painted:
        features = self.agent.written(states, [range(part.place, part.place + len(part.codes)) for part in parts])
        return list(self._drawn_beside(features, [source] * len(parts), seed or 0, decode))

    def _drawn_beside(self, features: Tensor, sources: Sequence[Image.Image | None], seed: Any,
                      decode: dict[str, Any]) -> list[Image.Image]:
        shown = sources if any(sources) and self.pictures.reads_condition else None
        if shown is None:
            decode = {key: value for key, value in decode.items() if key not in ("ratio", "image_guidance_scale")}
        return self.pictures.draw(features, seed=seed, conditions=shown, **decode)

