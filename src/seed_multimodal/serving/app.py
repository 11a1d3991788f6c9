"""The HTTP server: the original's `/generate`, OpenAI's routes below `/v1`, health and metrics.

Errors are JSON with one sentence, below `/v1` in OpenAI's form (statuses: docs/how-to/serve.md).
Another address than loopback needs a token.

Run `bash scripts/start_backend.sh nano`, or in Python
`serve(create_app(system), listen("127.0.0.1", 7890))`.
"""

from __future__ import annotations

import contextlib
import gc
import hmac
import itertools
import json
import logging
import secrets
import socket
import threading
import time
from collections.abc import Callable, Collection, Generator, Iterator
from typing import TYPE_CHECKING, Any

import waitress
from flask import Flask, Response, abort, jsonify, request
from flask.typing import ResponseReturnValue, RouteCallable
from werkzeug.exceptions import HTTPException, MethodNotAllowed
from werkzeug.serving import make_server

from seed_multimodal.device import is_out_of_memory, return_freed_memory, trim_memory
from seed_multimodal.disk import JsonObject
from seed_multimodal.entry import ended_by_sigterm
from seed_multimodal.errors import ConfigError, SeedError, first_line
from seed_multimodal.serving import schema
from seed_multimodal.serving.backend import Backend, Deadline
from seed_multimodal.serving.responses import ResponseEvents

if TYPE_CHECKING:
    from seed_multimodal.pipelines.base import MultimodalSystem

logger = logging.getLogger(__name__)
EDITS = "/v1/images/edits"  # its body is a form with files
LOOPBACK = ("127.0.0.1", "localhost", "::1")
HEADERS = {
    401: {"WWW-Authenticate": "Bearer"},
    429: {"Retry-After": "5"},
    503: {"Retry-After": "5"},
}
LOADING = "The model is loading; try again later."

CONNECTIONS = 512
IDLE_SECONDS = 20  # after which a silent connection is closed
SHUTDOWN_SECONDS = 60
TRIM_SECONDS = 60  # between two returns of freed memory to the system
SPARE_THREADS = 8  # for errors and /health while the queue is full


# ---- the application


def create_app(
    system: MultimodalSystem,
    *,
    limits: schema.Limits | None = None,
    token: str = "",
    origins: Collection[str] = (),
) -> Flask:
    """A Flask application that serves one system.

    token: required as `Authorization: Bearer …`, except for `/health`.
    origins: of web pages that may use the server, as of `allow_origins`.
    """
    backend = Backend(system, limits)
    app = Flask("seed_multimodal")
    app.config["MAX_CONTENT_LENGTH"] = backend.limits.max_body_bytes
    app.extensions["seed_backend"] = backend
    max_mib = backend.limits.max_body_bytes / 2**20
    sentences = {
        404: "There is no such route; /openapi.json lists all.",
        413: f"The request is too large: it may have {max_mib:g} MiB, a form's text field 500 kB.",
    }

    @app.before_request
    def check_token() -> None:
        # A browser's preflight has no token.
        if not token or request.path == "/health" or request.method == "OPTIONS":
            return
        # Compared in constant time.
        sent = (request.authorization and request.authorization.token) or ""
        if not hmac.compare_digest(sent.encode(), token.encode()):
            abort(401, "This server asks for a token: send it as Authorization: Bearer ….")

    @app.after_request
    def count(response: Response) -> Response:
        # Streams are counted at their end.
        if request.url_rule and not response.is_streamed:
            backend.requests.labels(request.url_rule.rule, response.status_code).inc()
        return response

    @app.errorhandler(Exception)
    def error_response(error: Exception) -> ResponseReturnValue:
        sentence, status = sentence_and_status(error)
        if isinstance(error, HTTPException) and error.description == type(error).description:
            sentence = sentences.get(status, sentence)  # instead of Werkzeug's
        field = getattr(error, "field", "")
        body = error_json(request.path.startswith("/v1"), sentence, status, field)
        headers = HEADERS.get(status, {})
        if isinstance(error, MethodNotAllowed):
            headers = {"Allow": ", ".join(error.valid_methods or ())}
        return jsonify(body), status, headers

    routes: dict[str, RouteCallable] = {
        "/": backend.root,
        "/health": backend.health,
        "/ready": backend.ready,
        "/metrics": backend.metrics,
        "/v1/models": backend.models,
        "/v1/models/<path:name>": backend.model,
        "/openapi.json": schema.openapi,
    }
    for rule, view in routes.items():
        app.add_url_rule(rule, view_func=view)
    add_model_routes(app, backend)
    allow_origins(app, origins)
    return app


def allow_origins(app: Flask, origins: Collection[str]) -> None:
    """Let web pages of these origins use the server (CORS); "*": any page."""

    @app.after_request
    def allow(response: Response) -> Response:
        origin = request.headers.get("Origin", "")
        if not {origin, "*"} & {*origins}:
            return response
        response.headers["Access-Control-Allow-Origin"] = origin
        response.vary.add("Origin")
        names = request.headers.get("Access-Control-Request-Headers", "")  # of a preflight
        response.headers["Access-Control-Allow-Headers"] = names
        response.headers["Access-Control-Allow-Methods"] = "GET, POST"
        return response


def add_model_routes(app: Flask, backend: Backend) -> None:
    """Routes that the system answers. Bodies are read when the request has a slot in the queue."""

    def slot() -> contextlib.AbstractContextManager[Deadline]:
        is_disconnected = request.environ.get("waitress.client_disconnected", lambda: False)
        return backend.slot(request.path, request.content_length or 0, is_disconnected)

    def read() -> Any:
        """The body of a request, of the model of its route."""
        model = schema.POSTED[request.path]
        if request.path == EDITS:
            if request.is_json:
                abort(415, "An edit is a form: send it as multipart/form-data, with its images.")
            # Other files, as a mask, are fields that nothing follows.
            files = [*request.files.getlist("image"), *request.files.getlist("image[]")]
            names = request.files.keys() - {"image", "image[]"}
            fields = {**request.form.to_dict(), **dict.fromkeys(names, "a file")}
            images = [file.read() for file in files]
            return schema.read_request(model, {**fields, "image": images})
        if not request.is_json:
            abort(415, "The request body must be JSON, sent with Content-Type: application/json.")
        return schema.read_request(model, request.get_data(cache=False))

    # 1. Routes that answer with one object.
    @app.route("/generate", methods=["GET", "POST"])
    def generate() -> JsonObject:
        if request.method != "POST" and not request.is_json:  # the original answers GET with JSON
            raise MethodNotAllowed(["POST"])
        with slot() as deadline:
            return backend.generate(read(), deadline)

    @app.post("/v1/images/tokens")
    def tokens() -> JsonObject:
        with slot() as deadline:
            return backend.tokenize(read(), deadline)

    # 2. Routes that also answer with a stream of objects.
    def chat(body: schema.ChatRequest, deadline: Deadline) -> Iterator[JsonObject]:
        return completion(backend.name, body.stream, backend.chat(body, deadline))

    def respond(body: schema.ResponsesRequest, deadline: Deadline) -> Iterator[JsonObject]:
        events = ResponseEvents(body, backend.name).of_changes(backend.chat(body, deadline))
        if body.stream:
            return events
        *_, last = events
        return iter([last["response"]])

    answers: dict[str, Callable[[Any, Deadline], Iterator[JsonObject]]] = {
        "/v1/chat/completions": chat,
        "/v1/responses": respond,
        "/v1/images/generations": backend.draw,
        EDITS: backend.draw,
    }

    def answer() -> ResponseReturnValue:
        def objects() -> Generator[Any, None, None]:
            with slot() as deadline:
                body = read()
                yield body.stream
                yield from answers[request.path](body, deadline)

        # The first object is awaited: errors of the request get a status, not an event.
        events = objects()
        is_stream = next(events)
        first: JsonObject = next(events)
        if is_stream:
            return streamed(app, backend, first, events)
        list(events)  # gives the slot back
        return first

    for path in answers:
        app.add_url_rule(path, path, answer, methods=["POST"])


def completion(model: str, stream: bool, changes: Iterator[JsonObject]) -> Iterator[JsonObject]:
    """An answer as OpenAI's chunks, or as one object."""
    # All chunks have the same head.
    head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}
    message: JsonObject = {
        "role": "assistant",
        "content": "",
        "images": [],
        "boxes": [],
        "notes": [],
    }
    role = {"role": "assistant"}  # in the first chunk
    for change in changes:
        # Only the last change has these two.
        finish_reason = change.pop("finish_reason", None)
        usage = change.pop("usage", None)
        for name, value in change.items():
            message[name] += value
        if stream:
            choice = {"index": 0, "delta": {**role, **change}, "finish_reason": finish_reason}
            chunk = {**head, "object": "chat.completion.chunk", "choices": [choice]}
            if usage:
                chunk["usage"] = usage
            yield chunk
        role = {}
    if not stream:
        choice = {"index": 0, "message": message, "finish_reason": finish_reason}
        yield {**head, "object": "chat.completion", "usage": usage, "choices": [choice]}


def streamed(
    app: Flask, backend: Backend, first: JsonObject, others: Generator[JsonObject, None, None]
) -> Response:
    """Server-sent events of `first` and `others`.

    An error is sent as the last event, and counted with its status.
    """
    # The request's context is gone when the stream is read.
    rule = str(request.url_rule)

    def lines() -> Iterator[str]:
        status = 200
        with contextlib.closing(others):
            try:
                for chunk in itertools.chain([first], others):
                    name = f"event: {chunk['type']}\n" if "type" in chunk else ""
                    yield f"{name}data: {json.dumps(chunk)}\n\n"
            except Exception as error:  # noqa: BLE001
                sentence, status = sentence_and_status(error)
                yield f"data: {json.dumps(error_json(True, sentence, status))}\n\n"
            finally:
                backend.requests.labels(rule, status).inc()
        yield "data: [DONE]\n\n"

    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    return app.response_class(lines(), mimetype="text/event-stream", headers=headers)


# ---- errors


def sentence_and_status(error: Exception) -> tuple[str, int]:
    """The sentence and status of an error; out of memory and programming errors are logged."""
    if isinstance(error, HTTPException):
        return error.description or error.name, error.code or 500
    if isinstance(error, SeedError):
        return str(error), 400
    if is_out_of_memory(error):
        logger.error("A request ran out of memory: %s", first_line(error))
        return "The server ran out of memory; try again later, or ask for less at once.", 503
    logger.error("A request failed inside the server", exc_info=error)
    return "The server failed inside; its log has the details.", 500


def error_json(openai: bool, sentence: str, status: int, field: str = "") -> JsonObject:
    """The body of an error: OpenAI's, or `error` with the keys of an answer.

    field: of the request that is wrong, if it is one.
    """
    if not openai:
        return {"error": sentence, **schema.GenerateResponse(error_msg=[sentence]).model_dump()}
    return {
        "error": {
            "message": sentence,
            "type": "server_error" if status >= 500 else "invalid_request_error",
            "param": field or None,
            "code": None,
        }
    }


# ---- the server


def listen(host: str, port: int, token: str = "") -> socket.socket:
    """A listening socket, opened before a model is loaded for it; port 0: a free one.

    Raises:
        ConfigError: the port is taken or not allowed, or other machines could use the server
            without a token.
    """
    if host not in LOOPBACK and not token:
        raise ConfigError(
            f"{host} is reachable from other machines: set a password that clients send, by "
            f"--token-file or the variable SEED_TOKEN."
        )
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:  # a port above 65535 overflows
        raise ConfigError(
            f"Cannot listen on {host}:{port}: the port is taken or not allowed; choose another "
            f"with --port."
        ) from error


@contextlib.contextmanager
def loading(sock: socket.socket) -> Iterator[None]:
    """Answer every request with 503 while the block loads the system."""
    app = Flask("seed_multimodal")

    @app.before_request
    def answer() -> ResponseReturnValue:
        error = error_json(request.path.startswith("/v1"), LOADING, 503)
        return jsonify({"status": "loading", "ready": False, **error}), 503, HEADERS[503]

    logging.getLogger("werkzeug").setLevel("ERROR")  # not each request
    host, port = sock.getsockname()[:2]
    server = make_server(host, port, app, threaded=True, fd=sock.fileno())
    threading.Thread(target=server.serve_forever, name="seed-loading", daemon=True).start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()


def serve(app: Flask, sock: socket.socket) -> None:
    """Serve with waitress until interrupted or ended by SIGTERM."""
    backend: Backend = app.extensions["seed_backend"]
    limits = backend.limits
    host, port = sock.getsockname()[:2]

    # 1. Memory that answers have freed returns to the system.
    return_freed_memory()

    def trim() -> None:
        while not backend.stopping.wait(TRIM_SECONDS):
            trim_memory()

    threading.Thread(target=trim, name="seed-trim", daemon=True).start()

    # 2. Exclude the loaded objects from garbage collection: a full collection starts only when new
    #    objects exceed a quarter of the old ones, which with a model's objects takes very long.
    gc.collect()
    gc.freeze()
    gc.collect()  # `freeze` leaves the number of old objects as it was

    # 3. The server. It reads ahead during a request, to detect that the client disconnects.
    logging.getLogger("waitress").setLevel("ERROR")  # neither lost connections nor its queue
    server = waitress.create_server(
        app,
        sockets=[sock],
        threads=limits.max_running + limits.max_waiting + SPARE_THREADS,
        connection_limit=CONNECTIONS,
        channel_timeout=IDLE_SECONDS,
        log_socket_errors=False,
        ident="SEED Multimodal",
        max_request_body_size=2 * limits.max_body_bytes,  # up to there Flask answers with JSON
        channel_request_lookahead=1,
    )
    print(f"Init Done... answering at http://{host}:{port}/generate (Ctrl-C stops).")

    # 4. `run` ends at KeyboardInterrupt; running drawings end before Python does, which would
    #    abort under their threads.
    with ended_by_sigterm(backend.stopping.set):
        try:
            server.run()
        finally:
            server.task_dispatcher.shutdown(timeout=SHUTDOWN_SECONDS)
            server.close()
            gc.unfreeze()
