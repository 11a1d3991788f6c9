"""Client of the backend: posts a request; a failure is one sentence."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from typing import Any

from seed_multimodal.errors import RequestError
from seed_multimodal.serving.schema import JSON_LINES

USER_AGENT = "SEED Multimodal client"
CONNECT_SECONDS = 5.0
ANSWER_KEYS = {"text": str, "images": list, "images_ids": list, "error_msg": list}


def follow_generate(address: str, body: Mapping[str, Any], timeout: float = 600.0) -> Iterator[dict[str, Any]]:
    """POST `body` to `address` (`http://127.0.0.1:7890/generate`) and give what comes: last the checked answer, and
    before it, if `body` asks for `previews`, each of them: `picture`, `codes` and `preview`.

    Raises:
        RequestError: no server there, a timeout, a refusal by the server (with its own sentence), or an answer of
            another kind of server.
    """
    import requests

    try:
        with requests.post(address, json=dict(body), headers=_headers(), stream=True,
                           timeout=(CONNECT_SECONDS, timeout)) as response:
            in_pieces = response.headers.get("Content-Type", "").startswith(JSON_LINES)
            for line in response.iter_lines() if in_pieces else (response.content,):
                piece = _piece(line, address, response.status_code)
                if in_pieces and "preview" in piece:
                    yield piece
                else:
                    yield _answer(piece, address, response.status_code)
                    return
        raise RequestError(f"{address} broke off its answer.")
    except (requests.exceptions.MissingSchema, requests.exceptions.InvalidURL,
            requests.exceptions.InvalidSchema) as error:
        raise RequestError(f"{address!r} is not an address; it looks like http://127.0.0.1:7890/generate.") from error
    except requests.exceptions.ReadTimeout as error:
        raise RequestError(f"The model at {address} did not answer within {timeout:g} seconds.") from error
    except requests.exceptions.RequestException as error:
        raise RequestError(f"No model answers at {address}: start the backend (bash scripts/start_backend_nano.sh) and "
                           f"try again.") from error


def _headers() -> dict[str, str]:
    """What a request says about its client; a server with a password gets that of `SEED_TOKEN`."""
    token = os.environ.get("SEED_TOKEN", "").strip()
    return {"User-Agent": USER_AGENT, **({"Authorization": f"Bearer {token}"} if token else {})}


def _piece(line: bytes, address: str, status: int) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise RequestError(f"{address} answered with status {status} and no JSON; is it the address of a SEED backend?"
                           ) from error


def _answer(answer: Any, address: str, status: int) -> dict[str, Any]:
    said = answer.get("error") if isinstance(answer, dict) else None
    if said or status != 200:
        raise RequestError(str(said) if said else f"The backend refused the request (status {status}).")
    if not isinstance(answer, dict) or any(not isinstance(answer.get(k), kind) for k, kind in ANSWER_KEYS.items()):
        raise RequestError(f"{address} answered with something else than text and images; is it a SEED backend?")
    return answer
