"""A completion server on loopback that runs a language model, with vLLM's fields for ids."""

import base64
import io
import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch


class CompletionServer(ThreadingHTTPServer):
    """`bodies`: the requests; `breaks_after`: tokens after which connections are closed; `trims`:
    answers lack the id that ended them; `script`: a request's JSON → the bytes that are sent."""

    daemon_threads = True

    def __init__(self, llm):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.llm = llm
        self.breaks_after = 10_000
        self.trims = False
        self.script: Callable[[dict], bytes] | None = None
        self.lock = threading.Lock()
        self.pause = 0.0  # seconds before each token
        self.bodies: list[dict] = []
        self.headers: list = []
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    @torch.inference_mode()
    def tokens(self, body: dict):
        """Yield each id with its finish reason, or None."""
        if "prompt_embeds" in body:
            file = io.BytesIO(base64.b64decode(body["prompt_embeds"]))
            inputs = {"inputs_embeds": torch.load(file, weights_only=True)[None]}
        else:
            inputs = {"input_ids": torch.tensor([body["prompt"]])}
        cache = None
        generator = torch.Generator().manual_seed(body.get("seed", 0))
        ends = [*body["stop_token_ids"], *([] if body["ignore_eos"] else [2])]
        for count in range(1, body["max_tokens"] + 1):
            with self.lock:
                output = self.llm(**inputs, past_key_values=cache, use_cache=True)
            scores = output.logits[0, -1].float()
            cache = output.past_key_values
            for id, bias in (body.get("logit_bias") or {}).items():
                scores[int(id)] += bias
            # Only these, as within an image.
            if "allowed_token_ids" in body:
                allowed = torch.full_like(scores, float("-inf"))
                allowed[body["allowed_token_ids"]] = 0
                scores = scores + allowed
            if count <= body.get("min_tokens", 0):
                scores[ends] = float("-inf")
            if body["temperature"]:
                shares = (scores / body["temperature"]).softmax(-1)
                token = int(torch.multinomial(shares, 1, generator=generator))
            else:
                token = int(scores.argmax())
            reason = None
            if token in ends:
                reason = "stop"
            elif count == body["max_tokens"]:
                reason = "length"
            yield token, reason
            if reason:
                return
            inputs = {"input_ids": torch.tensor([[token]])}


class _Handler(BaseHTTPRequestHandler):
    server: Any

    def log_message(self, *_):
        pass

    def _json(self, status: int, values: dict):
        content = json.dumps(values).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_GET(self):  # noqa: N802
        length = self.server.llm.config.max_position_embeddings
        self._json(200, {"data": [{"id": "seed-llama", "max_model_len": length}]})

    def do_POST(self):  # noqa: N802
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.bodies.append(body)
        self.server.headers.append(self.headers)
        if body["model"] != "seed-llama" or not body.get("return_token_ids", True):
            self._json(404, {"error": {"message": "no such model"}})
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        if self.server.script is not None:
            self.wfile.write(self.server.script(body))
            return
        for count, (token, reason) in enumerate(self.server.tokens(body)):
            time.sleep(self.server.pause)
            if count == self.server.breaks_after:
                return
            # Some servers leave out the id that ends an answer.
            hidden = self.server.trims and reason == "stop"
            choice = {
                "index": 0,
                "text": "",
                "token_ids": [] if hidden else [token],
                "finish_reason": reason,
                "stop_reason": token if reason == "stop" and token != 2 else None,
            }
            self.wfile.write(f"data: {json.dumps({'choices': [choice]})}\n\n".encode())
            self.wfile.flush()
        self.wfile.write(b"data: [DONE]\n\n")
