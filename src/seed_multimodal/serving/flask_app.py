"""The HTTP backend: `/generate` (POST, or GET with a JSON body, as the original server) and `GET /health`.

Errors are JSON with one sentence: 400 a request that cannot be answered, 404/405 a wrong address or method, 413 a body
that is too large, 415 not JSON, 429 (with Retry-After) too many requests, 503 the server is being stopped, 500 a
programming error. The server binds the loopback address by default: it has no authentication, so any other address
needs a reverse proxy in front of it.

Run `bash scripts/start_backend_nano.sh`, or in Python `serve(create_app(MultimodalSystem.from_pretrained("nano")))`.
"""

from __future__ import annotations

import contextlib
import json
import logging
import socket
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from seed_multimodal.entry import ended_by_sigterm
from seed_multimodal.errors import ConfigError, SeedError
from seed_multimodal.serving.backend import Backend
from seed_multimodal.serving.schema import JSON_LINES, GenerateResponse, Limits, Preview, error_json
from seed_multimodal.serving.waiting import Busy, Vanished

if TYPE_CHECKING:
    from flask import Flask, Response
    from werkzeug.exceptions import HTTPException

    from seed_multimodal.system.base import MultimodalSystem

logger = logging.getLogger(__name__)
CANNOT_LISTEN = "Cannot listen on {host}:{port}: the port is taken or not allowed; choose another with --port."
INSIDE = "The server failed inside; its log has the details."
LOOPBACK = ("127.0.0.1", "localhost", "::1")
IDLE_SECONDS = 20  # after which an idle connection is closed
HEADER_BYTES = 16 << 10
SPARE_THREADS = 8  # for errors and /health, beside one for each request that waits


def create_app(system: MultimodalSystem, *, limits: Limits | None = None) -> Flask:
    """A Flask application that serves one system."""
    from flask import Flask, abort, jsonify, request
    from werkzeug.exceptions import HTTPException

    backend = Backend(system, limits)
    app = Flask("seed_multimodal")
    app.config["MAX_CONTENT_LENGTH"] = backend.limits.max_body_bytes
    app.extensions["seed_backend"] = backend

    @app.route("/generate", methods=["GET", "POST"])
    def generate() -> Response:
        if not request.is_json:
            abort(415)
        disconnected = request.environ.get("waitress.client_disconnected", lambda: False)
        pieces = backend.handle(request.get_data(cache=False), disconnected)
        first = next(pieces)  # raises what is wrong with the request
        if isinstance(first, Preview):
            return app.response_class(_lines(first, pieces), mimetype=JSON_LINES)
        return jsonify(first.to_json())

    @app.route("/health", methods=["GET"])
    def health() -> Response:
        return jsonify(backend.health())

    @app.errorhandler(SeedError)
    def refuse(error: SeedError) -> tuple[Response, int] | tuple[Response, int, dict[str, str]]:
        body = jsonify(error_json(str(error)))
        if isinstance(error, Busy):
            return body, 429, {"Retry-After": str(error.seconds)}
        return body, 503 if isinstance(error, Vanished) else 400

    @app.errorhandler(HTTPException)
    def http_error(error: HTTPException) -> HTTPException | tuple[Response, int]:
        if error.code is None or error.code < 400:
            return error
        return jsonify(error_json(_sentence(error, backend.limits))), error.code

    @app.errorhandler(Exception)
    def fault(error: Exception) -> tuple[Response, int]:
        logger.exception("A request failed inside the server")
        return jsonify(error_json(INSIDE)), 500

    return app


def _lines(first: Preview, rest: Iterator[Preview | GenerateResponse]) -> Iterator[str]:
    """A JSON line for each piece of an answer; an error on the way is the last line."""
    with contextlib.closing(rest):  # type: ignore[type-var]
        yield json.dumps(first.model_dump()) + "\n"
        try:
            for piece in rest:
                yield json.dumps(piece.model_dump() if isinstance(piece, Preview) else piece.to_json()) + "\n"
        except Exception as error:
            if not isinstance(error, SeedError):
                logger.exception("A request failed inside the server")
            yield json.dumps(error_json(str(error) if isinstance(error, SeedError) else INSIDE)) + "\n"


def _sentence(error: HTTPException, limits: Limits) -> str:
    known = {
        404: "There is nothing at this address; use /generate or /health.",
        405: "This method is not allowed here; use POST /generate or GET /health.",
        413: f"The request body is larger than {limits.max_body_bytes >> 20} MiB.",
        415: "The request body must be JSON, sent with Content-Type: application/json.",
    }
    return known.get(error.code or 0, error.description or error.name)


def check_address(host: str, port: int) -> None:
    """Check that a server can listen there, before a model is loaded for it.

    Raises:
        ConfigError: the port is taken or not allowed.
    """
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
    sock = _listen(host, port)
    logging.getLogger("waitress").setLevel(logging.ERROR)  # lost connections are not reported
    server: Any = waitress.create_server(
        app, sockets=[sock], threads=backend.limits.max_waiting + 1 + SPARE_THREADS, connection_limit=512,
        asyncore_use_poll=True, channel_timeout=IDLE_SECONDS, max_request_header_size=HEADER_BYTES,
        max_request_body_size=2 * backend.limits.max_body_bytes,  # up to there Flask answers with JSON
        channel_request_lookahead=1,  # reads on while a request is answered, which shows that a client has left
        log_socket_errors=False, ident="SEED Multimodal")
    if log is not None:
        if host not in LOOPBACK:
            log(f"Warning: {host} is reachable from other machines and this server asks for no password.")
        log(f"Init Done... answering at http://{host}:{sock.getsockname()[1]}/generate (Ctrl-C stops).")
    with ended_by_sigterm(backend.stopping.set):
        try:
            server.run()  # ends at KeyboardInterrupt, and waits for its threads
            if log is not None:
                log("Stopped.")
        finally:
            server.close()
