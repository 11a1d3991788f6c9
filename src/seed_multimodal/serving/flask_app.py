"""The HTTP backend: `/generate` (POST, or GET with a JSON body, as the released server) and `GET /health`.

Every refusal is JSON with one sentence: 400 a request that cannot be answered, 404/405 a wrong address, 413 a body that
is too large, 415 not JSON, 429 (with Retry-After) too many requests at once, 503 the server is being stopped, 500 a
programming error. Binds the loopback address unless told otherwise: there is no
authentication, so a reverse proxy belongs in front of any other address.

Run: `bash scripts/start_backend_nano.sh`, or from Python `serve(create_app(SeedLlama.from_pretrained("nano")))`.
"""

from __future__ import annotations

import contextlib
import json
import logging
import socket
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from seed_multimodal.entry import ended_by_sigterm
from seed_multimodal.errors import CodesError, ConfigError, GenerationError, ImageError, RequestError, SeedError
from seed_multimodal.serving.backend import Backend
from seed_multimodal.serving.body import BodyTooLong
from seed_multimodal.serving.codes_backend import CodesBackend, CodesSystem
from seed_multimodal.serving.engine import Busy, Engine
from seed_multimodal.serving.features_backend import FeaturesSystem
from seed_multimodal.serving.gate import Vanished
from seed_multimodal.serving.schema import JSON_LINES, GenerateResponse, Limits, Preview, error_json
from seed_multimodal.systems.talking import System, TalkingSystem

if TYPE_CHECKING:
    from flask import Flask, Response
    from werkzeug.exceptions import HTTPException

logger = logging.getLogger(__name__)
ASKED_WRONGLY = (RequestError, ImageError, CodesError, GenerationError)
CANNOT_LISTEN = "Cannot listen on {host}:{port}: the port is taken or not allowed; choose another with --port."
INSIDE = "The server failed inside; its log has the details."
SOCKET_FILE = "unix://"
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def create_app(
    system: System | Backend, *, limits: Limits | None = None, exact_original: bool = False
) -> Flask:
    """A Flask application over one model.

    Args:
        system: a system, or anything with the methods of `backend.Backend`.
        exact_original: see `Engine`; for clients that rely on the released server's quirks.

    Raises:
        ConfigError: `exact_original` of a model that the released server never served.
    """
    from flask import Flask, abort, jsonify, request
    from werkzeug.exceptions import HTTPException

    limits = limits or Limits()
    backend = backend_of(system) if isinstance(system, System) else system
    if exact_original and not isinstance(backend, CodesBackend):
        raise ConfigError("exact_original repeats the released server, which served SEED-LLaMA alone.")
    engine = Engine(backend, limits=limits, exact_original=exact_original)
    app = Flask("seed_multimodal")
    app.config["MAX_CONTENT_LENGTH"] = limits.max_body_bytes
    app.extensions["seed_engine"] = engine

    @app.route("/generate", methods=["GET", "POST"])
    def generate() -> Response:
        if not request.is_json:
            abort(415)
        gone = request.environ.get("waitress.client_disconnected", lambda: False)
        pieces = engine.handle(request.stream, request.content_length or 0, gone)
        first = next(pieces)  # a refusal is raised here
        if isinstance(first, Preview):
            return app.response_class(_lines(first, pieces), mimetype=JSON_LINES)
        return jsonify(first.to_json())

    @app.route("/health", methods=["GET"])
    def health() -> Response:
        return jsonify(engine.health())

    @app.errorhandler(SeedError)
    def refuse(error: SeedError) -> tuple[Response, int] | tuple[Response, int, dict[str, str]]:
        body = jsonify(error_json(str(error)))
        if isinstance(error, Busy):
            return body, 429, {"Retry-After": str(error.seconds)}
        if isinstance(error, Vanished):
            return body, 503  # read only when the server is being stopped: the others have left
        return body, 400 if isinstance(error, ASKED_WRONGLY) else 500

    @app.errorhandler(BodyTooLong)
    def too_long(error: BodyTooLong) -> tuple[Response, int]:
        return jsonify(error_json(_sentence(413, "", limits))), 413

    @app.errorhandler(HTTPException)
    def http_error(error: HTTPException) -> HTTPException | tuple[Response, int]:
        if error.code is None or error.code < 400:
            return error
        return jsonify(error_json(_sentence(error.code, error.description or error.name, limits))), error.code

    @app.errorhandler(Exception)
    def fault(error: Exception) -> tuple[Response, int]:
        logger.exception("A request failed inside the server")
        return jsonify(error_json(INSIDE)), 500

    return app


def backend_of(system: System) -> Backend:
    """The backend of a system: what its model reads and writes says which."""
    if isinstance(system, TalkingSystem):
        return CodesSystem(system) if system.pictures.has_codes else FeaturesSystem(system)
    from seed_multimodal.serving.message_backend import MessageBackend

    return MessageBackend(system)  # type: ignore[arg-type]  # the one system that does not converse


def _lines(first: Preview, rest: Iterator[Preview | GenerateResponse]) -> Iterator[str]:
    """A JSON line for each piece of an answer; what fails on the way is the last line."""
    with contextlib.closing(rest):  # type: ignore[type-var]
        yield json.dumps(first.to_json()) + "\n"
        try:
            for piece in rest:
                yield json.dumps(piece.to_json()) + "\n"
        except Exception as error:
            if not isinstance(error, SeedError):
                logger.exception("A request failed inside the server")
            said = str(error) if isinstance(error, SeedError) else INSIDE
            yield json.dumps(error_json(said)) + "\n"


def _sentence(code: int, otherwise: str, limits: Limits) -> str:
    known = {
        400: "The request is no valid HTTP request with a JSON body.",
        404: "There is nothing at this address; use /generate or /health.",
        405: "This method is not allowed here; use POST /generate or GET /health.",
        413: f"The request body is larger than {limits.max_body_bytes >> 20} MiB.",
        415: "The request body must be JSON, sent with Content-Type: application/json.",
        431: "The request's header is too long.",
        501: "Only bodies with a Content-Length or with Transfer-Encoding: chunked are read.",
    }
    return known.get(code, otherwise)


def check_address(host: str, port: int) -> None:
    """Check that a server can listen there, before a model is loaded for it.

    Raises:
        ConfigError: the port is taken or not allowed.
    """
    if not host.startswith(SOCKET_FILE):  # that is made
        _listen(host, port).close()


def _listen(host: str, port: int) -> socket.socket:
    from seed_multimodal.serving.wsgi import listen_on_file

    try:
        if host.startswith(SOCKET_FILE):
            return listen_on_file(host.removeprefix(SOCKET_FILE))
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError) as error:  # a port above 65535 overflows
        raise ConfigError(CANNOT_LISTEN.format(host=host, port=port)) from error


def serve(
    app: Flask, *, host: str = "127.0.0.1", port: int = 7890, log: Callable[[str], None] | None = print
) -> None:
    """Serve by waitress until interrupted or ended by SIGTERM; port 0 takes a free one and prints it.

    Raises:
        ConfigError: the port is taken or not allowed.
    """
    from PIL import PngImagePlugin

    from seed_multimodal.serving.wsgi import make_server, return_freed_memory

    engine: Engine = app.extensions["seed_engine"]
    PngImagePlugin.MAX_TEXT_MEMORY = 1 << 20  # compressed comments in a PNG; Pillow would keep 64 MiB of them
    return_freed_memory()
    sock = _listen(host, port)
    server: Any = make_server(app, sock, workers=engine.limits.max_waiting + 1,
                              max_body_bytes=engine.limits.max_body_bytes,
                              refusal=lambda code: error_json(_sentence(code, "", engine.limits)))
    if log is not None and host.startswith(SOCKET_FILE):
        log(f"Init Done... answering at {host} (Ctrl-C stops).")
    elif log is not None:
        if host not in LOOPBACK:
            log(f"Warning: {host} is reachable from other machines and this server asks for no password.")
        log(f"Init Done... answering at http://{host}:{sock.getsockname()[1]}/generate (Ctrl-C stops).")
    with ended_by_sigterm(engine.stopping.set):
        try:
            server.run()  # takes KeyboardInterrupt as the order to end, and waits for its threads
            if log is not None:
                log("Stopped.")
        finally:
            server.close()
