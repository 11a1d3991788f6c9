"""The JSON of `POST /generate`: requests, validated by pydantic, and answers.

Field names and defaults are those of the original demo server; `seed`, `previews`, `ratio` and `boxes` are additions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from seed_multimodal.errors import RequestError
from seed_multimodal.language.vocabulary import PLACEHOLDER

JSON_LINES = "application/x-ndjson"  # media type of an answer with previews: one object per line, the answer last
MAX_CODES = 1024  # in one list, of any model


@dataclass(frozen=True)
class Limits:
    """Limits of the server; `max_pixels`: of all images of a request, from their headers."""

    max_body_bytes: int = 64 << 20
    max_image_bytes: int = 20 << 20
    max_pixels: int = 32_000_000
    max_waiting: int = 16


class GenerateRequest(BaseModel):
    """One request.

    `text` is the conversation so far without `<s>`, with one `<image>` for each entry of `images`: base64 of an image
    file, or a list of codes. `model_fields_set` names the settings that the client has sent.
    """

    model_config = ConfigDict(frozen=True)

    text: str = Field(max_length=32_000)
    images: list[str | Annotated[list[int], Field(max_length=MAX_CODES)]] = Field(max_length=16)
    temperature: float = Field(0.7, ge=0, le=5, allow_inf_nan=False)
    num_beams: int = Field(1, ge=1, le=8)
    max_new_tokens: int = Field(256, ge=1, le=2048)
    top_p: float = Field(0.5, ge=0, le=1, allow_inf_nan=False)
    force_boi: bool = False
    seed: int | None = Field(None, ge=0, lt=2**31)
    previews: bool = False
    ratio: str | None = Field(None, max_length=20)


class Preview(BaseModel):
    """An image drawn from its first `codes` codes: `picture` is its place in the answer's `images`; base64 PNG."""

    picture: int
    codes: int
    preview: str


class FoundBox(BaseModel):
    """A box of an answer on image number `image` of the request: left, top, right, bottom as shares of its size."""

    image: int
    box: tuple[float, float, float, float]


class GenerateResponse(BaseModel):
    """One answer: `text` has one `<image>` for each entry of `images`.

    `images` are base64 PNG, `""` where no image could be drawn; `images_ids` are the codes of all images, those of the
    request first, None for an image without codes, which a client sends again as an image.
    """

    text: str = ""
    images: list[str] = []
    images_ids: list[list[int] | None] = []
    error_msg: list[str] = []
    boxes: list[FoundBox] = []

    def to_json(self) -> dict[str, Any]:
        return self.model_dump(exclude=None if self.boxes else {"boxes"})


def error_json(sentence: str) -> dict[str, Any]:
    """The body of an error: `error`, and the keys of an answer for clients that read only those."""
    return {"error": sentence, **GenerateResponse(error_msg=[sentence]).to_json()}


def read_request(body: str | bytes) -> GenerateRequest:
    """Parse and validate the JSON of a request.

    Raises:
        RequestError: one sentence with the field that is missing, of the wrong type or out of range.
    """
    try:
        request = GenerateRequest.model_validate_json(body)
    except ValidationError as error:
        raise RequestError(_sentence(error.errors(include_url=False, include_input=False)[0])) from None
    count = request.text.count(PLACEHOLDER)
    if count != len(request.images):
        raise RequestError(f"'text' holds {count} {PLACEHOLDER} placeholders, but 'images' has {len(request.images)} "
                           f"entries; they must be equal.")
    return request


def _sentence(error: Any) -> str:
    name, *place = error["loc"] or ("",)
    if error["type"] == "json_invalid":
        return "The request body is not valid JSON."
    if error["type"] == "missing":
        return f"The request lacks {name!r}."
    if not name:
        return "The request body must be a JSON object with 'text' and 'images'."
    if place:
        return f"images[{place[0]}] must be base64 text or a list of at most {MAX_CODES} image codes (whole numbers)."
    return f"{name!r}: {error['msg']}."
