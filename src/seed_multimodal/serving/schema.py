"""JSON schemas of the requests, validated by pydantic; `openapi` documents them.

`POST /generate` has the field names and defaults of the original demo server, and `seed`; routes below `/v1` have those
of OpenAI's API, and further fields for images and their codes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AliasChoices,
    BaseModel,
    BeforeValidator,
    Field,
    StringConstraints,
    ValidationError,
    model_validator,
)
from pydantic.json_schema import models_json_schema

from seed_multimodal import __version__
from seed_multimodal.entry import MAX_RUNNING
from seed_multimodal.errors import RequestError
from seed_multimodal.language.vocabulary import PLACEHOLDER

MAX_IMAGES, MAX_TEXT = 16, 32_000  # images and characters of a request
MAX_VALUES = 200_000  # of a body
Codes = Annotated[
    list[Annotated[int, Field(ge=0, lt=2**31)]], Field(max_length=1024)
]  # of one image
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Temperature = Annotated[float, Field(ge=0, le=5, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Beams = Annotated[int, Field(ge=1, le=8)]
NewTokens = Annotated[int, Field(ge=1)]  # the context's end caps it
Stop = Annotated[str, StringConstraints(min_length=1, max_length=100)]
Model = TypeVar("Model", bound=BaseModel)


# Fields of OpenAI's chat completions without counterpart here.
UNSUPPORTED = ("tools", "functions", "logprobs", "top_logprobs", "logit_bias", "audio")


class Fields(BaseModel):
    """Fields of a JSON object; null is absent, as in OpenAI's API."""

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, body: Any) -> Any:
        if not isinstance(body, Mapping):
            return body
        return {name: value for name, value in body.items() if value is not None}


def as_list(value: Any) -> Any:
    """A single string as a list of one, as OpenAI's fields accept it."""
    return [value] if isinstance(value, str) else value


@dataclass(frozen=True)
class Limits:
    """Limits of the server; `max_pixels`: of all images of a request, from their headers; `seconds`: of an answer."""

    max_body_bytes: int = 64 << 20
    max_image_bytes: int = 20 << 20
    max_pixels: int = 32_000_000
    max_running: int = MAX_RUNNING
    max_waiting: int = 16
    seconds: float = 600.0


class GenerateRequest(BaseModel):
    """`text`: the conversation so far without `<s>`, with one `<image>` for each entry of `images`, base64 of an image
    file or a list of codes."""

    text: str = Field(max_length=MAX_TEXT)
    images: list[str | Codes] = Field(max_length=MAX_IMAGES)
    temperature: Temperature = 0.7
    num_beams: Beams = 1
    max_new_tokens: NewTokens = 256
    top_p: Share = 0.5
    force_boi: bool = False
    seed: Seed | None = None

    @model_validator(mode="after")
    def _count(self) -> GenerateRequest:
        count = self.text.count(PLACEHOLDER)
        if count != len(self.images):
            raise ValueError(
                f"'text' holds {count} {PLACEHOLDER} placeholders, but 'images' has {len(self.images)} "
                f"entries; they must be equal"
            )
        return self


class GenerateResponse(BaseModel):
    """`text` has one `<image>` for each entry of `images`: base64 PNG, `""` where none could be drawn. `images_ids`:
    codes of all images, those of the request first, None for one without codes, which a client sends again."""

    text: str = ""
    images: list[str] = []
    images_ids: list[list[int] | None] = []
    error_msg: list[str] = []


class ImageUrl(BaseModel):
    """`url`: `data:image/…;base64,…`; nothing is fetched."""

    url: str


class Part(Fields):
    """A text (or an assistant's `refusal`), or an image: `image_url`, or its `codes`, which are read instead if it is
    an assistant's; `offset`: of an image of an answer, the characters of the text before it."""

    type: Literal["text", "refusal", "image_url"]
    text: str = ""
    refusal: str = ""
    image_url: ImageUrl = ImageUrl(url="")
    codes: Codes | None = None
    offset: int = Field(MAX_TEXT, ge=0)

    @property
    def value(self) -> str | ImageUrl | list[int]:
        if self.type == "image_url":
            return self.codes or self.image_url
        return self.text if self.type == "text" else self.refusal


class ChatMessage(Fields):
    """As OpenAI's; an assistant's may have the `images` of an earlier answer."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part] | None = None
    images: list[Part] = Field([], max_length=MAX_IMAGES)

    @property
    def parts(self) -> list[str | ImageUrl | list[int]]:
        """Texts, images and codes in order."""
        text, start = self.content if isinstance(self.content, str) else "", 0
        parts = (
            [
                part.image_url if self.role == "user" and part.image_url.url else part.value
                for part in self.content
            ]
            if isinstance(self.content, list)
            else []
        )
        for image in sorted(self.images, key=lambda one: one.offset):
            parts += [text[start : image.offset], image.value]
            start = image.offset
        return [part for part in [*parts, text[start:]] if part]


class ChatRequest(Fields):
    """As OpenAI's (also `max_tokens`); `modalities` of "image" alone or `force_image`: the answer must hold an image;
    `previews`: a stream shows images while they are made; `stop`: texts that end the answer and are not in it;
    `ratio`: shape of LaVIT's images."""

    messages: list[ChatMessage] = Field(min_length=1, max_length=256)
    max_new_tokens: NewTokens | None = Field(
        None, validation_alias=AliasChoices("max_completion_tokens", "max_tokens")
    )
    temperature: Temperature | None = None
    top_p: Share | None = None
    seed: Seed | None = None
    num_beams: Beams | None = None
    stop: Annotated[list[Stop], Field(max_length=4), BeforeValidator(as_list)] | None = None
    ratio: str | None = None
    n: Literal[1] | None = None
    stream: bool = False
    modalities: list[Literal["text", "image"]] | None = None
    force_image: bool = False
    previews: bool = False

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, body: Any) -> Any:
        """Refuse fields that would change the answer, unless their value says that they are not used."""
        if not isinstance(body, Mapping):
            return body
        for name in UNSUPPORTED:
            if body.get(name):
                raise ValueError(f"{name} is not supported by this server")
        if body.get("response_format") not in (None, {"type": "text"}):
            raise ValueError("response_format other than text is not supported by this server")
        return body

    @model_validator(mode="after")
    def _count(self) -> ChatRequest:
        parts = [part for message in self.messages for part in message.parts]
        texts = [part for part in parts if isinstance(part, str)]
        images, length = len(parts) - len(texts), sum(map(len, texts))
        if all(isinstance(part, str) and not part.strip() for part in self.messages[-1].parts):
            raise ValueError("The last message is empty")
        if images > MAX_IMAGES or length > MAX_TEXT:
            raise ValueError(
                f"The messages hold {images} images and {length} characters; {MAX_IMAGES} and {MAX_TEXT} "
                f"are allowed"
            )
        return self


class ImagesRequest(Fields):
    """As OpenAI's for generations and edits; image n has `seed` + n. `ratio`: of LaVIT's images."""

    prompt: Annotated[
        str, StringConstraints(strip_whitespace=True, min_length=1, max_length=MAX_TEXT)
    ]
    n: int = Field(1, ge=1, le=8)
    response_format: Literal["b64_json"] = "b64_json"
    seed: Seed | None = None
    ratio: str | None = None


class TokensRequest(Fields):
    """Either `images` (base64 or data URLs), which become codes, or `codes`, which are drawn with `seed`; `first`: from
    so many codes of each, where a system can (SEED-LLaMA)."""

    images: list[str] = Field([], max_length=MAX_IMAGES)
    codes: list[Codes] = Field([], max_length=MAX_IMAGES)
    seed: Seed = 0
    first: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _either(self) -> TokensRequest:
        if bool(self.images) == bool(self.codes):
            raise ValueError("Send either 'images' or 'codes'")
        return self


def read_request(kind: type[Model], body: bytes | Mapping[str, Any]) -> Model:
    """Parse and validate a request: JSON, or the fields of a form.

    Raises:
        RequestError: a missing field, or one of the wrong type or out of range.
    """
    if (
        isinstance(body, bytes) and body.count(b",") > MAX_VALUES
    ):  # parsing needs fifty times the bytes
        raise RequestError("The request body holds too many values.")
    try:
        return (
            kind.model_validate_json(body) if isinstance(body, bytes) else kind.model_validate(body)
        )
    except ValidationError as error:
        first = sorted(error.errors(), key=lambda one: len(one["loc"]))[
            -1
        ]  # of the best matching type
        where, message = (
            ".".join(map(str, first["loc"])),
            first["msg"].removeprefix("Value error, "),
        )
        raise RequestError(": ".join(filter(None, (where, f"{message}.")))) from None


POSTED: dict[str, type[BaseModel]] = {
    "/generate": GenerateRequest,
    "/v1/chat/completions": ChatRequest,
    "/v1/images/generations": ImagesRequest,
    "/v1/images/edits": ImagesRequest,
    "/v1/images/tokens": TokensRequest,
}


def openapi() -> dict[str, Any]:
    """The OpenAPI document of all routes."""
    kinds: list[Any] = [*dict.fromkeys(POSTED.values()), GenerateResponse]
    refs: Any
    refs, schemas = models_json_schema(
        [(kind, "validation") for kind in kinds], ref_template="#/components/schemas/{model}"
    )
    answers = {
        "200": {"description": "The answer."},
        "default": {"description": "An error: `error` is a sentence."},
    }
    paths: dict[str, Any] = {
        path: {"get": {"responses": answers}}
        for path in ("/health", "/ready", "/metrics", "/openapi.json", "/v1/models")
    }
    name = {
        "name": "name",
        "in": "path",
        "required": True,
        "schema": {"type": "string", "minLength": 1},
    }
    paths["/v1/models/{name}"] = {"get": {"parameters": [name], "responses": answers}}
    for path, kind in POSTED.items():
        sent = {"application/json": {"schema": refs[kind, "validation"]}}
        answer = refs[GenerateResponse, "validation"] if path == "/generate" else {"type": "object"}
        made: dict[str, Any] = {"application/json": {"schema": answer}}
        if path == "/v1/chat/completions":
            made["text/event-stream"] = {}
        elif path == "/v1/images/edits":
            file = {
                "required": ["image"],
                "properties": {"image": {"type": "string", "format": "binary"}},
            }
            sent = {"multipart/form-data": {"schema": {"allOf": [refs[kind, "validation"], file]}}}
        paths[path] = {
            "post": {
                "requestBody": {"required": True, "content": sent},
                "responses": {**answers, "200": {"description": "The answer.", "content": made}},
            }
        }
    return {
        "openapi": "3.1.0",
        "info": {"title": "SEED Multimodal", "version": __version__},
        "paths": paths,
        "components": {"schemas": schemas["$defs"]},
    }
