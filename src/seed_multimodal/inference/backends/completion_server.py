"""`CompletionServerEngine`: answers by a completion server (vLLM, SGLang), as token ids.

A completion server samples by itself and returns tokens instead of scores, so this is an engine of
its own, no backend of the scheduler. An answer is made in segments:

    text:   prompt ids, stop_token_ids [<img>, </s>]             ─► ids up to <img>
    image:  prompt + answer, allowed_token_ids codes,
            min_tokens = max_tokens = 32                         ─► 32 codes, </img>; text again
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Iterator
from typing import Any

from seed_multimodal.entry import MAX_RUNNING
from seed_multimodal.errors import ConfigError, RequestError, first_line
from seed_multimodal.inference.base_engine import BaseEngine, Request
from seed_multimodal.language.text_tokenizer import TextTokenizer
from seed_multimodal.proxies import direct

DEFAULT_CONTEXT = 2048  # of servers that do not tell theirs
POLL_SECONDS = 0.2
CONNECT_SECONDS = 5
READ_SECONDS = 600


class CompletionServerEngine(BaseEngine):
    """Answers by `{url}/v1/completions`, `max_running` at once.

    OPENAI_API_KEY is sent as the bearer token.

    Raises ConfigError: no URL; RequestError: no server answers there.
    """

    def __init__(
        self, tokenizer: TextTokenizer, url: str | None, *, max_running: int = MAX_RUNNING
    ) -> None:
        if not url:
            raise ConfigError(
                "The engine openai needs the server's URL: --url http://127.0.0.1:8000."
            )
        self.url = url.rstrip("/").removesuffix("/v1") + "/v1"
        key = os.environ.get("OPENAI_API_KEY")
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        with self._response("get", "models") as response:
            card = json.loads(response.content)["data"][0]
            self.model = card["id"]
            context = int(card.get("max_model_len") or DEFAULT_CONTEXT)
        super().__init__(tokenizer, context, context, max_running)
        vocabulary = tokenizer.vocabulary
        self._code_ids = list(
            range(vocabulary.code_start, vocabulary.code_start + vocabulary.n_codes)
        )
        self._rows = threading.Semaphore(max_running)
        self._waiting: set[Request] = set()

    @property
    def n_waiting(self) -> int:
        return len(self._waiting)

    def _put(self, request: Request) -> None:
        if request.settings.guidance != 1:
            raise ConfigError(
                "Guidance needs --engine torch; leave it at 1 with a completion server."
            )
        threading.Thread(
            target=self._run, args=(request,), name="seed-completion", daemon=True
        ).start()

    def _run(self, request: Request) -> None:
        """Wait for one of the places, and answer."""
        self._waiting.add(request)
        while not self._rows.acquire(timeout=POLL_SECONDS):
            request.stop_if_asked()
            if request.ended:
                self._waiting.remove(request)
                return
        self._waiting.remove(request)
        try:
            self._answer(request)
        except Exception as error:  # noqa: BLE001
            # Of this answer alone; the caller's iteration raises it.
            request.end(error)
        finally:
            self._rows.release()

    def _answer(self, request: Request) -> None:
        """All segments of an answer."""
        while not request.ended:
            n_before = len(request.ids)
            body = self._segment(request)
            choice = self._stream(request, body)
            if request.ended:
                return

            # The token that ended the segment; some servers leave it out of the ids.
            if "allowed_token_ids" in body:
                request.append(self.vocabulary.eoi_id)
            elif choice["finish_reason"] == "stop":
                last_id = request.ids[-1] if len(request.ids) > n_before else None
                if last_id not in body["stop_token_ids"]:
                    stop = choice.get("stop_reason", choice.get("matched_stop"))
                    end_id = stop if isinstance(stop, int) else self.tokenizer.eos_token_id
                    request.append(end_id)

    def _segment(self, request: Request) -> dict[str, Any]:
        """The JSON that asks for the next tokens: the remaining codes of an image, or text up to
        the end of the answer or the start of an image."""
        settings = request.settings
        vocabulary = self.vocabulary
        n_tokens = len(request.ids)
        remaining = request.budget - n_tokens
        body: dict[str, Any] = {
            "model": self.model,
            "prompt": [*request.prompts[0].ids, *request.ids],
            "stream": True,
            "return_token_ids": True,
            "stop_token_ids": list(request.end_ids),
            "min_tokens": min(max(settings.min_new_tokens - n_tokens, 0), remaining),
            "max_tokens": remaining,
            "temperature": 0.0,
            "repetition_penalty": settings.repetition_penalty,
        }
        if request.seed is not None:
            body["temperature"] = settings.temperature
            body["top_p"] = settings.top_p
            body["top_k"] = settings.top_k or -1
            # Segments of one seed would repeat the same random numbers.
            body["seed"] = (request.seed + n_tokens) % 2**63
        if not settings.constrain:
            return body

        n_codes = vocabulary.tokens_in_open_image([*request.initial_ids, *request.ids])
        if n_codes is not None:
            n_missing = min(vocabulary.tokens_per_image - n_codes, remaining)
            body["allowed_token_ids"] = self._code_ids
            body["stop_token_ids"] = []
            body["min_tokens"] = n_missing
            body["max_tokens"] = n_missing
            return body
        body["stop_token_ids"].append(vocabulary.boi_id)
        if request.image_budget - n_tokens < vocabulary.image_length:
            body["logit_bias"] = {str(vocabulary.boi_id): -100}
        return body

    def _stream(self, request: Request, body: dict[str, Any]) -> dict[str, Any]:
        """Append the tokens of one segment until it or the answer ends; returns the server's last
        choice."""
        choice: dict[str, Any] = {}
        with self._response("post", "completions", body) as response:
            for line in response.iter_lines():
                if line.startswith(b"data: {"):
                    for choice in json.loads(line[len(b"data: ") :]).get("choices", ()):
                        for token in choice["token_ids"] or ():
                            request.append(token)
                request.stop_if_asked()
                if request.ended:
                    return choice
        if choice.get("finish_reason") is None:
            raise RequestError(f"{self.url} broke off its answer.")
        return choice

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
