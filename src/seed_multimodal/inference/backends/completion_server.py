"""`CompletionServerEngine`: answers by a completion server (vLLM, SGLang), as token ids.

A completion server samples by itself and returns tokens instead of scores, so this is an engine of
its own, no backend of the scheduler. An answer is made in segments:

    text:   prompt, stop_token_ids [</s>, <img>]                 ─► ids up to <img>
    image:  prompt + answer, allowed_token_ids codes and </img>,
            min_tokens to max_tokens (SEED-LLaMA: 32, 32)        ─► codes, </img>; text again

A prompt is sent as ids, or with features of images as the embeddings of all its tokens.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import math
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from seed_multimodal.entry import MAX_RUNNING
from seed_multimodal.errors import ConfigError, RequestError, first_line
from seed_multimodal.inference.base_engine import BaseEngine, GeneratedSequence, Likelihood
from seed_multimodal.inference.prompt import Prompt
from seed_multimodal.language.text_tokenizer import TextTokenizer
from seed_multimodal.proxies import direct

DEFAULT_CONTEXT = 2048  # of servers that do not tell theirs
COMPLETIONS = "v1/completions"
POLL_SECONDS = 0.2
CONNECT_SECONDS = 5
READ_SECONDS = 600
Choice = dict[str, Any]  # of a server's answer, or of a piece of it
Result = TypeVar("Result")


class CompletionServerEngine(BaseEngine):
    """Answers by `{url}/v1/completions`, `max_running` at once.

    OPENAI_API_KEY is sent as the bearer token.
    embed_prompt: a prompt with features of images → embeddings `[L, D]`.

    Raises ConfigError: no URL; RequestError: no server answers there.
    """

    def __init__(
        self,
        tokenizer: TextTokenizer,
        url: str | None,
        embed_prompt: Callable[[Prompt], Tensor],
        *,
        max_running: int = MAX_RUNNING,
    ) -> None:
        if not url:
            raise ConfigError(
                "The engine openai needs the server's URL: --url http://127.0.0.1:8000."
            )
        self.url = url.rstrip("/").removesuffix("/v1")
        key = os.environ.get("OPENAI_API_KEY")
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        with self._response("get", "v1/models") as response:
            card = json.loads(response.content)["data"][0]
            self.model = card["id"]
            context = int(card.get("max_model_len") or DEFAULT_CONTEXT)
        super().__init__(tokenizer, context, context, max_running)
        self._embed_prompt = embed_prompt
        vocabulary = tokenizer.vocabulary
        self._image_ids = [
            id
            for id in range(vocabulary.size)
            if vocabulary.is_code_id(id)
            or vocabulary.is_ignored_in_image(id)
            or id == vocabulary.eoi_id
        ]
        self._rows = threading.Semaphore(max_running)
        self._waiting: set[GeneratedSequence] = set()

    @property
    def n_waiting(self) -> int:
        return len(self._waiting)

    def forget(self) -> None:
        """As `Engine.forget`; vLLM answers it with VLLM_SERVER_DEV_MODE=1."""
        with self._response("post", "reset_prefix_cache"):
            pass

    def likelihoods(
        self, prompts: Sequence[Prompt], continuations: Sequence[Sequence[Sequence[int]]]
    ) -> list[list[Likelihood]]:
        if any(prompt.images for prompt in prompts):
            raise ConfigError(
                "A completion server has no likelihoods after features of images: they need "
                "--engine torch."
            )
        with ThreadPoolExecutor(self.n_rows) as threads:
            return [
                list(threads.map(partial(self._likelihood, prompt.ids), rows))
                for prompt, rows in zip(prompts, continuations, strict=True)
            ]

    def _likelihood(self, prompt: Sequence[int], continuation: Sequence[int]) -> Likelihood:
        def read(choice: Choice) -> Likelihood:
            tokens = choice["prompt_logprobs"][len(prompt) :]
            scored = [token[str(id)] for token, id in zip(tokens, continuation, strict=True)]
            log_probs = [float(score["logprob"]) for score in scored]
            return Likelihood(log_probs, all(score["rank"] == 1 for score in scored))

        return self._complete(read, prompt=[*prompt, *continuation], prompt_logprobs=0)

    def _complete(self, read: Callable[[Choice], Result], **fields: Any) -> Result:
        """What is read of the server's choice of one token."""
        body = {"model": self.model, "max_tokens": 1, **fields}
        with self._response("post", COMPLETIONS, body) as response:
            return read(self._choices(response.content)[0])

    def _choices(self, content: bytes) -> list[Choice]:
        """The choices in JSON. Raises RequestError: it has none, such as an error."""
        answer: dict[str, list[Choice]] = json.loads(content)
        if "choices" not in answer:
            raise RequestError(f"{self.url} sent {content.decode(errors='replace')[:300]}.")
        return answer["choices"]

    @cached_property
    def _log_prob_fields(self) -> dict[str, Any]:
        """What asks for log-probabilities. Raises ConfigError: not those after constraints, by
        which the only allowed token is certain."""
        fields = {"logprobs": 0, "return_tokens_as_token_ids": True}
        end_id = self.tokenizer.eos_token_id
        log_prob = self._complete(
            lambda choice: choice["logprobs"]["token_logprobs"][0],
            prompt=[end_id],
            allowed_token_ids=[end_id],
            **fields,
        )
        if log_prob != 0:
            raise ConfigError(
                "Log-probabilities need vllm serve --logprobs-mode processed_logprobs."
            )
        return fields

    def _put(self, sequence: GeneratedSequence) -> None:
        if sequence.settings.guidance != 1:
            raise ConfigError(
                "Guidance needs --engine torch; leave it at 1 with a completion server."
            )
        thread = threading.Thread(
            target=self._run, args=(sequence,), name="seed-completion", daemon=True
        )
        try:
            thread.start()
        except RuntimeError:  # as `InboxThread`
            self._run(sequence)

    def _run(self, sequence: GeneratedSequence) -> None:
        """Wait for one of the places, and answer."""
        self._waiting.add(sequence)
        while not self._rows.acquire(timeout=POLL_SECONDS):
            sequence.stop_if_asked()
            if sequence.ended:
                self._waiting.remove(sequence)
                return
        self._waiting.remove(sequence)
        try:
            self._answer(sequence)
        except Exception as error:  # noqa: BLE001
            # Of this answer alone; the caller's iteration raises it.
            sequence.end(error)
        finally:
            self._rows.release()

    def _answer(self, sequence: GeneratedSequence) -> None:
        """All segments of an answer. Raises RequestError: one ends otherwise than by a stop token,
        the budget, or all codes of an image."""
        while not sequence.ended:
            n_before = len(sequence.ids)
            body = self._segment(sequence)
            choice = self._stream(sequence, body)
            if sequence.ended:
                return
            segment = sequence.ids[n_before:]
            stop = choice.get("stop_reason", choice.get("matched_stop"))
            if stop is None:
                stop = self.tokenizer.eos_token_id
            match choice["finish_reason"]:
                case "stop" if segment and segment[-1] in body["stop_token_ids"]:
                    pass
                case "stop" if stop in body["stop_token_ids"] and not sequence.request.records:
                    # Some servers leave it out of the ids; its log-probability is unknown.
                    sequence.append(stop)
                case "length" if "allowed_token_ids" in body and len(segment) == body["max_tokens"]:
                    # An image that has all its codes can only end.
                    sequence.append(self.vocabulary.eoi_id, 0.0)
                case reason:
                    raise RequestError(
                        f"{self.url} ended its answer after {len(segment)} of {body['max_tokens']} "
                        f"tokens (finish_reason {reason!r}, stop token {stop!r})."
                    )

    def _segment(self, sequence: GeneratedSequence) -> dict[str, Any]:
        """The JSON that asks for the next tokens: the remaining codes of an image, or text up to
        the end of the answer or the start of an image."""
        settings = sequence.settings
        vocabulary = self.vocabulary
        prompt = sequence.prompts[0]
        n_tokens = len(sequence.ids)
        remaining = sequence.budget - n_tokens
        body: dict[str, Any] = {
            "model": self.model,
            **self._prompt(Prompt([*prompt.ids, *sequence.ids], prompt.images)),
            "stream": True,
            "return_token_ids": True,
            "stop_token_ids": [*sequence.end_ids, vocabulary.boi_id],
            # Other ends of the served model's files.
            "ignore_eos": self.tokenizer.eos_token_id not in sequence.end_ids,
            "min_tokens": min(max(settings.min_new_tokens - n_tokens, 0), remaining),
            "max_tokens": remaining,
            "temperature": 0.0,
            "repetition_penalty": settings.repetition_penalty,
            **(self._log_prob_fields if sequence.request.records else {}),
        }
        if sequence.seed is not None:
            body["temperature"] = settings.temperature
            body["top_p"] = settings.top_p
            body["top_k"] = settings.top_k or -1
            # Segments of one seed would repeat the same random numbers.
            body["seed"] = (sequence.seed + n_tokens) % 2**63
        n_codes = sequence.grammar.n_in_image
        if n_codes is not None and vocabulary.fixed_image_order:
            raise ConfigError(
                "SEED-X's images are hidden states, which a completion server does not return: "
                "they need --engine torch."
            )
        if not settings.constrain:
            return body

        if n_codes is not None:
            n_missing = min(vocabulary.tokens_per_image - n_codes, remaining)
            n_required = max(vocabulary.min_codes - n_codes, body["min_tokens"])
            body["allowed_token_ids"] = self._image_ids
            body["stop_token_ids"] = [vocabulary.eoi_id]
            body["min_tokens"] = min(n_required, n_missing)
            body["max_tokens"] = n_missing
            return body
        forbidden = [] if sequence.grammar.allows(vocabulary.boi_id) else [vocabulary.boi_id]
        if sequence.request.records:
            # Unlikely in a text, but part of its distribution; long lists slow the server down.
            outside = filter(vocabulary.is_image_token, range(vocabulary.size))
            forbidden += [id for id in outside if id != vocabulary.boi_id]
        if forbidden:
            body["logit_bias"] = {str(id): -100 for id in forbidden}
        return body

    @torch.inference_mode()
    def _prompt(self, prompt: Prompt) -> dict[str, Any]:
        """The field of a prompt: ids, or base64 of a torch file with embeddings."""
        if not prompt.images:
            return {"prompt": list(prompt.ids)}
        file = io.BytesIO()
        torch.save(self._embed_prompt(prompt).cpu(), file)
        return {"prompt_embeds": base64.b64encode(file.getvalue()).decode()}

    def _stream(self, sequence: GeneratedSequence, body: dict[str, Any]) -> Choice:
        """Append the tokens of one segment until it or the answer ends; returns the server's last
        choice."""
        last: Choice = {}
        n_before = len(sequence.ids)
        with self._response("post", COMPLETIONS, body) as response:
            for line in response.iter_lines():
                content = line.removeprefix(b"data:").strip()
                for choice in self._choices(content) if content.startswith(b"{") else ():
                    self._append(sequence, body, sequence.ids[n_before:], choice)
                    last = choice
                sequence.stop_if_asked()
                if sequence.ended:
                    return last
        if last.get("finish_reason") is None:
            raise RequestError(f"{self.url} broke off its answer.")
        return last

    def _append(
        self, sequence: GeneratedSequence, body: dict[str, Any], segment: list[int], choice: Choice
    ) -> None:
        """Append the tokens of a choice to those of its segment. Raises RequestError: they are not
        what was asked for."""
        ids = choice["token_ids"] or []
        log_probs = [0.0] * len(ids)
        if sequence.request.records and ids:
            log_probs = choice["logprobs"]["token_logprobs"]
        together = [*segment, *ids]
        allowed = body.get("allowed_token_ids", range(self.vocabulary.size))
        if (
            len(log_probs) != len(ids)
            or len(together) > body["max_tokens"]
            or not all(type(id) is int and id in allowed for id in ids)
            or not all(map(math.isfinite, log_probs))
            or not set(body["stop_token_ids"]).isdisjoint(together[:-1])
        ):
            raise RequestError(
                f"{self.url} sent the tokens {ids[:20]} with the log-probabilities "
                f"{log_probs[:20]}, where at most {body['max_tokens'] - len(segment)} tokens of "
                f"{len(allowed)} were asked for, up to a stop token."
            )
        for token, log_prob in zip(ids, log_probs, strict=True):
            sequence.append(token, log_prob)

    @contextlib.contextmanager
    def _response(
        self, method: str, path: str, body: dict[str, Any] | None = None
    ) -> Iterator[Any]:
        """The server's response. Raises RequestError."""
        import requests

        url = f"{self.url}/{path}"
        timeout = (CONNECT_SECONDS, READ_SECONDS)
        proxies = {"no_proxy": "*"} if direct(url) else None
        try:
            with requests.request(
                method,
                url,
                json=body,
                headers=self._headers,
                stream=True,
                timeout=timeout,
                proxies=proxies,
            ) as response:
                if response.status_code != 200:
                    raise RequestError(
                        f"{url} answered with status {response.status_code}: {response.text[:300]}"
                    )
                yield response
        except (ValueError, LookupError, TypeError) as error:  # invalid URL, JSON or ids
            raise RequestError(
                f"{url} is not the address of a completion server that returns token ids, such as "
                f"http://127.0.0.1:8000 of vLLM or SGLang ({first_line(error)})."
            ) from error
        except requests.exceptions.RequestException as error:
            raise RequestError(
                f"No completion server answers at {url} ({first_line(error)}): start it "
                "(docs/how-to/scale-out.md) and try again."
            ) from error
