"""The HTTP backend: `/generate` (POST, or GET with a JSON body, as the released server) and `GET /health`.

Every refusal is JSON with one sentence: 400 a request that cannot be answered, 404/405 a wrong address, 413 a body that
is too large, 415 not JSON, 500 a programming error. Binds the loopback address unless told otherwise: there is no
authentication, so a reverse proxy belongs in front of any other address.

Run: `bash scripts/start_backend_nano.sh`, or from Python `serve(create_app(SeedLlama.from_pretrained("nano")))`.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING

from seed_multimodal.errors import CodesError, ConfigError, GenerationError, ImageError, RequestError, SeedError
from seed_multimodal.serving.engine import Backend, Engine, SystemBackend
from seed_multimodal.serving.schema import Limits, error_json, parse_request

if TYPE_CHECKING:
    from flask import Flask, Response
    from werkzeug.exceptions import HTTPException

    from seed_multimodal.systems.seed_llama import SeedLlama

logger = logging.getLogger(__name__)
ASKED_WRONGLY = (RequestError, ImageError, CodesError, GenerationError)
CANNOT_LISTEN = "Cannot listen on {host}:{port}: the port is taken or not allowed; choose another with --port."
SOCKET_FILE = "unix://"
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def create_app(
    system: SeedLlama | Backend, *, limits: Limits | None = None, exact_original: bool = False
) -> Flask:
    """A Flask application over one model.

    Args:
        system: a `SeedLlama`, or anything with the methods of `engine.Backend`.
        exact_original: see `Engine`; for clients that rely on the released server's quirks.
    """
    from flask import Flask, jsonify, request
    from werkzeug.exceptions import HTTPException

    limits = limits or Limits()
    backend: Backend = SystemBackend(system) if hasattr(system, "reconstruct") else system  # type: ignore[arg-type, assignment]
    engine = Engine(backend, limits=limits, exact_original=exact_original)
    app = Flask("seed_multimodal")
    app.config["MAX_CONTENT_LENGTH"] = limits.max_body_bytes
    app.extensions["seed_engine"] = engine

    @app.route("/generate", methods=["GET", "POST"])
    def generate() -> Response:
        parsed = parse_request(request.get_json(), limits)
        return jsonify(engine.answer(parsed).to_json())

    @app.route("/health", methods=["GET"])
    def health() -> Response:
        return jsonify(engine.health())

    @app.errorhandler(SeedError)
    def refuse(error: SeedError) -> tuple[Response, int]:
        return jsonify(error_json(str(error))), 400 if isinstance(error, ASKED_WRONGLY) else 500

    @app.errorhandler(HTTPException)
    def http_error(error: HTTPException) -> HTTPException | tuple[Response, int]:
        if error.code is None or error.code < 400:
            return error
        return jsonify(error_json(_sentence(error, limits))), error.code

    @app.errorhandler(Exception)
    def fault(error: Exception) -> tuple[Response, int]:
        logger.exception("A request failed inside the server")
        return jsonify(error_json("The server failed inside; its log has the details.")), 500

    return app


def _sentence(error: HTTPException, limits: Limits) -> str:
    known = {
        400: "The request body is not valid JSON.",
        404: "There is nothing at this address; use /generate or /health.",
        405: "This method is not allowed here; use POST /generate or GET /health.",
        413: f"The request body is larger than {limits.max_body_bytes >> 20} MiB.",
        415: "The request body must be JSON, sent with Content-Type: application/json.",
    }
    return known.get(error.code or 500, error.description or error.name)


def check_address(host: str, port: int) -> None:
    """Check that a server can listen there, before a model is loaded for it.

    Raises:
        ConfigError: the port is taken or not allowed.
    """
    if host.startswith(SOCKET_FILE):
        return  # werkzeug makes it
    try:
        socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except (OSError, OverflowError) as error:  # a port above 65535 overflows
        raise ConfigError(CANNOT_LISTEN.format(host=host, port=port)) from error


def serve(
    app: Flask, *, host: str = "127.0.0.1", port: int = 7890, log: Callable[[str], None] | None = print
) -> None:
    """Serve until interrupted, a thread per connection; port 0 takes a free one and prints it.

    Raises:
        ConfigError: the port is taken or not allowed.
    """
    from werkzeug.serving import make_server

    check_address(host, port)
    try:
        server = make_server(host, port, app, threaded=True)
    except (OSError, SystemExit) as error:  # werkzeug exits by itself when the port is taken
        raise ConfigError(CANNOT_LISTEN.format(host=host, port=port)) from error
    if log is not None and host.startswith(SOCKET_FILE):
        log(f"Init Done... answering at {host} (Ctrl-C stops).")
    elif log is not None:
        if host not in LOOPBACK:
            log(f"Warning: {host} is reachable from other machines and this server asks for no password.")
        log(f"Init Done... answering at http://{host}:{server.server_port}/generate (Ctrl-C stops).")
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        if log is not None:
            log("Stopped.")
    finally:
        server.server_close()
