"""The JSON of `POST /generate`: requests, checked, and answers.

Field names and defaults are those of the released demo server, so old clients keep working. Unlike it, a request is
checked before any model runs, and a bad one gets one sentence.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from seed_multimodal.errors import RequestError
from seed_multimodal.language.tokenizer import plain_text
from seed_multimodal.language.vocabulary import PLACEHOLDER

JSON_LINES = "application/x-ndjson"  # of an answer in pieces: previews, and last the answer


@dataclass(frozen=True)
class Limits:
    """Limits of one request, of all requests being decoded (`max_decoding_pixels`), and of those waiting."""

    max_text_chars: int = 32_000
    max_images: int = 16
    max_codes: int = 32_768  # in one list
    max_new_tokens: int = 2048
    max_beams: int = 8
    max_temperature: float = 5.0
    max_body_bytes: int = 64 << 20
    max_image_bytes: int = 20 << 20
    max_image_pixels: int = 32_000_000
    max_request_pixels: int = 32_000_000  # of all pictures together
    max_decoding_pixels: int = 32_000_000
    max_waiting: int = 16


@dataclass(frozen=True)
class GenerateRequest:
    """One checked request.

    `text` is the whole conversation so far, without `<s>`, holding one `<image>` per entry of `images`; an entry is
    base64 text of an encoded picture (`bytes` if it is long), or the list of its codes. Ours are `seed` (the same seed,
    the same answer), `previews` (send pictures while they are made) and `ratio` (the shape of the picture, of models
    that draw in several). `given` are the settings that the request names; a model may use its own defaults for others.
    `gone` is asked while the request waits and before each token of its answer: whether the client has left.
    """

    text: str
    images: list[str | bytes | list[int]]
    temperature: float = 0.7
    num_beams: int = 1
    max_new_tokens: int = 256
    top_p: float = 0.5
    force_boi: bool = False
    seed: int | None = None
    previews: bool = False
    ratio: str | None = None
    given: frozenset[str] = frozenset()
    gone: Callable[[], bool] = field(default=lambda: False, compare=False)

    @property
    def do_sample(self) -> bool:
        """Sampling, as the released server always does, unless the temperature is 0 (which it cannot answer)."""
        return self.temperature > 0

    @property
    def text_spans(self) -> list[str]:
        """The text around the pictures: one more span than pictures."""
        return self.text.split(PLACEHOLDER)


@dataclass
class Preview:
    """A picture that is being made: `picture`: its place in `images` of the answer; `codes`: it shows so many of them;
    `preview`: base64 PNG."""

    picture: int
    codes: int
    preview: str

    def to_json(self) -> dict[str, Any]:
        return dict(vars(self))


@dataclass(frozen=True)
class FoundBox:
    """A box of an answer: `image`: on which of the request's pictures; `box`: left, top, right, bottom as shares of its
    width and height."""

    image: int
    box: tuple[float, float, float, float]


@dataclass
class GenerateResponse:
    """One answer: the generated text with one `<image>` per entry of `images`.

    `images` holds base64 PNG, or `""` for a picture that could not be drawn; `images_ids` the codes of all pictures,
    those of the request first; None stands for those of a picture that has none and is to be sent again. Answers of
    models that find things have `boxes`, if there are any; in the text they stay as the model wrote them.
    """

    text: str = ""
    images: list[str] = field(default_factory=list)
    images_ids: list[list[int] | None] = field(default_factory=list)
    error_msg: list[str] = field(default_factory=list)
    boxes: list[FoundBox] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        found = {"boxes": [asdict(box) for box in self.boxes]} if self.boxes else {}
        return {"text": self.text, "images": self.images, "images_ids": self.images_ids, "error_msg": self.error_msg,
                **found}


def error_json(sentence: str) -> dict[str, Any]:
    """The body of a refusal: `error`, beside the usual keys so that a client that reads only those shows it too."""
    return {"error": sentence, **GenerateResponse(error_msg=[sentence]).to_json()}


def parse_request(
    body: object, limits: Limits | None = None, gone: Callable[[], bool] = lambda: False
) -> GenerateRequest:
    """Check a decoded JSON body; `gone`: see `GenerateRequest`.

    Raises:
        RequestError: one sentence naming the field that is missing, of the wrong type or out of range.
    """
    limits = limits or Limits()
    if not isinstance(body, Mapping):
        raise RequestError("The request body must be a JSON object with 'text' and 'images'.")
    for key in ("text", "images"):
        if key not in body:
            raise RequestError(f"The request lacks {key!r}.")
    request = GenerateRequest(
        text=_text(body["text"], limits),
        images=_images(body["images"], limits),
        temperature=_number(body, "temperature", GenerateRequest.temperature, 0.0, limits.max_temperature),
        num_beams=_integer(body, "num_beams", GenerateRequest.num_beams, 1, limits.max_beams),
        max_new_tokens=_integer(body, "max_new_tokens", GenerateRequest.max_new_tokens, 1, limits.max_new_tokens),
        top_p=_number(body, "top_p", GenerateRequest.top_p, 0.0, 1.0),
        force_boi=_flag(body, "force_boi"),
        seed=_integer(body, "seed", 0, 0, 2**31 - 1) if body.get("seed") is not None else None,
        previews=_flag(body, "previews"),
        ratio=plain_text(body["ratio"], "'ratio'") if body.get("ratio") is not None else None,
        given=frozenset({"temperature", "num_beams", "max_new_tokens", "top_p"} & body.keys()),
        gone=gone,
    )
    flags = len(request.text_spans) - 1
    if flags != len(request.images):
        raise RequestError(f"'text' holds {flags} {PLACEHOLDER} placeholders, but 'images' has "
                           f"{len(request.images)} entries; they must be equal.")
    return request


def _text(value: object, limits: Limits) -> str:
    if isinstance(value, bytes):  # see `body.read_body`
        raise RequestError(f"'text' has more than the {limits.max_text_chars} characters that are accepted.")
    if not isinstance(value, str):
        raise RequestError(f"'text' must be a string, not {_kind(value)}.")
    if len(value) > limits.max_text_chars:
        raise RequestError(f"'text' has {len(value)} characters; at most {limits.max_text_chars} are accepted.")
    return plain_text(value, "'text'")


def _images(value: object, limits: Limits) -> list[str | bytes | list[int]]:
    if not isinstance(value, list):
        raise RequestError(f"'images' must be a list, not {_kind(value)}.")
    if len(value) > limits.max_images:
        raise RequestError(f"'images' has {len(value)} entries; at most {limits.max_images} are accepted.")
    for number, item in enumerate(value):
        if isinstance(item, list):
            if len(item) > limits.max_codes:
                raise RequestError(f"images[{number}] has {len(item)} codes; at most {limits.max_codes} are accepted.")
            if not all(isinstance(code, int) and not isinstance(code, bool) for code in item):
                raise RequestError(f"images[{number}] must be a list of whole numbers (image codes).")
        elif not isinstance(item, str | bytes):
            raise RequestError(f"images[{number}] must be base64 text or a list of image codes, not {_kind(item)}.")
    return list(value)


def _number(body: Mapping[str, Any], key: str, default: float, low: float, high: float) -> float:
    value = body.get(key, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value or abs(value) == math.inf:
        raise RequestError(f"{key!r} must be a number, not {_kind(value)}.")
    if not low <= value <= high:
        raise RequestError(f"{key!r} is {shown(value)}; it must lie between {low:g} and {high:g}.")
    return float(value)


def _integer(body: Mapping[str, Any], key: str, default: int, low: int, high: int) -> int:
    value = body.get(key, default)
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # JSON clients in JavaScript (and slider widgets) send 1.0
    if isinstance(value, bool) or not isinstance(value, int):
        raise RequestError(f"{key!r} must be a whole number, not {_kind(value)}.")
    if not low <= value <= high:
        raise RequestError(f"{key!r} is {shown(value)}; it must lie between {low} and {high}.")
    return value


def _flag(body: Mapping[str, Any], key: str) -> bool:
    value = body.get(key, False)
    if not isinstance(value, bool):
        raise RequestError(f"{key!r} must be true or false, not {_kind(value)}.")
    return value


def shown(value: float) -> str:
    """A number in a sentence: one of thousands of digits by how many it has."""
    return str(value) if abs(value) < 10**30 else "a number of over 30 digits"


def _kind(value: object) -> str:
    names = {"NoneType": "null", "str": "a string", "list": "a list", "dict": "an object", "bool": "true/false",
             "int": "a number", "float": "a fraction or not a finite number"}
    return names.get(type(value).__name__, type(value).__name__)
