"""`OpenAIEngine`: inference by a completion server (vLLM, SGLang), with prompts and answers as ids.

    text:   prompt ids, stop_token_ids [<img>, </s>]                       ─► ids up to <img>
    image:  prompt + answer, allowed_token_ids codes, min = max_tokens 32  ─► 32 codes, then </img>; and text again
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

from seed_multimodal.engines.outside import OutsideEngine, StandIn
from seed_multimodal.errors import ConfigError, RequestError
from seed_multimodal.language.engine import Request
from seed_multimodal.language.tokenizer import MultimodalTokenizer


class OpenAIEngine(OutsideEngine):
    """Answers by `{url}/v1/completions`, `slots` at once; the environment's OPENAI_API_KEY is sent as the bearer."""

    def __init__(self, tokenizer: MultimodalTokenizer, url: str | None, slots: int = 16) -> None:
        if not url:
            raise ConfigError("The engine openai needs the server's URL: --url http://127.0.0.1:8000.")
        self.url, key = url.rstrip("/").removesuffix("/v1") + "/v1", os.environ.get("OPENAI_API_KEY")
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        with self._called("get", "models") as answer:
            card = json.loads(answer.content)["data"][0]
        words, self.model = tokenizer.vocabulary, card["id"]
        super().__init__(StandIn(SimpleNamespace(vocab_size=words.size, max_position_embeddings=int(
            card.get("max_model_len") or 2048))), tokenizer, slots)
        self._codes = list(range(words.code_start, words.code_start + words.n_codes))
        self._workers = ThreadPoolExecutor(self.slots, "seed-openai")

    def _advance(self) -> None:
        with self._lock:
            self._busy = False
            while self._waiting:
                self._workers.submit(self._answer, self._waiting.popleft())

    def _answer(self, request: Request) -> None:
        """All segments of an answer."""
        words, settings = self.tokenizer.vocabulary, request.settings
        stops = [*request.ends, words.boi_id] if settings.constrain else request.ends
        try:
            while not request.finished:
                if request.inside and settings.constrain:
                    count = min(words.tokens_per_image - request.done, request.left)
                    self._piece(request, (), allowed_token_ids=self._codes, min_tokens=count, max_tokens=count)
                    self._take(request, words.eoi_id)
                    continue
                least = min(max(settings.min_new_tokens - len(request.ids), 0), request.left)
                no_space = settings.constrain and request.left < words.image_length
                self._piece(request, stops, min_tokens=least, max_tokens=request.left,
                           logit_bias={str(words.boi_id): -100} if no_space else None)
        except Exception as error:  # noqa: BLE001 of this answer alone
            request.end(error)

    def _piece(self, request: Request, stops: Sequence[int], **limits: Any) -> None:
        """Stream one segment of an answer."""
        settings, count, choice = request.settings, len(request.ids), dict[str, Any]()
        body = {"model": self.model, "prompt": [*request.prompt.ids, *request.forced, *request.ids], "stream": True,
                "return_token_ids": True, "stop_token_ids": [*stops], "temperature": 0.0,
                "repetition_penalty": settings.repetition_penalty, **limits}
        if request.seed is not None:
            body |= {"temperature": settings.temperature, "top_p": settings.top_p, "top_k": settings.top_k or -1,
                     "seed": (request.seed + count) % 2**63}
        with self._called("post", "completions", body) as answer:
            for line in answer.iter_lines():
                if line.startswith(b"data: {"):
                    for choice in json.loads(line[5:]).get("choices", ()):
                        for token in choice["token_ids"] or ():
                            self._take(request, token)
                if request.finished:
                    return
        if choice.get("finish_reason") is None:
            raise RequestError(f"{self.url} broke off its answer.")
        if stops and choice["finish_reason"] == "stop" and not {*request.ids[count:][-1:]} & {*stops}:
            stop = choice.get("stop_reason", choice.get("matched_stop"))  # may be missing in the ids
            self._take(request, stop if isinstance(stop, int) else self.tokenizer.eos_id)

    def _take(self, request: Request, token: int) -> None:
        if not request.finished:
            request.ids.append(token)
            self._sent(request, token, True)

    @contextlib.contextmanager
    def _called(self, method: str, path: str, body: dict[str, Any] | None = None) -> Iterator[Any]:
        """The server's answer. Raises RequestError."""
        import requests

        url = f"{self.url}/{path}"
        try:
            with requests.request(method, url, json=body, headers=self._headers, stream=True,
                                  timeout=(5, 600)) as answer:
                if answer.status_code != 200:
                    raise RequestError(f"{url} answered with status {answer.status_code}: {answer.text[:300]}")
                yield answer
        except (ValueError, LookupError, TypeError) as error:  # invalid URL, JSON or ids
            raise RequestError(f"{url} is not the address of a completion server that returns token ids, such as "
                               "http://127.0.0.1:8000 of vLLM or SGLang.") from error
        except requests.exceptions.RequestException as error:
            raise RequestError(f"No completion server answers at {url}: start it (docs/how-to/scale-out.md) and try "
                               "again.") from error
