"""Every system as the model `seed` of lmms-eval 0.7 (installed in a separate environment).

    lmms-eval eval --model seed --model_args pretrained=nano --tasks mmbench_en_dev --batch_size 16

`--model_args`: `pretrained` (a system's name or folder) and the arguments of
`MultimodalSystem.from_pretrained`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import Any

from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from lmms_eval.protocol import ChatMessages

from seed_multimodal.device import limit_threads
from seed_multimodal.disk import JsonObject
from seed_multimodal.entry import log_line
from seed_multimodal.errors import GenerationError, ImageError
from seed_multimodal.evaluation.answers import Options
from seed_multimodal.inference.prompt import GenerationSettings
from seed_multimodal.language.messages import read_messages
from seed_multimodal.pipelines.base import MultimodalSystem
from seed_multimodal.progress import Progress

MODEL = ModelManifest("seed", chat_class_path=f"{__name__}.SeedModel")
SETTINGS = {entry.name for entry in fields(GenerationSettings)} - {"do_sample"}
SAMPLING = ("temperature", "top_p", "top_k")  # often None, or next to do_sample: false


class SeedModel(lmms):  # type: ignore[misc]
    """`generate_until` over the engine's batches.

    A prompt that cannot be answered counts as an empty answer.
    """

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
        self.system = MultimodalSystem.from_pretrained(
            pretrained, device=device or "auto", load_decoder=False, log=log_line, **options
        )
        self.device = self.system.engine.device
        limit_threads(self.system.llm, self.system.images.model)

    def generate_until(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """The text of each answer, in the order of `requests`."""
        answers: dict[int, GenerationResult] = {}
        with Progress("answer", len(requests), "sample") as bar:
            for indices in self._batches(requests):
                batch = [requests[index] for index in indices]
                results = self._answers(batch, batch[0].args[2])
                answers |= zip(indices, results, strict=True)
                bar.update(len(batch))
        return [answers[index] for index in range(len(requests))]

    def _batches(self, requests: Sequence[Instance]) -> Iterator[list[int]]:
        """Indices of requests with equal settings, which are answered together."""
        by_settings: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            by_settings.setdefault(str(request.args[2]), []).append(index)
        for _, indices in sorted(by_settings.items()):
            for start in range(0, len(indices), self.batch):
                yield indices[start : start + self.batch]

    def _answers(self, requests: Sequence[Instance], options: Options) -> list[GenerationResult]:
        """Answers of a batch; one that fails is answered one by one."""
        # 1. The answers.
        try:
            settings = self.system.settings("ask", **generation_settings(options))
            conversations = [read_messages(self._messages(request)) for request in requests]
            answers = self.system.generate_answers(
                conversations, "ask", settings, batch_size=self.batch
            )
        except (GenerationError, ImageError) as error:
            results: list[GenerationResult] = []
            if len(requests) > 1:
                for request in requests:
                    results += self._answers([request], options)
                return results
            log_line(f"{requests[0].task_name} {requests[0].doc_id}: {error}")
            return [GenerationResult("")]

        # 2. Their texts, up to the task's end.
        ends = options.get("until") or ()
        results = []
        for generated in answers:
            text = until(self.system.display_text(generated.answer, "ask"), ends)
            counts = TokenCounts(len(generated.prompt), len(generated.answer.ids))
            results.append(GenerationResult(text, counts))
        return results

    def _messages(self, request: Instance) -> list[JsonObject]:
        """The conversation of a sample; videos and sound are refused by `read_messages`."""
        _, doc_to_messages, _, index, task, split = request.args
        messages = ChatMessages(messages=doc_to_messages(self.task_dict[task][split][index]))
        as_mappings: list[JsonObject] = messages.to_hf_messages()
        return as_mappings

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        raise NotImplementedError("Tasks of several rounds are not supported.")

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        raise NotImplementedError("Tasks that compare likelihoods are not supported.")


def generation_settings(task_options: Options) -> Options:
    """A task's `generation_kwargs` as options of a system; greedy unless the task samples."""
    has_temperature = (task_options.get("temperature") or 0) > 0
    samples = bool(task_options.get("do_sample", has_temperature))
    options = {"do_sample": samples}
    for name, value in task_options.items():
        applies = samples or name not in SAMPLING
        if name in SETTINGS and applies and value is not None:
            options[name] = value
    return options


def until(text: str, ends: str | Sequence[str]) -> str:
    """A text up to the first of `ends`."""
    for end in [ends] if isinstance(ends, str) else ends:
        text = text.partition(end)[0] if end else text
    return text.strip()
