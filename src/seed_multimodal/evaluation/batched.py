"""`SeedLlama` in batches, for measuring: the same prompts, answers and decoder, many at a time.

Prompts of like length share a batch (rows are padded on the left and masked, so neighbours change an answer by rounding
only), and a short answer's budget is cut, since one row without end would delay its whole batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from seed_multimodal.evaluation.tasks import Codes
from seed_multimodal.language.answer import ImagePart, split_answer
from seed_multimodal.language.generation import GenerationSettings, generate_ids
from seed_multimodal.language.prompts import Turn
from seed_multimodal.systems.chat import Answer, turn_marker
from seed_multimodal.systems.seed_llama import SeedLlama
from seed_multimodal.systems.speaker import AnswerReader

LONGEST_TEXT = 64


class BatchedSystem:
    """The `System` of the report card, over a `SeedLlama`.

    Args:
        batch: prompts or pictures at a time.
        seed: of every picture that is rendered (each has its own generator) and of sampling, if the system samples.
    """

    def __init__(self, seed_llama: SeedLlama, batch: int = 64, seed: int = 0) -> None:
        self.inner, self.batch, self.seed = seed_llama, batch, seed
        self.codebook_size = seed_llama.tokenizer.vocabulary.n_codes

    @classmethod
    def from_pretrained(cls, model: Any, *, device: str = "auto", dtype: str = "auto",
                        quantization: str | None = None, batch: int = 64, seed: int = 0,
                        log: Callable[[str], None] | None = print) -> BatchedSystem:
        """Load a system folder with its de-tokenizer; see `SeedLlama.from_pretrained` for errors."""
        return cls(SeedLlama.from_pretrained(model, device=device, dtype=dtype, quantization=quantization, log=log),
                   batch, seed)

    @property
    def device(self) -> torch.device:
        """Where pictures are read and made."""
        return self.inner.pictures.device

    def facts(self) -> dict[str, Any]:
        """Settings of the system that the numbers depend on."""
        decoder, settings = self.inner.pictures.decoder, self.inner.settings()
        return {"template": self.inner.template.name, "steps": decoder.defaults.num_inference_steps,
                "guidance": decoder.defaults.guidance_scale, "sampling": settings.samples, "beams": settings.num_beams,
                "codebook": self.codebook_size, "dtype": str(self.inner.llm.dtype).removeprefix("torch.")}

    def codes(self, pictures: NDArray[np.uint8]) -> NDArray[np.int64]:
        """uint8 [N, H, W, 3] → codes [N, T]."""
        parts = [self.inner.pictures.tokenize([Image.fromarray(p) for p in pictures[i : i + self.batch]])
                 for i in range(0, len(pictures), self.batch)]
        return torch.cat(parts).numpy()

    def pictures(self, codes: Sequence[Codes]) -> list[Image.Image]:
        """Codes of N pictures → N pictures."""
        if not codes:
            return []
        return self.inner.pictures.draw(list(codes), seed=self.seed, batch_size=self.batch)

    def describe(self, codes: Sequence[Codes]) -> list[str]:
        """The system's usual request for a description, about each picture."""
        return self._say([(list(row), self.inner.tasks.describe) for row in codes])

    def ask(self, codes: Sequence[Codes], questions: Sequence[str]) -> list[str]:
        """Each question with the one-word suffix, about its picture."""
        return self._say([(list(row), self.inner.tasks.question(question))
                          for row, question in zip(codes, questions, strict=True)])

    def draw(self, texts: Sequence[str]) -> list[Codes | None]:
        """The system's drawing request for each text; the codes of the forced picture."""
        return self._paint([(self.inner.tasks.draw_request(text),) for text in texts], self.inner.tasks.draw_response)

    def edit(self, codes: Sequence[Codes], instructions: Sequence[str]) -> list[Codes | None]:
        """Each picture with its instruction; the codes of the forced picture."""
        contents = [(list(row), text) for row, text in zip(codes, instructions, strict=True)]
        return self._paint(contents, self.inner.tasks.edit_response)

    @torch.inference_mode()
    def round_trip(self, pictures: NDArray[np.uint8]) -> list[Image.Image]:
        """Pictures through the decoder's VAE alone (no codes, no diffusion): the ceiling of what it can show."""
        vae = self.inner.pictures.decoder.pipeline.vae
        made: list[Image.Image] = []
        for start in range(0, len(pictures), self.batch):
            pixels = torch.from_numpy(np.array(pictures[start : start + self.batch])).permute(0, 3, 1, 2)
            latents = vae.encode((pixels.float() / 127.5 - 1).to(vae.device, vae.dtype)).latent_dist.mode()
            rebuilt = ((vae.decode(latents).sample.float().cpu() + 1) * 127.5).round().clamp(0, 255).byte()
            made += [Image.fromarray(p) for p in rebuilt.permute(0, 2, 3, 1).numpy()]
        return made

    def _say(self, contents: Sequence[tuple[Any, ...]]) -> list[str]:
        settings = self.inner.settings(seed=self.seed)
        settings = replace(settings, max_new_tokens=min(settings.max_new_tokens, LONGEST_TEXT))
        return [self.text(ids) for ids in self.generate([self._prompt(c) for c in contents], settings)]

    def text(self, ids: Sequence[int]) -> str:
        """The words of an answer up to the marker of a user's turn."""
        reader = AnswerReader(self.inner.tokenizer, turn_marker(self.inner.template))
        return Answer(split_answer(reader.read_all(ids), self.inner.tokenizer)).text

    def _paint(self, contents: Sequence[tuple[Any, ...]], opening: str) -> list[Codes | None]:
        words = self.inner.tokenizer.encode_parts([opening]) if opening else []
        settings = replace(self.inner.settings(seed=self.seed), force_image=True,
                           max_new_tokens=self.inner.tokenizer.vocabulary.tokens_per_image + 1)
        found: list[Codes | None] = []
        for ids in self.generate([[*self._prompt(c), *words] for c in contents], settings):
            drawn = [part.codes for part in split_answer(ids, self.inner.tokenizer) if isinstance(part, ImagePart)]
            found.append(list(drawn[0]) if len(drawn) == 1 else None)
        return found

    def _prompt(self, content: tuple[Any, ...]) -> list[int]:
        return self.inner.prompt_ids([Turn("user", content)])

    def generate(self, prompts: Sequence[Sequence[int]], settings: GenerationSettings) -> list[list[int]]:
        """Prompt ids with their `<s>` → the ids of each answer."""
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        answers: list[list[int]] = [[] for _ in prompts]
        for start in range(0, len(order), self.batch):
            part = order[start : start + self.batch]
            made = generate_ids(self.inner.llm, [prompts[i] for i in part], settings, self.inner.tokenizer)
            for i, ids in zip(part, made, strict=True):
                answers[i] = ids
        return answers
