"""The HTTP server: the original's `/generate`, OpenAI's routes below `/v1`, health and metrics.

Errors are JSON with one sentence, below `/v1` in OpenAI's form (statuses: docs/how-to/serve.md). Another address than
loopback needs a token.

Run `bash scripts/start_backend_nano.sh`, or in Python `serve(create_app(system), listen("127.0.0.1", 7890))`.
"""

from __future__ import annotations

import contextlib
import ctypes
import hmac
import json
import logging
import secrets
import socket
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import waitress
from flask import Flask, abort, jsonify, request
from werkzeug.exceptions import HTTPException

from seed_multimodal.entry import ended_by_sigterm
from seed_multimodal.errors import ConfigError, RequestError, SeedError
from seed_multimodal.serving import schema
from seed_multimodal.serving.backend import Backend

if TYPE_CHECKING:
    from seed_multimodal.system.base import MultimodalSystem

logger = logging.getLogger(__name__)
LOOPBACK = ("127.0.0.1", "localhost", "::1")
HEADERS = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": "5"}}


def create_app(
    system: MultimodalSystem, *, limits: schema.Limits | None = None, token: str = ""
) -> Flask:
    """A Flask application that serves one system; `token`: required as `Authorization: Bearer …`."""
    backend = Backend(system, limits)
    app = Flask("seed_multimodal")
    app.config["MAX_CONTENT_LENGTH"] = backend.limits.max_body_bytes
    app.extensions["seed_backend"] = backend

    @app.before_request
    def check_token() -> None:
        sent = (request.authorization and request.authorization.token) or ""
        if (
            token
            and request.path != "/health"
            and not hmac.compare_digest(sent.encode(), token.encode())
        ):
            abort(401, "This server asks for a token: send it as Authorization: Bearer ….")

    @app.after_request
    def count(response: Any) -> Any:
        if (
            request.url_rule is not None and not response.is_streamed
        ):  # streams are counted at their end
            backend.requests.labels(request.url_rule.rule, response.status_code).inc()
        return response

    @app.errorhandler(Exception)
    def refuse(error: Exception) -> Any:
        sentence, status = explained(error)
        return (
            jsonify(error_json(request.path.startswith("/v1"), sentence, status)),
            status,
            HEADERS.get(status, {}),
        )

    for path, view in (
        ("/health", backend.health),
        ("/ready", backend.ready),
        ("/metrics", backend.metrics),
        ("/v1/models", backend.models),
        ("/openapi.json", schema.openapi),
    ):
        app.add_url_rule(path, view_func=view)
    app.add_url_rule("/v1/models/<path:name>", view_func=backend.model)
    add_model(app, backend)
    return app


def add_model(app: Flask, backend: Backend) -> None:
    """Routes that the system answers."""

    def place() -> Any:
        """Context with a slot in the queue; the body is read when the request is admitted."""
        gone = request.environ.get("waitress.client_disconnected", lambda: False)
        return backend.slot(request.path, request.content_length or 0, gone)

    def read(kind: Any) -> Any:
        if not request.is_json:
            abort(415, "The request body must be JSON, sent with Content-Type: application/json.")
        return schema.read_request(kind, request.get_data(cache=False))

    @app.route("/generate", methods=["GET", "POST"])
    def generate() -> Any:
        with place() as watch:
            return backend.generate(read(schema.GenerateRequest), watch)

    @app.post("/v1/chat/completions")
    def chat() -> Any:
        def pieces() -> Iterator[dict[str, Any]]:
            with place() as watch:
                asked = read(schema.ChatRequest)
                yield from completion(backend.name, asked.stream, backend.chat(asked, watch))

        made = pieces()
        first = next(made)  # raises errors of the request
        return (
            streamed(app, backend, first, made) if "chunk" in first["object"] else [first, *made][0]
        )

    @app.post("/v1/images/generations")
    def generations() -> Any:
        with place() as watch:
            return backend.draw(read(schema.ImagesRequest), [], watch)

    @app.post("/v1/images/edits")
    def edits() -> Any:
        with place() as watch:
            asked = schema.read_request(schema.ImagesRequest, request.form.to_dict())
            files = [*request.files.getlist("image"), *request.files.getlist("image[]")]
            if not files or "mask" in request.files:
                raise RequestError("Send one or more files as 'image'; masks are not supported.")
            return backend.draw(asked, [file.read() for file in files], watch)

    @app.post("/v1/images/tokens")
    def tokens() -> Any:
        with place() as watch:
            return backend.tokenize(read(schema.TokensRequest), watch)


def completion(
    model: str, stream: bool, changes: Iterator[dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """An answer as OpenAI's chunks, or as one object."""
    head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}
    message: dict[str, Any] = {
        "role": "assistant",
        "content": "",
        "images": [],
        "boxes": [],
        "notes": [],
    }
    for number, change in enumerate(changes):
        finish, usage = change.pop("finish_reason", None), change.pop("usage", None)
        message.update({name: message[name] + value for name, value in change.items()})
        if stream:
            delta = change if number else {"role": "assistant", **change}
            yield {
                **head,
                "object": "chat.completion.chunk",
                **({"usage": usage} if usage else {}),
                "choices": [{"index": 0, "delta": delta, "finish_reason": finish}],
            }
    if not stream:
        yield {
            **head,
            "object": "chat.completion",
            "usage": usage,
            "choices": [{"index": 0, "message": message, "finish_reason": finish}],
        }


def streamed(
    app: Flask, backend: Backend, first: dict[str, Any], rest: Iterator[dict[str, Any]]
) -> Any:
    """Server-sent events; an error is sent as the last one, and counted with its status."""
    rule = request.url_rule.rule if request.url_rule is not None else ""

    def pieces() -> Iterator[str]:
        status = 200
        with contextlib.closing(rest):  # type: ignore[type-var]
            yield f"data: {json.dumps(first)}\n\n"
            try:
                yield from (f"data: {json.dumps(piece)}\n\n" for piece in rest)
            except Exception as error:  # noqa: BLE001
                sentence, status = explained(error)
                yield f"data: {json.dumps(error_json(True, sentence, status))}\n\n"
            finally:
                backend.requests.labels(rule, status).inc()
        yield "data: [DONE]\n\n"

    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    return app.response_class(pieces(), mimetype="text/event-stream", headers=headers)


def explained(error: Exception) -> tuple[str, int]:
    """The sentence and status of an error; a programming error is logged."""
    if isinstance(error, HTTPException):
        return error.description or error.name, error.code or 500
    if isinstance(error, SeedError):
        return str(error), 400
    logger.error("A request failed inside the server", exc_info=error)
    return "The server failed inside; its log has the details.", 500


def error_json(openai: bool, sentence: str, status: int) -> dict[str, Any]:
    """The body of an error: OpenAI's, or `error` with the keys of an answer."""
    if not openai:
        return {"error": sentence, **schema.GenerateResponse(error_msg=[sentence]).model_dump()}
    return {
        "error": {
            "message": sentence,
            "type": "server_error" if status >= 500 else "invalid_request_error",
            "param": None,
            "code": None,
        }
    }


def listen(host: str, port: int, token: str = "") -> socket.socket:
    """A listening socket, opened before a model is loaded for it; port 0: a free one.

    Raises:
        ConfigError: the port is taken or not allowed, or other machines could use the server without a token.
    """
    if host not in LOOPBACK and not token:
        raise ConfigError(
            f"{host} is reachable from other machines: set a password that clients send, by --token-file "
            f"or the variable SEED_TOKEN."
        )
    try:
        return socket.create_server(
            (host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET
        )
    except (OSError, OverflowError) as error:  # a port above 65535 overflows
        raise ConfigError(
            f"Cannot listen on {host}:{port}: the port is taken or not allowed; choose another with "
            f"--port."
        ) from error


def serve(app: Flask, sock: socket.socket, log: Callable[[str], None] = print) -> None:
    """Serve with waitress until interrupted or ended by SIGTERM."""
    backend: Backend = app.extensions["seed_backend"]
    limits, (host, port, *_) = backend.limits, sock.getsockname()
    with contextlib.suppress(
        OSError, AttributeError, TypeError
    ):  # glibc keeps what many threads have freed
        for option, value in ((-3, 1 << 20), (-8, 2)):  # M_MMAP_THRESHOLD, M_ARENA_MAX
            ctypes.CDLL(None).mallopt(option, value)
    logging.getLogger("waitress").setLevel(logging.ERROR)  # neither lost connections nor its queue
    server: Any = waitress.create_server(
        app,
        sockets=[sock],
        threads=limits.max_running + limits.max_waiting + 8,  # 8 for errors and /health
        connection_limit=512,
        channel_timeout=20,
        log_socket_errors=False,
        ident="SEED Multimodal",
        max_request_body_size=2 * limits.max_body_bytes,  # up to there Flask answers with JSON
        channel_request_lookahead=1,
    )  # keep reading during a request, to detect disconnects
    log(f"Init Done... answering at http://{host}:{port}/generate (Ctrl-C stops).")
    with ended_by_sigterm(backend.stopping.set):
        try:
            server.run()  # ends at KeyboardInterrupt, and waits for its threads
        finally:
            server.task_dispatcher.shutdown(
                timeout=60
            )  # drawings end; under their threads Python would abort
            server.close()
