"""`SeedLlama` in batches, for measuring: the same prompts, answers and decoder, many at a time.

Prompts of like length share a batch (rows are padded on the left and masked, so neighbours change an answer by rounding
only), and a short answer's budget is cut, since one row without end would delay its whole batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from seed_multimodal.language.answer import ImagePart, TextPart, split_answer
from seed_multimodal.language.generation import GenerationSettings, generate_ids
from seed_multimodal.language.prompts import Turn
from seed_multimodal.systems.chat import Answer
from seed_multimodal.systems.seed_llama import SeedLlama
from seed_multimodal.systems.speaker import AnswerReader
from seed_multimodal.tokenizers.clip_weights import load_clip_vision

Codes = list[int]
Part = str | Codes
Dialogue = Sequence[tuple[str, Sequence[Part]]]
"""Turns of (role, texts and codes in order), the last one the user's."""
LONGEST_TEXT = 110


class BatchedSystem:
    """The `System` of the report card, over a `SeedLlama`.

    Args:
        batch: prompts or pictures at a time.
        seed: of every picture that is rendered (each has its own generator) and of sampling, if the system samples.
    """

    def __init__(self, seed_llama: SeedLlama, batch: int = 64, seed: int = 0) -> None:
        self.inner, self.batch, self.seed = seed_llama, batch, seed
        self.codebook_size = seed_llama.tokenizer.vocabulary.n_codes
        self.section = self.codebook_size // seed_llama.pictures.model.config.codebook_sections
        self.image_size = seed_llama.spec.image_size

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
        return self.inner.encode_all([Image.fromarray(p) for p in pictures], batch_size=self.batch).numpy()

    def pictures(self, codes: Sequence[Codes], first: int | None = None) -> list[Image.Image]:
        """Codes of N pictures → N pictures, drawn from their `first` codes only if that is given."""
        if not codes:
            return []
        return self.inner.pictures.draw(list(codes), seed=self.seed, batch_size=self.batch, first=first)

    def describe(self, codes: Sequence[Codes]) -> list[str]:
        """The system's usual request for a description, about each picture."""
        return self.inner.describe_all([list(row) for row in codes], **self._short())

    def ask(self, codes: Sequence[Codes], questions: Sequence[str]) -> list[str]:
        """Each question with the one-word suffix, about its picture."""
        return self.inner.ask_all([list(row) for row in codes], questions, **self._short())

    def draw(self, texts: Sequence[str]) -> list[Codes | None]:
        """The system's drawing request for each text; the codes of the forced picture."""
        return self._write([[self.inner.tasks.draw_request(text)] for text in texts], "draw")

    def edit(self, codes: Sequence[Codes], instructions: Sequence[str]) -> list[Codes | None]:
        """Each picture with its instruction; the codes of the answer's picture, which is forced where the system may
        not say something first, or says something else."""
        return self._write([[list(row), text] for row, text in zip(codes, instructions, strict=True)], "edit")

    def answer(self, dialogues: Sequence[Dialogue], most: int) -> list[list[Part]]:
        """What the system says in at most `most` tokens, nothing forced: texts and codes of whole pictures, in order;
        nothing where the context leaves no room for that."""
        prompts = [self.inner.prompt_ids([Turn(role, tuple(parts)) for role, parts in turns]) for turns in dialogues]
        room = self.inner.llm.config.max_position_embeddings - most
        fitting = [i for i, prompt in enumerate(prompts) if len(prompt) <= room]
        settings = replace(self.inner.settings(seed=self.seed), max_new_tokens=most)
        answers: list[list[Part]] = [[] for _ in prompts]
        for i, ids in zip(fitting, self.generate([prompts[i] for i in fitting], settings), strict=True):
            for part in split_answer(self._reader().read_all(ids), self.inner.tokenizer):
                if isinstance(part, ImagePart):
                    answers[i].append(list(part.codes))
                elif isinstance(part, TextPart):
                    answers[i].append(part.text.strip())
        return answers

    @torch.no_grad()
    def through_vae(self, pictures: NDArray[np.uint8]) -> list[Image.Image]:
        """Pictures through the decoder's VAE alone (no codes, no diffusion): the ceiling of what it can show."""
        vae = self.inner.pictures.decoder.pipeline.vae
        made: list[Image.Image] = []
        for start in range(0, len(pictures), self.batch):
            pixels = torch.from_numpy(np.array(pictures[start : start + self.batch])).permute(0, 3, 1, 2)
            latents = vae.encode((pixels.float() / 127.5 - 1).to(vae.device, vae.dtype)).latent_dist.mode()
            rebuilt = ((vae.decode(latents).sample.float().cpu() + 1) * 127.5).round().clamp(0, 255).byte()
            made += [Image.fromarray(p) for p in rebuilt.permute(0, 2, 3, 1).numpy()]
        return made

    @torch.no_grad()
    def through_embedding(self, pictures: NDArray[np.uint8]) -> list[Image.Image] | None:
        """Pictures drawn from their true embeddings (no codes): the ceiling of codes; None without the tower for it."""
        place = Path(self.inner.spec.detokenizer or "") / "image_encoder"
        if not place.is_dir():
            return None
        codec, decoder = self.inner.pictures, self.inner.pictures.decoder
        tower = load_clip_vision(place, device=self.device, dtype=codec.model.dtype, log=None)
        made: list[Image.Image] = []
        for start in range(0, len(pictures), self.batch):
            shown = [Image.fromarray(picture) for picture in pictures[start : start + self.batch]]
            pixels = torch.stack([self.inner.transform(picture) for picture in shown]).to(self.device, tower.dtype)
            made += decoder.decode(tower(pixel_values=pixels).image_embeds, generator=[
                torch.Generator("cpu").manual_seed(self.seed) for _ in shown])
        return made

    def _short(self) -> dict[str, Any]:
        return {"seed": self.seed, "batch_size": self.batch,
                "max_new_tokens": min(self.inner.settings().max_new_tokens, LONGEST_TEXT)}

    def _write(self, contents: Sequence[list[Any]], task: str) -> list[Codes | None]:
        written = self.inner.write_all(contents, task, batch_size=self.batch, seed=self.seed)
        return [one.images[0] if len(one.images) == 1 else None for one in written]

    def text(self, ids: Sequence[int]) -> str:
        """The words of an answer up to the marker of a user's turn."""
        parts = split_answer(self._reader().read_all(ids), self.inner.tokenizer)
        return Answer(parts, answer_after=self.inner.tasks.answer_after).text

    def _reader(self) -> AnswerReader:
        return AnswerReader(self.inner.tokenizer, self.inner.template.turn_marker)

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
