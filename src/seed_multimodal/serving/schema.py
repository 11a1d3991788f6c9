"""JSON schemas of all requests and responses, validated by pydantic; `openapi` documents them.

`POST /generate` has the field names and defaults of the original demo server (`seed`, `previews`, `ratio` and `boxes`
are additions); routes below `/v1` have those of OpenAI's API, and further fields for images and their codes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from seed_multimodal.errors import RequestError
from seed_multimodal.language.vocabulary import PLACEHOLDER

JSON_LINES, EVENTS = "application/x-ndjson", "text/event-stream"  # media types of streams
MAX_CODES, MAX_IMAGES, MAX_TEXT = 1024, 16, 32_000  # codes of one image; images and characters of a request
MAX_VALUES = 200_000  # of a body
Codes = Annotated[list[int], Field(max_length=MAX_CODES)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]
Temperature = Annotated[float, Field(ge=0, le=5, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Beams = Annotated[int, Field(ge=1, le=8)]
NewTokens = Annotated[int, Field(ge=1, le=2048)]
Shape = Annotated[str, Field(max_length=20)]
Model = TypeVar("Model", bound=BaseModel)


@dataclass(frozen=True)
class Limits:
    """Limits of the server; `max_pixels`: of all images of a request, from their headers; `seconds`: of an answer."""

    max_body_bytes: int = 64 << 20
    max_image_bytes: int = 20 << 20
    max_pixels: int = 32_000_000
    max_running: int = 16
    max_waiting: int = 16
    seconds: float = 600.0


# ---- POST /generate


class GenerateRequest(BaseModel):
    """`text`: the conversation so far without `<s>`, with one `<image>` for each entry of `images`, base64 of an image
    file or a list of codes. `model_fields_set` names the settings that the client has sent."""

    model_config = ConfigDict(frozen=True)

    text: str = Field(max_length=MAX_TEXT)
    images: list[str | Codes] = Field(max_length=MAX_IMAGES)
    temperature: Temperature = 0.7
    num_beams: Beams = 1
    max_new_tokens: NewTokens = 256
    top_p: Share = 0.5
    force_boi: bool = False
    seed: Seed | None = None
    previews: bool = False
    ratio: Shape | None = None

    @model_validator(mode="after")
    def _count(self) -> GenerateRequest:
        count = self.text.count(PLACEHOLDER)
        if count != len(self.images):
            raise ValueError(f"'text' holds {count} {PLACEHOLDER} placeholders, but 'images' has {len(self.images)} "
                             f"entries; they must be equal")
        return self


class GenerateResponse(BaseModel):
    """`text` has one `<image>` for each entry of `images`: base64 PNG, `""` where none could be drawn. `images_ids`:
    codes of all images, those of the request first, None for one without codes, which a client sends again. `boxes`:
    `image` (its number in the request) and `box` (left, top, right, bottom as shares of its size)."""

    text: str = ""
    images: list[str] = []
    images_ids: list[list[int] | None] = []
    error_msg: list[str] = []
    boxes: list[dict[str, Any]] = []

    def to_json(self) -> dict[str, Any]:
        return self.model_dump(exclude=None if self.boxes else {"boxes"})


class ErrorResponse(BaseModel, extra="allow"):
    """One sentence: `error`, next to the keys of an answer; below `/v1` an object with `message`, `type`, `param` and
    `code`."""

    error: str | dict[str, str | None]


# ---- /v1


class ImageUrl(BaseModel):
    """`url`: `data:image/…;base64,…`; nothing is fetched."""

    url: str


class Part(BaseModel):
    """A text, or an image: `image_url`, or its `codes`, which are read instead. Of an image of an answer: its number
    (`index`); the characters of the answer's text before it (`offset`); `preview`: it is drawn from its first codes,
    and a better one of the same `index` follows."""

    type: Literal["text", "image_url"]
    text: str = ""
    image_url: ImageUrl | None = None
    codes: Codes | None = None
    index: int = 0
    offset: int = Field(MAX_TEXT, ge=0)
    preview: bool = False

    @property
    def value(self) -> str | ImageUrl | list[int]:
        return self.text if self.type == "text" else self.codes or self.image_url or ""

    @model_validator(mode="after")
    def _complete(self) -> Part:
        if self.type != "text" and not self.value:
            raise ValueError("An image lacks 'image_url' or 'codes'")
        return self


class ChatMessage(BaseModel):
    """As OpenAI's; an assistant's may have the `images` of an earlier answer."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part] | None = None
    images: list[Part] = Field([], max_length=MAX_IMAGES)

    @property
    def parts(self) -> list[str | ImageUrl | list[int]]:
        """Texts, images and codes in order."""
        text, start = self.content if isinstance(self.content, str) else "", 0
        parts = [part.value for part in self.content] if isinstance(self.content, list) else []
        for image in sorted(self.images, key=lambda one: one.offset):
            parts += [text[start:image.offset], image.value]
            start = image.offset
        return [part for part in [*parts, text[start:]] if part]


class ChatRequest(BaseModel):
    """As OpenAI's; `modalities` of "image" alone or `force_image`: the answer must hold an image; `previews`: a stream
    shows images while they are made; `ratio`: shape of LaVIT's images."""

    model: str = ""
    messages: list[ChatMessage] = Field(min_length=1, max_length=256)
    max_tokens: NewTokens | None = None
    max_completion_tokens: NewTokens | None = None
    temperature: Temperature | None = None
    top_p: Share | None = None
    seed: Seed | None = None
    num_beams: Beams | None = None
    n: Literal[1] | None = None
    stream: bool = False
    stream_options: dict[str, Any] | None = None
    modalities: list[Literal["text", "image"]] | None = None
    force_image: bool = False
    previews: bool = False
    ratio: Shape | None = None

    @model_validator(mode="after")
    def _count(self) -> ChatRequest:
        parts = [part for message in self.messages for part in message.parts]
        texts = [part for part in parts if isinstance(part, str)]
        images, length = len(parts) - len(texts), sum(map(len, texts))
        if images > MAX_IMAGES or length > MAX_TEXT:
            raise ValueError(f"The messages hold {images} images and {length} characters; {MAX_IMAGES} and {MAX_TEXT} "
                             f"are allowed")
        return self

    @property
    def settings(self) -> dict[str, Any]:
        """The settings sent by the client, named as in `MultimodalSystem.chat`."""
        given = {"temperature": self.temperature, "top_p": self.top_p, "seed": self.seed, "ratio": self.ratio,
                 "num_beams": self.num_beams, "max_new_tokens": self.max_completion_tokens or self.max_tokens}
        return {"force_image": self.force_image or self.modalities == ["image"],
                **{name: value for name, value in given.items() if value is not None}}


class AnswerMessage(ChatMessage):
    """`notes`: sentences about broken images, unknown words and messages that were left out; `boxes`: as of
    `/generate`."""

    role: Literal["assistant"] = "assistant"
    content: str = ""
    boxes: list[dict[str, Any]] = []
    notes: list[str] = []


class Choice(BaseModel):
    index: int = 0
    message: AnswerMessage
    finish_reason: Literal["stop", "length"]


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: dict[str, int]


class ImagesRequest(BaseModel):
    """As OpenAI's for generations and edits; image n of them has `seed` + n. A system draws in its own size, LaVIT in
    one of its shapes (`ratio`); `url` gives a data URL."""

    prompt: str = Field(min_length=1, max_length=MAX_TEXT)
    model: str = ""
    n: int = Field(1, ge=1, le=8)
    response_format: Literal["b64_json", "url"] = "b64_json"
    seed: Seed | None = None
    ratio: Shape | None = None


class TokensRequest(BaseModel):
    """Either `images` (base64 or data URLs), which become codes, or `codes`, which are drawn with `seed`; `first`: from
    so many codes of each, where a system can (SEED-LLaMA)."""

    images: list[str] = Field([], max_length=MAX_IMAGES)
    codes: list[Codes] = Field([], max_length=MAX_IMAGES)
    seed: Seed = 0
    first: int | None = Field(None, ge=1, le=MAX_CODES)

    @model_validator(mode="after")
    def _either(self) -> TokensRequest:
        if bool(self.images) == bool(self.codes):
            raise ValueError("Send either 'images' or 'codes'")
        return self


class ImageData(BaseModel):
    """One of the three."""

    b64_json: str | None = None
    url: str | None = None
    codes: list[int] | None = None


class ImagesResponse(BaseModel):
    created: int
    data: list[ImageData]


# ---- parsing and documentation


class FieldError(RequestError):
    """A request with a wrong field, named by `field`."""

    def __init__(self, field: str, sentence: str) -> None:
        self.field = field
        super().__init__(sentence)


def read_request(kind: type[Model], body: bytes | Mapping[str, Any]) -> Model:
    """Parse and validate a request: JSON, or the fields of a form.

    Raises:
        FieldError: a missing field, or one of the wrong type or out of range.
    """
    if isinstance(body, bytes) and body.count(b",") > MAX_VALUES:  # parsing needs fifty times the bytes
        raise FieldError("", "The request body holds too many values.")
    try:
        return kind.model_validate_json(body) if isinstance(body, bytes) else kind.model_validate(dict(body))
    except ValidationError as error:
        errors = error.errors(include_url=False, include_input=False)
        first = max(errors, key=lambda one: len(one["loc"]))  # the best matching type
        raise FieldError(_path(first), _sentence(first)) from None


def _path(error: Any) -> str:
    """`messages.0.role`: without the kinds of value that were tried."""
    return ".".join(str(one) for one in error["loc"] if one != "str" and "[" not in str(one))


def _sentence(error: Any) -> str:
    name, *place = error["loc"] or ("",)
    if error["type"] == "json_invalid":
        return "The request body is not valid JSON."
    if error["type"] == "value_error":
        return f"{error['ctx']['error']}."
    if error["type"] == "missing" and not place:
        return f"The request lacks {name!r}."
    if not name:
        return "The request body must be a JSON object with the fields of /openapi.json, as 'text' and 'images'."
    if name == "images" and place[1:]:
        return f"images[{place[0]}] must be base64 text or a list of at most {MAX_CODES} image codes (whole numbers)."
    return f"{_path(error)!r}: {error['msg']}."


ROUTES: dict[str, tuple[str, Any, Any]] = {  # method, request and answer
    "/generate": ("post", GenerateRequest, GenerateResponse),
    "/v1/chat/completions": ("post", ChatRequest, ChatCompletion),
    "/v1/images/generations": ("post", ImagesRequest, ImagesResponse),
    "/v1/images/edits": ("post", ImagesRequest, ImagesResponse),
    "/v1/images/tokens": ("post", TokensRequest, ImagesResponse),
    **dict.fromkeys(("/v1/models", "/health", "/ready", "/metrics", "/openapi.json"), ("get", None, None)),
}
STREAMS = {"/generate": JSON_LINES, "/v1/chat/completions": EVENTS, "/metrics": "text/plain"}


def openapi(version: str) -> dict[str, Any]:
    """The OpenAPI document of all routes."""
    from pydantic.json_schema import models_json_schema

    kinds: list[Any] = [(route[1], "validation") for route in ROUTES.values() if route[1]]
    kinds += [(kind, "serialization") for kind in (GenerateResponse, ChatCompletion, ImagesResponse, ErrorResponse)]
    refs: dict[Any, Any]
    refs, schemas = models_json_schema(list(dict.fromkeys(kinds)), ref_template="#/components/schemas/{model}")
    paths: dict[str, Any] = {}
    for path, (method, asked, answered) in ROUTES.items():
        made = {"application/json": {"schema": refs[answered, "serialization"] if answered else {}}}
        if path in STREAMS:
            made[STREAMS[path]] = {"schema": {"type": "string"}}
        operation: dict[str, Any] = {"responses": {
            "200": {"description": "The answer.", "content": made},
            "default": {"description": "One sentence.", "content": {
                "application/json": {"schema": refs[ErrorResponse, "serialization"]}}}}}
        if asked and path == "/v1/images/edits":
            file = {"type": "string", "format": "binary"}
            operation["requestBody"] = {"required": True, "content": {"multipart/form-data": {"schema": {"allOf": [
                refs[asked, "validation"], {"required": ["image"], "properties": {"image": file}}]}}}}
        elif asked:
            operation["requestBody"] = {"required": True, "content": {
                "application/json": {"schema": refs[asked, "validation"]}}}
        paths[path] = {method: operation}
    return {"openapi": "3.1.0", "info": {"title": "SEED Multimodal", "version": version}, "paths": paths,
            "components": {"schemas": schemas.get("$defs", {})}}
