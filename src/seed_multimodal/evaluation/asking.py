"""Systems as benchmarks ask them: pictures to captions and answers, many at a time.

`Benchmark` is SEED-LLaMA in batches, with the released scripts' prompts:

    question   plain  <s>[picture]Question: …\\nAnswer:       chat  the user's turn: picture, question, one-word request
    caption    plain  <s>[picture]PROMPT                     chat  the user's turn: picture, request to describe

`AnySystem` asks any other as its commands do, with the settings that were published with it, unless others are given.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor

from seed_multimodal.data.formats.pictures import HeldPicture, find_picture
from seed_multimodal.disk import sampled_hash
from seed_multimodal.evaluation.batched import BatchedSystem
from seed_multimodal.images.open import open_image
from seed_multimodal.language.generation import GenerationSettings
from seed_multimodal.language.prompts import Turn

PROMPTS = ("chat", "plain")
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")
PLAIN_QUESTION = "Question: {}\nAnswer:"
# Of the released captioning evaluation (its temperature 0.7 has no effect without sampling).
CAPTIONING = GenerationSettings(temperature=0.7, num_beams=5, max_new_tokens=120, do_sample=False)
# Ours: the released script asked a single question, see `PROBE`.
ANSWERING = GenerationSettings(temperature=0.0, num_beams=1, max_new_tokens=16, do_sample=False)
PROBE = GenerationSettings(temperature=1.0, num_beams=5, max_new_tokens=512, top_p=0.5, do_sample=True, seed=42)


class Asked(Protocol):
    """A system as benchmarks ask it."""

    def see(self, picture: int | str | HeldPicture, beside: Path, where: str) -> Any:
        """A picture that the file `beside` names at `where`, as the system takes it. Raises ImageError."""

    def describe(self, seen: Sequence[Any], prompt: str = "") -> list[str]:
        """A caption of each picture; `prompt`: its first words, or the request, as the system has it."""

    def ask(self, seen: Sequence[Any], questions: Sequence[str], template: str = "{}") -> list[str]:
        """A short answer to each question about its picture; `template`: a request that holds the question."""

    def facts(self) -> dict[str, Any]:
        """What answers depend on."""


@dataclass
class Benchmark:
    """SEED-LLaMA.

    Attributes:
        prompts: `chat` or `plain`. settings: of generation.
        images: folder of the pictures (None: beside the file that names them, then the current folder).
    """

    system: BatchedSystem
    prompts: str
    settings: GenerationSettings
    images: Path | None = None

    def see(self, picture: int | str | HeldPicture, beside: Path, where: str) -> Tensor:
        """A picture as the tokenizer takes it, [3, S, S]. Raises ImageError."""
        codec = self.system.inner.pictures
        found = find_picture(picture, self.images, beside, where)
        return codec.transform(codec.open(found, where if isinstance(found, bytes) else None))

    def describe(self, seen: Sequence[Tensor], prompt: str = "") -> list[str]:
        """See `Asked`; `prompt`: first words of a plain caption."""
        return self.say(seen, [self.system.inner.tasks.describe] * len(seen), [prompt] * len(seen))

    def ask(self, seen: Sequence[Tensor], questions: Sequence[str], template: str = "{}") -> list[str]:
        """See `Asked`."""
        texts = [template.format(one) for one in questions]
        return self.say(seen, [self.system.inner.tasks.question(one) for one in texts],
                        [PLAIN_QUESTION.format(one) for one in texts])

    def say(self, pixels: Sequence[Tensor], chat: Sequence[str], plain: Sequence[str]) -> list[str]:
        """The answers to a request about each picture. A plain answer ends with its line, since the pretrained model
        goes on with another question."""
        codes = self.system.inner.pictures.encode_once(torch.stack(list(pixels))).tolist()
        texts = chat if self.prompts == "chat" else plain
        answers = self.system.generate([self.prompt(row, text) for row, text in zip(codes, texts, strict=True)],
                                       self.settings)
        said = [self.system.text(ids).strip() for ids in answers]
        return said if self.prompts == "chat" else [text.partition("\n")[0].strip() for text in said]

    def prompt(self, *parts: Any) -> list[int]:
        """Ids of a request."""
        inner = self.system.inner
        if self.prompts == "chat":
            return inner.prompt_ids([Turn("user", tuple(part for part in parts if part))])
        return inner.tokenizer.encode_parts([part for part in parts if part], add_bos=True)

    def facts(self) -> dict[str, Any]:
        """What answers depend on."""
        inner = self.system.inner
        return {"prompts": self.prompts, "template": inner.template.name, "generation": asdict(self.settings),
                **model_facts(inner), "transform": repr(inner.pictures.transform)}


@dataclass
class AnySystem:
    """A system of `systems`, by its own methods; many samples at a time where it can.

    Attributes:
        options: settings of `describe` and `ask` over the system's own.
        drawing: settings of `draw` over the system's own.
        question: what the system's own evaluation makes of a question before it is asked.
        images: as of `Benchmark`.
    """

    system: Any
    options: Mapping[str, Any] = field(default_factory=dict)
    drawing: Mapping[str, Any] = field(default_factory=dict)
    question: Callable[[str], str] = str
    images: Path | None = None

    def see(self, picture: int | str | HeldPicture, beside: Path, where: str) -> Image.Image:
        """The picture. Raises ImageError."""
        found = find_picture(picture, self.images, beside, where)
        return open_image(found, name=where if isinstance(found, bytes) else None)

    def describe(self, seen: Sequence[Image.Image], prompt: str = "") -> list[str]:
        """See `Asked`; `prompt`: as of the system's `describe`."""
        if hasattr(self.system, "describe_all"):
            return list(self.system.describe_all(seen, prompt or None, **self.options))
        return [self.system.describe(one, prompt or None, **self.options) for one in seen]

    def ask(self, seen: Sequence[Image.Image], questions: Sequence[str], template: str = "{}") -> list[str]:
        """See `Asked`."""
        texts = [template.format(self.question(one)) for one in questions]
        if hasattr(self.system, "ask_all"):
            return list(self.system.ask_all(seen, texts, **self.options))
        return [self.system.ask(one, text, **self.options) for one, text in zip(seen, texts, strict=True)]

    def draw(self, texts: Sequence[str], count: int, seeds: Sequence[int]) -> list[list[Image.Image]]:
        """So many pictures of each text; number n is drawn with the text's seed + n. Raises GenerationError."""
        if hasattr(self.system, "draw_all"):
            made = list(self.system.draw_all(texts, seed=list(seeds), number=count, **self.drawing))
            return [made[start:start + count] for start in range(0, len(made), count)]
        return [[self.system.draw(text, seed=seed + number, **self.drawing) for number in range(count)]
                for text, seed in zip(texts, seeds, strict=True)]

    def facts(self) -> dict[str, Any]:
        """What answers depend on."""
        return {"options": dict(self.options), "drawing": dict(self.drawing), **model_facts(self.system)}


def model_facts(system: Any) -> dict[str, Any]:
    """Which weights a system has, and in what precision; a folder that was trained again has others."""
    bits = next((bits for bits in ("8bit", "4bit") if getattr(system.llm, f"is_loaded_in_{bits}", False)), None)
    return {"model": system.spec.name, "llm": str(system.spec.llm),
            "dtype": str(system.llm.dtype).removeprefix("torch."), "quantization": bits,
            "weights": _weights_mark(system.spec)}


def _weights_mark(spec: Any) -> str:
    """A hash over the weights of all parts, of a few places of each file."""
    places = {Path(value) for value in vars(spec).values() if isinstance(value, Path)}
    files = {file.resolve() for place in places for file in ([place] if place.is_file() else place.rglob("*"))
             if file.suffix in WEIGHTS and file.is_file()}
    return hashlib.sha256("".join(sorted(map(sampled_hash, files))).encode()).hexdigest()[:16]
