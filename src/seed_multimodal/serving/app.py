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
import io
import itertools
import json
import logging
import re
import socket
import sys
import threading
from collections.abc import Callable, Collection, Generator, Iterator
from typing import TYPE_CHECKING, Any

import waitress
from flask import Flask, Response, abort, request
from flask.typing import ResponseReturnValue, RouteCallable
from flask_cors import CORS
from waitress.task import ErrorTask
from werkzeug.exceptions import (
    BadRequest,
    HTTPException,
    InternalServerError,
    MethodNotAllowed,
    RequestEntityTooLarge,
    ServiceUnavailable,
)
from werkzeug.formparser import FormDataParser
from werkzeug.serving import make_server

from seed_multimodal.device import is_out_of_memory, return_freed_memory, trim_memory
from seed_multimodal.disk import JsonObject
from seed_multimodal.entry import ended_by_sigterm
from seed_multimodal.errors import ConfigError, RequestError, SeedError, first_line, short_name
from seed_multimodal.serving import origin, schema
from seed_multimodal.serving.backend import Backend, Deadline
from seed_multimodal.serving.connections import Connection

if TYPE_CHECKING:
    from seed_multimodal.pipelines.base import MultimodalSystem

logger = logging.getLogger(__name__)
EDITS = "/v1/images/edits"  # its body is a form with files
IMAGE_FIELD = re.compile(r"image(\[\d*\])?")  # of a form; others are fields that nothing follows
LOADING = "The model is loading; try again later."

FORM_PARTS = 1000
CONNECTIONS = 512
IDLE_SECONDS = 20  # of a request that does not arrive, or slower than `connections.MIN_RATE`
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

    token: required as `Authorization: Bearer …`, except for `/health`. Without one the server is
        for this machine: requests for other hosts and of other web pages are refused.
    origins: of web pages that may use the server (CORS); "*": any page.
    """
    check_token(token)
    backend = Backend(system, limits)
    app = Flask("seed_multimodal")
    app.url_map.merge_slashes = False  # a redirect would be HTML
    app.config["MAX_CONTENT_LENGTH"] = backend.limits.max_body_bytes
    app.extensions["seed_backend"] = backend
    if origins:
        CORS(app, origins=origins)
    max_mib = backend.limits.max_body_bytes / 2**20
    sentences = {
        404: "There is no such route; /openapi.json lists all.",
        413: f"The request is too large: it may have {max_mib:g} MiB.",
    }

    @app.before_request
    def check_sender() -> None:
        headers = request.headers
        if not token:
            problem = origin.problem("localhost", dict(headers), origins)
            if problem:
                abort(403, problem)
        # A browser's preflight has no token.
        elif request.path != "/health" and request.method != "OPTIONS":
            scheme, _, sent = headers.get("Authorization", "").partition(" ")
            if scheme.lower() != "bearer" or not is_token(sent.strip(" \t"), token):
                abort(401, "This server asks for a token: send it as Authorization: Bearer ….")

    @app.after_request
    def count(response: Response) -> Response:
        # Streams are counted at their end.
        if request.url_rule and not response.is_streamed:
            backend.requests.labels(request.url_rule.rule, response.status_code).inc()
        return response

    @app.errorhandler(Exception)
    def error_response(error: Exception) -> Response:
        http = http_error(error)
        if http.description == type(http).description:
            http.description = sentences.get(http.code or 0, http.description)  # not Werkzeug's
        response = app.make_response(http.get_response())
        body = error_json(http, getattr(error, "field", ""), request.path)
        response.set_data(json.dumps(body))
        response.mimetype = "application/json"
        if http.code == 401:
            response.headers["WWW-Authenticate"] = "Bearer"
        return response

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
    for rule in schema.POSTED:
        # The original's server answers GET with a JSON body, too.
        methods = ["GET", "POST"] if rule == "/generate" else ["POST"]
        app.add_url_rule(rule, rule, lambda: answer(app, backend), methods=methods)
    return app


# ---- answers of the system


def answer(app: Flask, backend: Backend) -> ResponseReturnValue:
    """The answer to a request: one object, or a stream of them."""
    answers: dict[str, Callable[[Any, Deadline], Iterator[JsonObject]]] = {
        "/generate": backend.generate,
        "/v1/chat/completions": backend.complete,
        "/v1/responses": backend.respond,
        "/v1/images/generations": backend.draw,
        EDITS: backend.draw,
        "/v1/images/tokens": backend.tokenize,
    }
    if request.method == "GET" and not request.is_json:
        raise MethodNotAllowed(["POST"])

    # The body is read when the request has a slot in the queue.
    def objects() -> Generator[Any, None, None]:
        is_disconnected = request.environ.get("waitress.client_disconnected", lambda: False)
        n_bytes = request.content_length or 0
        with backend.slot(request.path, n_bytes, is_disconnected) as deadline:
            body = read_body()
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


def read_body() -> Any:
    """The body of a request, of the model of its route."""
    model = schema.POSTED[request.path]
    if request.content_encoding not in (None, "", "identity"):
        abort(415, f"The body is encoded as {short_name(request.content_encoding)}; send it plain.")
    if request.path != EDITS:
        if not request.is_json:
            abort(415, "The request body must be JSON, sent with Content-Type: application/json.")
        return schema.read_request(model, request.get_data(cache=False))

    # 1. The parts of the form, its files in memory.
    if request.mimetype != "multipart/form-data":
        abort(415, "An edit is a form: send it as multipart/form-data, with its images.")
    stream = request.stream  # not of a body that is too large
    parser = FormDataParser(lambda *_, **__: io.BytesIO(), silent=False, max_form_parts=FORM_PARTS)
    try:
        _, texts, files = parser.parse(stream, request.mimetype, None, request.mimetype_params)
        if None in {*texts, *files}:
            raise ValueError
    except RequestEntityTooLarge:
        abort(413, f"The form has too many parts: it may have {FORM_PARTS:,}.")
    except ValueError:
        raise RequestError(
            "The form breaks off, or its boundary or the name of a part is missing."
        ) from None

    # 2. What a browser's form left empty is absent: texts, and files without a name.
    fields: JsonObject = {}
    for name, text in texts.items(multi=True):
        if not text:
            continue
        if IMAGE_FIELD.fullmatch(name) or name in fields:
            raise RequestError("Send a text once, and each image as a file of the form.", name)
        fields[name] = text.strip()
    for name, file in files.items(multi=True):
        content = file.read()
        if not content and not file.filename:
            continue
        if IMAGE_FIELD.fullmatch(name):
            fields.setdefault("image", []).append(content)
        elif name in model.model_fields:
            raise RequestError("It is a file; send a text.", name)
        else:
            fields[name] = content  # an unknown field
    return schema.read_request(model, fields)


def streamed(
    app: Flask, backend: Backend, first: JsonObject, others: Generator[JsonObject, None, None]
) -> Response:
    """Server-sent events of `first` and `others`.

    An error is sent as the last event, and counted with its status.
    """
    # The request's context is gone when the stream is read.
    rule = str(request.url_rule)

    def lines() -> Iterator[str]:
        status: int | None = 200
        with contextlib.closing(others):
            try:
                for chunk in itertools.chain([first], others):
                    name = f"event: {chunk['type']}\n" if "type" in chunk else ""
                    yield f"{name}data: {json.dumps(chunk)}\n\n"
            except Exception as error:  # noqa: BLE001
                http = http_error(error)
                status = http.code
                yield f"data: {json.dumps(error_json(http))}\n\n"
            finally:
                backend.requests.labels(rule, status).inc()
        yield "data: [DONE]\n\n"

    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    return app.response_class(lines(), mimetype="text/event-stream", headers=headers)


# ---- errors


def http_error(error: Exception) -> HTTPException:
    """An error as a status and a sentence; out of memory and programming errors are logged."""
    if isinstance(error, HTTPException):
        return error
    if isinstance(error, SeedError):
        return BadRequest(str(error))
    if is_out_of_memory(error):
        logger.error("A request ran out of memory: %s", first_line(error))
        return ServiceUnavailable(
            "The server ran out of memory; try again later, or ask for less at once.", retry_after=5
        )
    logger.error("A request failed inside the server", exc_info=error)
    return InternalServerError("The server failed inside; its log has the details.")


def error_json(error: HTTPException, field: str = "", path: str = "/v1") -> JsonObject:
    """The body of an error: OpenAI's below `/v1`, else `error` with the keys of an answer.

    field: of the request that is wrong, if it is one.
    """
    sentence = error.description or error.name
    if not path.startswith("/v1"):
        return {"error": sentence, **schema.GenerateResponse(error_msg=[sentence]).model_dump()}
    is_servers = (error.code or 500) >= 500
    return {
        "error": {
            "message": sentence,
            "type": "server_error" if is_servers else "invalid_request_error",
            "param": field or None,
            "code": None,
        }
    }


class ErrorAnswer(ErrorTask):
    """The answer to a request that waitress refuses, as JSON."""

    def execute(self) -> None:
        error = self.request.error
        error.description = f"{error.reason}: {short_name(error.body.rstrip('.'), 80)}."
        self.status = f"{error.code} {error.reason}"
        self.response_headers.append(("Content-Type", "application/json"))
        self.write(json.dumps(error_json(error, path=self.request.path)).encode())


class Channel(Connection):
    """A connection whose errors are JSON."""

    error_task_class = ErrorAnswer


# ---- the server


def check_token(token: str) -> None:
    """Raise ConfigError: a token that no header can hold."""
    if token != token.strip() or not token.isprintable():
        raise ConfigError("The token has blanks at its ends, or control characters: remove them.")


def is_token(sent: str, token: str) -> bool:
    """Whether a header has the token, as UTF-8 or Latin-1; compared in constant time.

    sent: its bytes as Latin-1, as WSGI has them.
    """
    return any(
        hmac.compare_digest(sent.encode(encoding, "replace"), token.encode())
        for encoding in ("latin-1", "utf-8")
    )


def listen(host: str, port: int, token: str = "") -> socket.socket:
    """A listening socket, opened before a model is loaded for it; port 0: a free one.

    Raises:
        ConfigError: the port is taken or not allowed, or other machines could use the server
            without a token.
    """
    check_token(token)
    if not token and not origin.is_loopback(host):
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
        error = error_json(ServiceUnavailable(LOADING), path=request.path)
        return {"status": "loading", "ready": False, **error}, 503, {"Retry-After": "5"}

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
        cleanup_interval=1,
        log_socket_errors=False,
        ident="SEED Multimodal",
        max_request_body_size=2 * limits.max_body_bytes,  # up to there Flask answers with JSON
        channel_request_lookahead=1,
        asyncore_use_poll=True,  # select() ends the server at the first descriptor above 1023
        outbuf_overflow=sys.maxsize,  # no temporary files
    )
    server.channel_class = Channel
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
