"""The HTTP server: the original's `/generate`, OpenAI's routes below `/v1`, health and metrics.

Errors are JSON with one sentence (below `/v1` in OpenAI's form): 400 a request that cannot be answered, 401 no token,
404/405 a wrong address or method, 413 a body that is too large, 415 not JSON, 429 (with Retry-After) too many requests,
503 the server is being stopped, 500 a programming error. Another address than loopback needs a token.

Run `bash scripts/start_backend_nano.sh`, or in Python `serve(create_app(MultimodalSystem.from_pretrained("nano")))`.
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

from seed_multimodal import __version__
from seed_multimodal.entry import ended_by_sigterm
from seed_multimodal.errors import ConfigError, SeedError
from seed_multimodal.images.io import image_to_base64
from seed_multimodal.serving.backend import Backend, Refused, data_url
from seed_multimodal.serving.schema import (
    EVENTS,
    JSON_LINES,
    ROUTES,
    ChatCompletion,
    ChatRequest,
    FieldError,
    GenerateRequest,
    GenerateResponse,
    ImagesRequest,
    Limits,
    TokensRequest,
    openapi,
    read_request,
)

if TYPE_CHECKING:
    from flask import Flask

    from seed_multimodal.system.base import MultimodalSystem

logger = logging.getLogger(__name__)
CANNOT_LISTEN = "Cannot listen on {host}:{port}: the port is taken or not allowed; choose another with --port."
NEEDS_TOKEN = ("{host} is reachable from other machines: set a password that clients send, by --token-file or the "
               "variable SEED_TOKEN.")
INSIDE = "The server failed inside; its log has the details."
LOOPBACK = ("127.0.0.1", "localhost", "::1")
IDLE_SECONDS = 20  # timeout of idle connections
HEADER_BYTES = 16 << 10
SPARE_THREADS = 8  # for errors and /health, besides one per running or queued request


def create_app(system: MultimodalSystem, *, limits: Limits | None = None, token: str = "") -> Flask:
    """A Flask application that serves one system; `token`: required as `Authorization: Bearer …`."""
    from flask import Flask, abort, request

    backend = Backend(system, limits)
    app = Flask("seed_multimodal")
    app.config["MAX_CONTENT_LENGTH"] = backend.limits.max_body_bytes
    app.extensions["seed_backend"] = backend

    @app.before_request
    def check_token() -> None:
        sent = request.headers.get("Authorization", "").encode()
        if token and request.path != "/health" and not hmac.compare_digest(sent, f"Bearer {token}".encode()):
            abort(401)

    @app.after_request
    def count(response: Any) -> Any:
        if request.path in ROUTES:
            backend.requests.labels(request.path, response.status_code).inc()
        return response

    add_state(app, backend)
    add_model(app, backend)
    add_errors(app, backend)
    return app


def add_state(app: Flask, backend: Backend) -> None:
    """Routes that never wait for the model."""
    from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

    @app.get("/health")
    def health() -> Any:
        return backend.health()

    @app.get("/ready")
    def ready() -> Any:
        return {"ready": not backend.stopping.is_set()}, 503 if backend.stopping.is_set() else 200

    @app.get("/metrics")
    def metrics() -> Any:
        return app.response_class(generate_latest(backend.metrics), content_type=CONTENT_TYPE_LATEST)

    @app.get("/openapi.json")
    def document() -> Any:
        return openapi(__version__)

    @app.get("/v1/models")
    def models() -> Any:
        return {"object": "list", "data": [{"id": backend.name, "object": "model", "created": backend.created,
                                            "owned_by": "seed-multimodal"}]}


def add_model(app: Flask, backend: Backend) -> None:
    """Routes that the system answers."""
    from flask import abort, request

    def place() -> Any:
        """Context with a slot in the queue; the body is read when the request is admitted."""
        if request.path != "/v1/images/edits" and not request.is_json:
            abort(415)
        gone = request.environ.get("waitress.client_disconnected", lambda: False)
        return backend.place(request.path, request.content_length or 0, gone)

    def images(kind: str, made: Any) -> Any:
        write: dict[str, Callable[[Any], Any]] = {"b64_json": image_to_base64, "url": data_url, "codes": list}
        return {"created": int(time.time()), "data": [{kind: write[kind](one)} for one in made]}

    @app.route("/generate", methods=["GET", "POST"])
    def generate() -> Any:
        def pieces() -> Iterator[dict[str, Any]]:
            with place() as watch:
                yield from backend.generate(read_request(GenerateRequest, request.get_data(cache=False)), watch)

        made = pieces()
        first = next(made)  # raises errors of the request
        return streamed(app, first, made, JSON_LINES) if "images" not in first else [first, *made][0]

    @app.post("/v1/chat/completions")
    def chat() -> Any:
        def pieces() -> Iterator[dict[str, Any]]:
            with place() as watch:
                asked = read_request(ChatRequest, request.get_data(cache=False))
                yield from completion(backend.name, asked, backend.chat(asked, watch))

        made = pieces()
        first = next(made)
        return streamed(app, first, made, EVENTS) if "chunk" in first["object"] else [first, *made][0]

    @app.post("/v1/images/generations")
    def generations() -> Any:
        with place() as watch:
            asked = read_request(ImagesRequest, request.get_data(cache=False))
            return images(asked.response_format, backend.draw(asked, [], watch))

    @app.post("/v1/images/edits")
    def edits() -> Any:
        with place() as watch:
            asked = read_request(ImagesRequest, request.form.to_dict())
            files = [*request.files.getlist("image"), *request.files.getlist("image[]")]
            if not files or "mask" in request.files:
                raise FieldError("image", "Send one or more files as 'image'; masks are not supported.")
            return images(asked.response_format, backend.draw(asked, [file.read() for file in files], watch))

    @app.post("/v1/images/tokens")
    def tokens() -> Any:
        with place() as watch:
            asked = read_request(TokensRequest, request.get_data(cache=False))
            return images("codes" if asked.images else "b64_json", backend.tokenize(asked, watch))


def completion(model: str, asked: ChatRequest, changes: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """An answer as OpenAI's chunks, or as one object."""
    made = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}
    message: dict[str, Any] = {"role": "assistant"}
    for number, change in enumerate(changes):
        finish, usage = change.pop("finish_reason", None), change.pop("usage", None)
        message.update({name: message[name] + value if name in message else value for name, value in change.items()})
        delta = change if number else {"role": "assistant", **change}
        if asked.stream:
            choice = {"index": 0, "delta": delta, "finish_reason": finish}
            yield {"object": "chat.completion.chunk", **made, "choices": [choice]}
    if not asked.stream:
        choices = [{"message": message, "finish_reason": finish}]
        yield ChatCompletion.model_validate({**made, "usage": usage, "choices": choices}).model_dump()
    elif (asked.stream_options or {}).get("include_usage"):
        yield {"object": "chat.completion.chunk", **made, "choices": [], "usage": usage}


def streamed(app: Flask, first: dict[str, Any], rest: Iterator[dict[str, Any]], kind: str) -> Any:
    """A streamed answer: JSON lines or server-sent events; an error is sent as the last one."""
    write = "data: {}\n\n".format if kind == EVENTS else "{}\n".format

    def pieces() -> Iterator[str]:
        with contextlib.closing(rest):  # type: ignore[type-var]
            yield write(json.dumps(first))
            try:
                yield from (write(json.dumps(piece)) for piece in rest)
            except Exception as error:
                if not isinstance(error, SeedError):
                    logger.exception("A request failed inside the server")
                said = str(error) if isinstance(error, SeedError) else INSIDE
                yield write(json.dumps(error_json(kind == EVENTS, said)))
        yield write("[DONE]") if kind == EVENTS else ""

    return app.response_class(pieces(), mimetype=kind, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})


def add_errors(app: Flask, backend: Backend) -> None:
    """Error handlers, in the format of the route's protocol."""
    from flask import jsonify, request
    from werkzeug.exceptions import HTTPException

    known = {
        401: "This server asks for a token: send it as Authorization: Bearer ….",
        404: "There is nothing at this address; use /generate or /health, or /v1 as /openapi.json lists it.",
        405: "This method is not allowed here; use POST /generate or GET /health.",
        413: f"The request body is larger than {backend.limits.max_body_bytes >> 20} MiB.",
        415: "The request body must be JSON, sent with Content-Type: application/json.",
    }

    def answer(sentence: str, status: int, field: str | None = None) -> Any:
        return jsonify(error_json(request.path.startswith("/v1"), sentence, status, field)), status

    @app.errorhandler(SeedError)
    def refuse(error: SeedError) -> Any:
        if isinstance(error, Refused):
            return *answer(str(error), error.status), {"Retry-After": str(error.seconds)} if error.seconds else {}
        return answer(str(error), 400, error.field if isinstance(error, FieldError) else None)

    @app.errorhandler(HTTPException)
    def http_error(error: HTTPException) -> Any:
        if error.code is None or error.code < 400:
            return error
        return answer(known.get(error.code, error.description or error.name), error.code)

    @app.errorhandler(Exception)
    def fault(error: Exception) -> Any:
        logger.exception("A request failed inside the server")
        return answer(INSIDE, 500)


def error_json(openai: bool, sentence: str, status: int = 500, field: str | None = None) -> dict[str, Any]:
    """The body of an error: OpenAI's, or `error` with the keys of an answer."""
    if not openai:
        return {"error": sentence, **GenerateResponse(error_msg=[sentence]).to_json()}
    kind = {401: "authentication_error", 429: "rate_limit_error"}.get(status, "invalid_request_error")
    return {"error": {"message": sentence, "type": "server_error" if status >= 500 else kind, "param": field,
                      "code": None}}


def check_address(host: str, port: int, token: str = "") -> None:
    """Check that a server can listen there, before a model is loaded for it.

    Raises:
        ConfigError: the port is taken or not allowed, or other machines could use the server without a token.
    """
    if host not in LOOPBACK and not token:
        raise ConfigError(NEEDS_TOKEN.format(host=host))
    _listen(host, port).close()


def _listen(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError) as error:  # a port above 65535 overflows
        raise ConfigError(CANNOT_LISTEN.format(host=host, port=port)) from error


def serve(
    app: Flask, *, host: str = "127.0.0.1", port: int = 7890, log: Callable[[str], None] | None = print
) -> None:
    """Serve with waitress until interrupted or ended by SIGTERM; port 0 chooses a free one and logs it.

    Raises:
        ConfigError: the port is taken or not allowed.
    """
    import waitress

    backend: Backend = app.extensions["seed_backend"]
    with contextlib.suppress(OSError, AttributeError, TypeError):  # glibc keeps what many threads have freed
        for option, value in ((-3, 1 << 20), (-8, 2)):  # M_MMAP_THRESHOLD, M_ARENA_MAX
            ctypes.CDLL(None).mallopt(option, value)
    sock, limits = _listen(host, port), backend.limits
    logging.getLogger("waitress").setLevel(logging.ERROR)  # lost connections are not reported
    server: Any = waitress.create_server(
        app, sockets=[sock], threads=limits.max_running + limits.max_waiting + SPARE_THREADS, connection_limit=512,
        asyncore_use_poll=True, channel_timeout=IDLE_SECONDS, max_request_header_size=HEADER_BYTES,
        max_request_body_size=2 * limits.max_body_bytes,  # up to there Flask answers with JSON
        channel_request_lookahead=1,  # keep reading during a request, to detect disconnects
        log_socket_errors=False, ident="SEED Multimodal")
    if log is not None:
        log(f"Init Done... answering at http://{host}:{sock.getsockname()[1]}/generate (Ctrl-C stops).")
    with ended_by_sigterm(backend.stopping.set):
        try:
            server.run()  # ends at KeyboardInterrupt, and waits for its threads
            if log is not None:
                log("Stopped.")
        finally:
            server.close()
