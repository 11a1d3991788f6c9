"""Client of the backend: posts a request; a failure is one sentence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from seed_multimodal.errors import RequestError

USER_AGENT = "SEED Multimodal client"
CONNECT_SECONDS = 5.0
ANSWER_KEYS = {"text": str, "images": list, "images_ids": list, "error_msg": list}


def post_generate(address: str, body: Mapping[str, Any], timeout: float = 600.0) -> dict[str, Any]:
    """POST `body` to `address` (`http://127.0.0.1:7890/generate`) and return the checked answer.

    Raises:
        RequestError: no server there, a timeout, a refusal by the server (with its own sentence), or an answer of
            another kind of server.
    """
    import requests

    try:
        response = requests.post(address, json=dict(body), headers={"User-Agent": USER_AGENT},
                                 timeout=(CONNECT_SECONDS, timeout))
    except (requests.exceptions.MissingSchema, requests.exceptions.InvalidURL,
            requests.exceptions.InvalidSchema) as error:
        raise RequestError(f"{address!r} is not an address; it looks like http://127.0.0.1:7890/generate.") from error
    except requests.exceptions.ReadTimeout as error:
        raise RequestError(f"The model at {address} did not answer within {timeout:g} seconds.") from error
    except requests.exceptions.RequestException as error:
        raise RequestError(f"No model answers at {address}: start the backend (bash scripts/start_backend_nano.sh) and "
                           f"try again.") from error
    try:
        answer = response.json()
    except ValueError as error:
        raise RequestError(f"{address} answered with status {response.status_code} and no JSON; is it the address of a "
                           f"SEED backend?") from error
    if response.status_code != 200:
        said = answer.get("error") if isinstance(answer, dict) else None
        raise RequestError(str(said) if said else f"The backend refused the request (status {response.status_code}).")
    if not isinstance(answer, dict) or any(not isinstance(answer.get(k), kind) for k, kind in ANSWER_KEYS.items()):
        raise RequestError(f"{address} answered with something else than text and pictures; is it a SEED backend?")
    return answer
