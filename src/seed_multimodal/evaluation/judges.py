"""Models that answer questions about drawings, with probabilities.

    judge = load_judge("Qwen3-VL-8B-Instruct", device)
    question = Question("Is there a cat?", [["yes", "Yes"], ["no", "No"]])
    judge.probabilities(image, [question])    # [[0.9, 0.1]]

A folder of transformers with an image-text model, or a system of this library (`nano`, `8b`,
`seed-x-i` or a folder).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from PIL import Image
from torch import Tensor
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from seed_multimodal.disk import read_json_object
from seed_multimodal.errors import CheckpointError, first_line
from seed_multimodal.evaluation.vqa import DIGITS
from seed_multimodal.pipelines.base import MultimodalSystem

ONE_WORD = " Answer in one word."  # behind questions to image-text models, as in GenEval 2


class Question(NamedTuple):
    """A question, and the answers whose probabilities are needed.

    answers: each as the ways to write it, whose probabilities are added.
    """

    text: str
    answers: Sequence[Sequence[str]]


class QuestionJudge(Protocol):
    """Answers questions."""

    def probabilities(self, image: Image.Image, questions: Sequence[Question]) -> list[list[float]]:
        """Of each question about an image, the probability of each answer."""
        ...


def answer_forms(answer: str) -> list[str]:
    """Ways to write a short answer: lower case, capitalised, as digits."""
    lower = answer.lower()
    forms = [lower, lower.capitalize()]
    if lower in DIGITS:
        forms.append(DIGITS[lower])
    return list(dict.fromkeys(forms))  # digits have one form


def load_judge(name: str, device: torch.device) -> QuestionJudge:
    """The judge of a name or folder. Raises CheckpointError, ConfigError: no such model."""
    # A folder of transformers; other folders are systems, a training's checkpoint, too.
    config = Path(name) / "config.json"
    if config.is_file() and not config.with_name("system.json").is_file():
        if read_json_object(config).get("model_type") in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
            return HubJudge(Path(name), device)
    return SystemJudge(name, device)


class SystemJudge:
    """A system of this library, which is asked for one word or phrase."""

    def __init__(self, name: str, device: torch.device) -> None:
        self.system = MultimodalSystem.from_pretrained(
            name, device=str(device), load_decoder=False, log=None
        )

    def probabilities(self, image: Image.Image, questions: Sequence[Question]) -> list[list[float]]:
        """By the likelihood of each form as the beginning of the answer."""
        # 1. All forms of each question's answers.
        forms = [[form for answer in item.answers for form in answer] for item in questions]
        texts = [item.text for item in questions]
        likelihoods = self.system.likelihoods([image] * len(texts), texts, forms)

        # 2. The forms of an answer together.
        probabilities: list[list[float]] = []
        for item, row in zip(questions, likelihoods, strict=True):
            of_forms = iter(row)
            probabilities.append([])
            for answer in item.answers:
                of_answer = islice(of_forms, len(answer))
                probabilities[-1].append(sum(math.exp(form.total) for form in of_answer))
        return probabilities


class HubJudge:
    """An image-text model of transformers, by the probability of the answers' first tokens."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        try:
            self.processor: Any = AutoProcessor.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
            model: Any = AutoModelForImageTextToText.from_pretrained(
                folder,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                dtype="auto",
            )
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{folder}: no image-text model ({first_line(error)})."
            ) from error
        self.model = model.to(device).eval()
        self.device = device

    @torch.inference_mode()
    def probabilities(self, image: Image.Image, questions: Sequence[Question]) -> list[list[float]]:
        """Question by question, as in GenEval 2's program."""
        rgb = image.convert("RGB")
        probabilities: list[list[float]] = []
        for item in questions:
            inputs = self._inputs(rgb, item.text).to(self.device, self.model.dtype)
            scores: Tensor = self.model(**inputs).logits[0, -1].float().softmax(dim=-1)  # [V]
            probabilities.append(
                [float(scores[self._first_tokens(answer)].sum()) for answer in item.answers]
            )
        return probabilities

    def _inputs(self, image: Image.Image, question: str) -> Any:
        """The question in the chat template; models without one are asked in BLIP-2's form."""
        if not self.processor.chat_template:
            text = f"Question: {question} Answer:"
            return self.processor(images=image, text=text, return_tensors="pt")
        content = [{"type": "image", "image": image}, {"type": "text", "text": question + ONE_WORD}]
        return self.processor.apply_chat_template(
            [{"role": "user", "content": content}],
            tokenize=True,
            add_generation_prompt=True,
            return_dict=True,
            return_tensors="pt",
        )

    def _first_tokens(self, forms: Sequence[str]) -> list[int]:
        """The tokens with which an answer may begin, with or without a blank before it."""
        tokenizer = self.processor.tokenizer
        tokens: set[int] = set()
        for form in forms:
            for text in (form, f" {form}"):
                ids = tokenizer.encode(text, add_special_tokens=False)
                tokens.add(ids[0])
        return sorted(tokens)
