"""Every system as the model `seed` of lmms-eval 0.7 (installed in a separate environment).

    lmms-eval eval --model seed --model_args pretrained=nano --tasks mmbench_en_dev --batch_size 16
    lmms-eval eval --model seed --model_args pretrained=nano --tasks seedbench_ppl --force_simple
    lmms-eval eval --model seed --model_args pretrained=nano,image_dir=drawings --tasks WISE

`--model_args`: `pretrained` (a system's name or folder), the arguments of
`MultimodalSystem.from_pretrained`, and of tasks whose answers are images:

image_dir      folder of the drawings; answers are JSON, {"text": …, "images": [files]}
force_image    false: the system decides whether it draws (default: every answer is an image)
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from lmms_eval.protocol import ChatMessages
from PIL import Image

from seed_multimodal.device import limit_threads
from seed_multimodal.disk import JsonObject
from seed_multimodal.entry import log_line
from seed_multimodal.errors import DataError, GenerationError, ImageError, RequestError
from seed_multimodal.evaluation.metrics import grouped
from seed_multimodal.images.io import save_image
from seed_multimodal.inference.prompt import GenerationSettings
from seed_multimodal.language.messages import Message, read_messages
from seed_multimodal.pipelines.base import MultimodalSystem
from seed_multimodal.pipelines.tasks import Task
from seed_multimodal.progress import Progress

T = TypeVar("T")
MODEL = ModelManifest(
    "seed", simple_class_path=f"{__name__}.SimpleSeedModel", chat_class_path=f"{__name__}.SeedModel"
)
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
        image_dir: str | None = None,
        force_image: bool = True,
        **options: Any,
    ) -> None:
        super().__init__()
        self.batch = int(batch_size)
        self.image_dir = None if image_dir is None else Path(image_dir)
        self.force_image = force_image
        self.system = MultimodalSystem.from_pretrained(
            pretrained,
            device=device or "auto",
            load_decoder=image_dir is not None,
            log=log_line,
            **options,
        )
        self.device = self.system.engine.device
        limit_threads(self.system.llm, self.system.images.model)

    def generate_until(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """Each answer, in the order of `requests`."""
        # Requests with equal settings are answered together.
        settings = [str(self._options(request)) for request in requests]
        results: dict[int, GenerationResult] = {}
        for batch in self._batches(grouped(range(len(requests)), settings), "answer"):
            answers = self._answered([requests[index] for index in batch])
            results |= zip(batch, answers, strict=True)
        return [results[index] for index in range(len(requests))]

    def _batches(self, groups: Mapping[str, list[T]], label: str) -> Iterator[list[T]]:
        """Batches of items of one group each, with a progress bar."""
        with Progress(label, sum(map(len, groups.values())), "sample") as bar:
            for group in groups.values():
                for start in range(0, len(group), self.batch):
                    batch = group[start : start + self.batch]
                    yield batch
                    bar.update(len(batch))

    def _answered(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """Answers of a batch; one that fails is answered one by one."""
        try:
            if self.image_dir is None:
                return self._answers(requests)
            return self._image_answers(requests)
        except (GenerationError, ImageError, RequestError) as error:
            if len(requests) > 1:
                return [self._answered([request])[0] for request in requests]
            log_line(f"{requests[0].task_name} {requests[0].doc_id}: {error}")
            return [GenerationResult("")]

    def _answers(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """Texts, up to the task's end."""
        options = generation_settings(self._options(requests[0]))
        settings = self.system.settings("ask", **options)
        conversations = [self._conversation(request) for request in requests]
        tasks = [Task("ask", conversation, settings) for conversation in conversations]
        results: list[GenerationResult] = []
        batches = self.system.generate(tasks, batch_size=self.batch)
        for item in itertools.chain.from_iterable(batches):
            text = self.system.family.text(item.answer, "ask").strip()
            counts = TokenCounts(len(item.prompt), len(item.answer.ids))
            results.append(GenerationResult(text, counts))
        return results

    # ---- images

    def _image_answers(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """JSON with the texts and the files of images."""
        conversations = [self._conversation(request) for request in requests]

        # 1. The system decides what it draws; the engine batches answers of several threads.
        if not self.force_image:
            options = generation_settings(self._options(requests[0]))
            with ThreadPoolExecutor(self.batch) as pool:
                answers = pool.map(lambda turns: self.system.chat(turns, **options), conversations)
            return [
                self._saved(request, answer.text, answer.images)
                for request, answer in zip(requests, answers, strict=True)
            ]

        # 2. A text is drawn; an instruction with images edits them.
        results: dict[int, GenerationResult] = {}
        for edits, rows in grouped(range(len(requests)), map(_edits, conversations)).items():
            messages = [conversations[row][0] for row in rows]
            texts = [message.text for message in messages]
            if edits:
                sources = [message.images for message in messages]
                images = self.system.edit(sources, texts, batch_size=self.batch, read_back=False)
            else:
                images = self.system.draw(texts, batch_size=self.batch, read_back=False)
            for row, image in zip(rows, images, strict=True):
                results[row] = self._saved(requests[row], "", [image])
        return [results[row] for row in range(len(requests))]

    def _saved(
        self, request: Instance, text: str, images: Sequence[Image.Image]
    ) -> GenerationResult:
        """An answer as the image tasks of lmms-eval read it."""
        assert self.image_dir is not None
        folder = self.image_dir / str(request.task_name)
        files: list[str] = []
        for number, image in enumerate(images):
            name = f"{request.task_name}_{request.doc_id}_{number}.png"
            files.append(str(save_image(image, folder / name, DataError).absolute()))
        return GenerationResult(json.dumps({"text": text, "images": files}, ensure_ascii=False))

    # ---- requests

    def _options(self, request: Instance) -> JsonObject:
        """A request's `generation_kwargs`."""
        return request.args[2]

    def _conversation(self, request: Instance) -> list[Message]:
        """The conversation of a sample; videos and sound are refused by `read_messages`."""
        _, doc_to_messages, _, index, task, split = request.args
        messages = ChatMessages(messages=doc_to_messages(self.task_dict[task][split][index]))
        as_mappings = messages.to_hf_messages()
        return read_messages(as_mappings)

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        raise NotImplementedError("Tasks of several rounds are not supported.")

    def loglikelihood(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        raise NotImplementedError("Tasks that compare likelihoods need --force_simple.")


class SimpleSeedModel(SeedModel):
    """With `--force_simple`: also log-likelihoods, which lmms-eval asks of simple models only."""

    is_simple = True

    def loglikelihood(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """The loss of a continuation (lmms-eval takes the lowest), and whether it is greedy.

        The loss is the mean over tokens, as that of the models that lmms-eval brings. Version 0.7
        makes a text of any result that is no `GenerationResult`, also of a pair.
        """
        # 1. Requests about the same sample share a prompt.
        samples: list[tuple[Any, ...]] = []
        for request in requests:
            if len(request.args) == 2:
                raise NotImplementedError("Unconditional likelihoods are not supported.")
            context, _, _, *sample = request.args
            samples.append((context, *sample))
        indices_of_samples = list(grouped(range(len(requests)), samples).values())

        # 2. Their likelihoods.
        results: dict[int, GenerationResult] = {}
        for batch in self._batches({"": indices_of_samples}, "likelihood"):
            rows = self.system.answer_likelihoods(
                [self._conversation(requests[indices[0]]) for indices in batch],
                [[self._answer(requests[index]) for index in indices] for indices in batch],
                "ask",
                batch_size=self.batch,
            )
            likelihoods = chain.from_iterable(rows)
            for index, likelihood in zip(chain.from_iterable(batch), likelihoods, strict=True):
                pair = (-likelihood.mean, likelihood.is_greedy)
                results[index] = GenerationResult(pair)
        return [results[index] for index in range(len(requests))]

    def _answer(self, request: Instance) -> str:
        """The continuation of a request; the tokenizer adds the blank before it."""
        continuation = request.args[1]
        if callable(continuation):
            _, _, _, index, task, split = request.args
            continuation = continuation(self.task_dict[task][split][index])
        return str(continuation).strip()

    def _options(self, request: Instance) -> JsonObject:
        return request.args[1]

    def _conversation(self, request: Instance) -> list[Message]:
        context, _, doc_to_visual, index, task, split = request.args
        visuals = doc_to_visual(self.task_dict[task][split][index])
        # A visual that is a text would be read as a message: it is the path of a video.
        images = [{"type": "image", "image": visual} for visual in visuals]
        return read_messages([{"role": "user", "content": [*images, context]}])


def _edits(conversation: Sequence[Message]) -> bool:
    """Whether a conversation is an instruction about images. Raises RequestError: several turns."""
    if len(conversation) > 1:
        raise RequestError("Images are drawn for single messages; use force_image=false.")
    return not conversation[0].is_text


def generation_settings(task_options: JsonObject) -> JsonObject:
    """A task's `generation_kwargs` as options of a system; greedy unless the task samples."""
    has_temperature = (task_options.get("temperature") or 0) > 0
    samples = bool(task_options.get("do_sample", has_temperature))
    ends = task_options.get("until") or ()
    options = {"do_sample": samples, "stop": (ends,) if isinstance(ends, str) else tuple(ends)}
    for name, value in task_options.items():
        applies = samples or name not in SAMPLING
        if name in SETTINGS and applies and value is not None:
            options[name] = value
    return options
