"""Every system as the model `seed` of lmms-eval, the field's harness (lmms-eval 0.7; an environment of its own).

    lmms-eval eval --model seed --model_args pretrained=nano --tasks mmbench_en_dev --batch_size 16

`--model_args`: `pretrained` (a system's name or folder) and the arguments of `MultimodalSystem.from_pretrained`.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from lmms_eval.protocol import ChatMessages

from seed_multimodal.device import limit_threads
from seed_multimodal.entry import log_line
from seed_multimodal.errors import GenerationError, ImageError
from seed_multimodal.inference.prompt import GenerationSettings
from seed_multimodal.language.messages import read_messages
from seed_multimodal.progress import Progress
from seed_multimodal.system.base import MultimodalSystem

MODEL = ModelManifest("seed", chat_class_path=f"{__name__}.SeedModel")
SETTINGS = {entry.name for entry in fields(GenerationSettings)}
GIVEN_BY_TASKS = ("temperature", "top_p", "top_k")  # often None, or next to do_sample: false


class SeedModel(lmms):  # type: ignore[misc]
    """`generate_until` over the engine's batches; a prompt that cannot be answered counts as an empty answer."""

    is_simple = False

    def __init__(
        self,
        pretrained: str = "nano",
        batch_size: int | str = 16,
        device: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.batch = int(batch_size)
        self.system: Any = MultimodalSystem.from_pretrained(
            pretrained, device=device or "auto", load_decoder=False, log=log_line, **options
        )
        self.device = self.system.engine.device
        limit_threads(self.system.llm, self.system.images.model)

    def generate_until(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """The text of each answer, in the order of `requests`."""
        answers: dict[int, GenerationResult] = {}
        kinds = itertools.groupby(
            sorted(enumerate(requests), key=lambda one: str(one[1].args[2])),
            key=lambda one: one[1].args[2],
        )
        with Progress("answer", len(requests), "sample") as bar:
            for given, group in kinds:
                numbered = list(group)
                for start in range(0, len(numbered), self.batch):
                    block = numbered[start : start + self.batch]
                    answers |= zip(
                        (number for number, _ in block),
                        self._answers([request for _, request in block], given),
                        strict=True,
                    )
                    bar.update(len(block))
        return [answers[number] for number in range(len(requests))]

    def _answers(
        self, requests: Sequence[Instance], given: Mapping[str, Any]
    ) -> list[GenerationResult]:
        """Of a batch; one that fails as a whole is answered one by one."""
        try:
            settings = self.system.settings("ask", **generation_settings(given))
            conversations = [read_messages(self._messages(request)) for request in requests]
            written = self.system.generate_answers(
                conversations, "ask", settings, batch_size=self.batch
            )
        except (GenerationError, ImageError) as error:
            if len(requests) > 1:
                return [
                    answer for request in requests for answer in self._answers([request], given)
                ]
            log_line(f"{requests[0].task_name} {requests[0].doc_id}: {error}")
            return [GenerationResult("")]
        return [
            GenerationResult(
                until(self.system.display_text(one.answer, "ask"), given.get("until") or ()),
                TokenCounts(len(one.prompt), len(one.answer.ids)),
            )
            for one in written
        ]

    def _messages(self, request: Instance) -> list[dict[str, Any]]:
        """The conversation of a sample; videos and sound are refused by `read_messages`."""
        _, doc_to_messages, _, number, task, split = request.args
        messages = ChatMessages(messages=doc_to_messages(self.task_dict[task][split][number]))
        found: list[dict[str, Any]] = messages.to_hf_messages()
        return found

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        raise NotImplementedError("Tasks of several rounds are not supported.")

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        raise NotImplementedError("Tasks that compare likelihoods are not supported.")


def generation_settings(given: Mapping[str, Any]) -> dict[str, Any]:
    """A task's `generation_kwargs` as options of a system; greedy unless the task samples."""
    samples = bool(given.get("do_sample", (given.get("temperature") or 0) > 0))
    left_out = () if samples else GIVEN_BY_TASKS
    known = {
        name: value
        for name, value in given.items()
        if name in SETTINGS and name not in left_out and value is not None
    }
    return {**known, "do_sample": samples}


def until(text: str, ends: str | Sequence[str]) -> str:
    """A text up to the first of `ends`."""
    for end in [ends] if isinstance(ends, str) else ends:
        text = text.partition(end)[0] if end else text
    return text.strip()
