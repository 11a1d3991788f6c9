"""JSON schemas of the requests, validated by pydantic; `openapi` documents them.

`POST /generate` has the field names and defaults of the original demo server, and `seed`. Routes
below `/v1` have those of OpenAI's API, and further fields for images and their codes. The fields of
a model are followed, those of `fields.yaml` are ignored, others are refused by their name.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, TypeAlias, TypeVar

from pydantic import (
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    TypeAdapter,
    ValidationError,
    model_validator,
)
from pydantic.json_schema import models_json_schema

from seed_multimodal import __version__
from seed_multimodal.config import read_table
from seed_multimodal.disk import JsonObject
from seed_multimodal.entry import MAX_RUNNING
from seed_multimodal.errors import RequestError, short_name
from seed_multimodal.language.vocabulary import PLACEHOLDER
from seed_multimodal.settings import nearest

VALIDATION: Literal["validation"] = "validation"  # the schemas of requests, not of their dumps

MAX_MESSAGES = 4096  # of a request
MAX_IMAGES = 16  # of a request
MAX_TEXT = 32_000  # characters of a request
MAX_FIELDS = 100  # of an object
MAX_VALUES = 200_000  # of a body: parsing needs fifty times the bytes

JSON: TypeAdapter[Any] = TypeAdapter(Any)  # its values, and models as them


def no_truth(value: object) -> object:
    """A number of a body. Raises ValueError: true or false, which pydantic reads as 1 and 0."""
    if isinstance(value, bool):
        raise ValueError("true and false are no numbers")
    return value


Model = TypeVar("Model", bound="Fields")
Value = TypeVar("Value")
Whole = Annotated[int, BeforeValidator(no_truth)]
Real = Annotated[float, BeforeValidator(no_truth)]
Items = Annotated[list[Value], Field(fail_fast=True)]  # an error names the first wrong one
Codes = Items[Annotated[Whole, Field(ge=0, lt=2**31)]]  # of one image
Seed = Annotated[Whole, Field(ge=-(2**63), lt=2**63)]
Temperature = Annotated[Real, Field(ge=0, le=5, allow_inf_nan=False)]
Share = Annotated[Real, Field(ge=0, le=1, allow_inf_nan=False)]
Beams = Annotated[Whole, Field(ge=1, le=8)]
NewTokens = Annotated[Whole, Field(ge=1)]  # the context's end caps it
Stop = Annotated[str, StringConstraints(min_length=1, max_length=100)]
# A field that the server reads. The dump of a request for an answer holds the others: settings,
# which are keyword arguments of `MultimodalSystem.chat`.
NotSetting = Annotated[Value, Field(exclude=True)]
StreamOption = Literal["include_usage", "include_obfuscation"]
MessagePart: TypeAlias = "str | ImageUrl | list[int]"  # a text, an image, codes of an image

# Group → field → its values that change nothing, or "any"; and advice about a refused field.
IGNORED = read_table(Path(__file__).with_name("fields.yaml"))
ADVICE = IGNORED.pop("advice")

# An image in a text: in Markdown, in HTML, or its URL alone. In the first two the URL may have line
# breaks. No repetition is tried twice (`+` behind it), nor goes on over the next beginning: no text
# takes long.
HEAD = r"\bdata:image/[\w.+;=%-]*+,"
LINE = r"[\w+/=%-]++"
LINES = rf"({HEAD}\s*+{LINE}(?:\r?\n\s*+{LINE})*+)"
TEXT_IMAGE = re.compile(
    # ![alt [text]](<URL> "title")
    rf"(?ai)!\[(?:[^\[\]]|\[[^\[\]]*+\])*+\]\(\s*+<?{LINES}(?:\"[^\"]*+\"|'[^']*+'|[^)\"'\[])*+\)"
    rf"|<img\b[^<>]*?\bsrc\s*+=\s*+[\"']?\s*+{LINES}[^<>]*+>"
    rf"|<?({HEAD}{LINE})>?"
)


# ---- parts of requests


def describe_fields(schema: JsonObject, model: type[Fields]) -> None:
    """Add the further names of fields, and the ignored ones, to the JSON schema of a model."""
    properties = schema["properties"]
    for first, *others in model.names():
        properties |= dict.fromkeys(others, properties[first])
    for name, values in model.ignored().items():
        ignored = {} if values == "any" else {"enum": values}
        properties.setdefault(name, {"description": "Ignored.", **ignored})


class Fields(BaseModel):
    """Fields of a JSON object; null is absent, as in OpenAI's API.

    groups: of `IGNORED`.
    """

    model_config = ConfigDict(extra="forbid", json_schema_extra=describe_fields)
    groups: ClassVar[Sequence[str]] = ("messages",)

    @classmethod
    @functools.cache
    def ignored(cls, advice: bool = False) -> dict[str, Any]:
        """Field → its values that change nothing, or "any"; or its `advice`."""
        table = ADVICE if advice else IGNORED
        rows = [row for group in cls.groups for row in table[group].items()]
        return {
            name: value for name, value in rows if name not in cls.model_fields or value != "any"
        }

    @classmethod
    @functools.cache
    def names(cls) -> list[list[str]]:
        """The names of each field in a request."""
        names: list[list[str]] = []
        for name, field in cls.model_fields.items():
            alias = field.validation_alias
            names.append([*map(str, alias.choices)] if isinstance(alias, AliasChoices) else [name])
        return names

    @model_validator(mode="before")
    @classmethod
    def _drop_ignored(cls, body: object) -> object:
        if not isinstance(body, Mapping):
            return body
        # 1. An error for each of many unknown fields would take longer than reading the body.
        if len(body) > MAX_FIELDS:
            raise ValueError(f"an object has at most {MAX_FIELDS} fields")

        # 2. Fields without effect.
        ignored = cls.ignored()
        kept: dict[str, object] = {}
        for name, value in body.items():
            values = ignored.get(name, ())
            # Python's True equals 1, JSON's does not.
            is_harmless = values == "any" or any(
                value == harmless and isinstance(value, bool) == isinstance(harmless, bool)
                for harmless in values
            )
            if value is not None and not is_harmless:
                kept[name] = value

        # 3. Further names of a field that is sent.
        for names in cls.names():
            sent = [name for name in names if name in kept]
            for name in sent[1:]:
                if kept.pop(name) != kept[sent[0]]:
                    raise contradiction(name, sent[0])
        return kept


def as_list(value: object) -> object:
    """A single string as a list of one, as OpenAI's fields accept it."""
    return [value] if isinstance(value, str) else value


@dataclass(frozen=True)
class Limits:
    """Limits of the server.

    Attributes:
        max_pixels: of all images of a request, from their headers.
        max_running, max_waiting: requests.
        seconds: of an answer.
    """

    max_body_bytes: int = 64 << 20
    max_image_bytes: int = 20 << 20
    max_pixels: int = 32_000_000
    max_running: int = MAX_RUNNING
    max_waiting: int = 16
    seconds: float = 600.0


# ---- the original's route


class GenerateRequest(Fields):
    """`text`: the conversation so far without `<s>`, with one `<image>` for each entry of `images`.

    An entry is base64 of an image file, or a list of codes.
    """

    groups = ("every request", "/generate")
    stream: ClassVar[bool] = False

    text: NotSetting[str]
    images: NotSetting[Items[str | Codes]]
    temperature: Temperature = 0.7
    num_beams: Beams = 1
    max_new_tokens: NewTokens = 256
    top_p: Share = 0.5
    force_boi: NotSetting[bool] = False
    seed: Seed | None = None

    @model_validator(mode="after")
    def _count(self) -> Self:
        count = self.text.count(PLACEHOLDER)
        if count != len(self.images):
            raise RequestError(
                f"'text' holds {count} {PLACEHOLDER} placeholders, but 'images' has "
                f"{len(self.images)} entries; they must be equal.",
                "images",
            )
        return self


class GenerateResponse(BaseModel):
    """`text` has one `<image>` for each entry of `images`.

    An entry is base64 PNG, or `""` where none could be drawn. `images_ids`: codes of all images,
    those of the request first, None for one without codes, which a client sends again as an image.
    """

    text: str = ""
    images: list[str] = []
    images_ids: list[list[int] | None] = []
    error_msg: list[str] = []


# ---- OpenAI's routes


class ImageUrl(Fields):
    """`url`: `data:image/…;base64,…`; nothing is fetched."""

    url: str


class Part(Fields):
    """A text (or an assistant's `refusal`), or an image: `image_url`, also as `image`, or `codes`.

    `codes`: read instead of `image_url` if the image is an assistant's. `offset`: of an image of an
    answer, the characters of the text before it.
    """

    type: Literal[
        "text", "input_text", "output_text", "refusal", "image_url", "input_image", "image"
    ]
    text: str = Field("", validation_alias=AliasChoices("text", "refusal"))
    image_url: str | ImageUrl = Field("", validation_alias=AliasChoices("image_url", "image"))
    codes: Codes | None = None
    offset: Whole = Field(MAX_TEXT, ge=0)

    @model_validator(mode="after")
    def _no_others(self) -> Part:
        others = ("text",) if "image" in self.type else ("image_url", "codes")
        for name in others:
            if getattr(self, name):
                raise RequestError(f"A part of type {self.type!r} has no such field.", name)
        return self

    @property
    def url(self) -> ImageUrl:
        """The image that is not given by its codes."""
        image = self.image_url
        return ImageUrl(url=image) if isinstance(image, str) else image

    @property
    def value(self) -> MessagePart:
        return self.codes or self.url if "image" in self.type else self.text


def text_and_images(text: str) -> list[MessagePart]:
    """The texts that are not empty and the images of a text, in which clients keep drawings."""
    # Of the three groups of each image, one matches.
    return [
        ImageUrl(url=piece) if index % 4 else piece
        for index, piece in enumerate(TEXT_IMAGE.split(text))
        if piece
    ]


class ChatMessage(Fields):
    """As OpenAI's; an assistant's may have the `images` and the reasoning of an earlier answer."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Items[Part] = ""
    images: Items[Part] = []
    reasoning: str = Field(
        default="", validation_alias=AliasChoices("reasoning_content", "reasoning")
    )

    @property
    def parts(self) -> list[MessagePart]:
        """Texts, images and codes in order."""
        # 1. Parts of the content; an assistant's image is read from its codes.
        text = ""
        parts: list[MessagePart] = []
        if isinstance(self.content, str):
            text = self.content
        else:
            for part in self.content:
                is_new_image = self.role == "user" and part.url.url
                parts.append(part.url if is_new_image else part.value)
        # 2. Images of an earlier answer stand between pieces of its text.
        start = 0
        for image in sorted(self.images, key=lambda image: image.offset):
            parts += [text[start : image.offset], image.value]
            start = image.offset
        parts.append(text[start:])

        # 3. Images in texts.
        pieces: list[MessagePart] = []
        for item in parts:
            pieces += text_and_images(item) if isinstance(item, str) else [item]
        return [piece for piece in pieces if piece]


class ImageCall(Fields):
    """An image of an earlier response; `codes` are read instead of `result`."""

    role: ClassVar[str] = "assistant"
    reasoning: ClassVar[str] = ""

    type: Literal["image_generation_call"]
    result: str = ""
    codes: Codes | None = None

    @property
    def parts(self) -> list[MessagePart]:
        return [self.codes or ImageUrl(url=self.result)]


class ReasoningText(Fields):
    type: Literal["reasoning_text"]
    text: str


class ReasoningItem(Fields):
    """What the model wrote before an earlier response."""

    groups = ("messages", "reasoning")
    role: ClassVar[str] = "assistant"
    parts: ClassVar[Sequence[MessagePart]] = ()

    type: Literal["reasoning"]
    content: Items[ReasoningText] = []

    @property
    def reasoning(self) -> str:
        return "".join(part.text for part in self.content)


InputItem: TypeAlias = ChatMessage | ImageCall | ReasoningItem


class ImageOptions(Fields):
    """How images are returned.

    `size`: pixels, as 512x512. `partial_images`: a stream shows images so often before they are
    complete.
    """

    groups = ("every request", "images")

    size: Annotated[str, StringConstraints(pattern=r"^[1-9]\d{1,3}x[1-9]\d{1,3}$")] | None = None
    output_format: Literal["png", "jpeg", "webp"] = "png"
    output_compression: Whole = Field(default=100, ge=0, le=100)
    partial_images: Whole = Field(default=0, ge=0, le=3)


class SharedFields(Fields):
    """Settings of answers and drawings, which describe them."""

    seed: Seed | None = None
    ratio: str | None = None
    read_back: bool | None = None
    model: NotSetting[str | None] = None
    stream: NotSetting[bool] = False


class AnswerRequest(SharedFields):
    """Settings of an answer.

    `stop`: texts that end the answer and are not in it. `ratio`: aspect ratio of LaVIT's images.
    `stream_options`: with `include_usage`, a stream of chat completions ends with the `usage`.
    `previews`: a stream shows images while they are made. `read_back`: images have a description of
    what they show as `revised_prompt`, and notes say what of it was not asked for.

    usage_names: how the route calls the tokens of the prompt and of the answer.

    Its models have a `conversation`, and `images`: as of `MultimodalSystem.chat`.
    """

    usage_names: ClassVar[tuple[str, str]] = ("prompt", "completion")

    temperature: Temperature | None = None
    top_p: Share | None = None
    num_beams: Beams | None = None
    stop: Annotated[list[Stop], Field(max_length=4), BeforeValidator(as_list)] | None = None
    stream_options: NotSetting[dict[StreamOption, bool]] = {}
    previews: NotSetting[bool] = False

    @property
    def image_options(self) -> ImageOptions:
        return ImageOptions()


class ChatRequest(AnswerRequest):
    """As OpenAI's, with fields for images.

    `modalities`: of "image" alone, the answer must hold an image, as with `force_image`; of "text"
    alone, it holds none.
    """

    groups = ("every request", "answers", "/v1/chat/completions")

    messages: NotSetting[Items[ChatMessage]]
    max_new_tokens: NewTokens | None = Field(
        None, validation_alias=AliasChoices("max_completion_tokens", "max_tokens")
    )
    modalities: NotSetting[list[Literal["text", "image"]] | None] = Field(None, min_length=1)
    force_image: NotSetting[bool] = False

    @property
    def conversation(self) -> Sequence[InputItem]:
        return self.messages

    @property
    def images(self) -> str:
        modalities = set(self.modalities or ())
        if self.force_image or modalities == {"image"}:
            if modalities == {"text"}:
                raise contradiction("force_image", "modalities")
            return "forced"
        return "never" if modalities == {"text"} else "auto"


class ImageTool(ImageOptions):
    type: Literal["image_generation"]


class ResponsesRequest(AnswerRequest):
    """As OpenAI's responses: answers hold images unless `tool_choice` is "none"; with "required" or
    the tool as `tool_choice` they must. Nothing is stored.
    """

    groups = ("every request", "answers", "/v1/responses")
    usage_names = ("input", "output")

    input: NotSetting[str | Items[InputItem]]
    instructions: NotSetting[str] = ""
    max_new_tokens: NewTokens | None = Field(
        None, validation_alias=AliasChoices("max_output_tokens")
    )
    tools: NotSetting[list[ImageTool]] = Field([], max_length=1)
    tool_choice: NotSetting[Literal["auto", "none", "required"] | ImageTool] = "auto"

    @property
    def conversation(self) -> Sequence[InputItem]:
        items = self.input
        if isinstance(items, str):
            items = [ChatMessage(role="user", content=items)]
        if not self.instructions:
            return items
        return [ChatMessage(role="system", content=self.instructions), *items]

    @property
    def images(self) -> str:
        if self.tool_choice == "none":
            return "never"
        return "auto" if self.tool_choice == "auto" else "forced"

    @property
    def image_options(self) -> ImageOptions:
        options = self.tools[0] if self.tools else ImageTool(type="image_generation")
        if isinstance(self.tool_choice, ImageTool):
            options = options.model_copy(update=self.tool_choice.model_dump(exclude_unset=True))
        return options


class ImagesRequest(ImageOptions, SharedFields):
    """As OpenAI's for generations; image n has `seed` + n. `ratio`: of LaVIT's images. `read_back`:
    as of an answer.
    """

    prompt: Annotated[
        str, StringConstraints(strip_whitespace=True, min_length=1, max_length=MAX_TEXT)
    ]
    n: Whole = Field(1, ge=1, le=8)
    response_format: Literal["b64_json"] = "b64_json"


class EditsRequest(ImagesRequest):
    """As OpenAI's for edits, a form: all files of `image` are one request."""

    image: list[bytes] = Field(min_length=1)


class TokensRequest(Fields):
    """Either `images` (base64 or data URLs), which become codes, or `codes`, which become images.

    `seed`: of the drawing. `first`: draw from so many codes of each image, for SEED-LLaMA.
    """

    groups = ("every request",)
    stream: ClassVar[bool] = False

    images: Items[str] = []
    codes: Items[Codes] = Field([], max_length=MAX_IMAGES)
    seed: Seed = 0
    first: Whole | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _either(self) -> TokensRequest:
        if bool(self.images) == bool(self.codes):
            raise RequestError("Send either 'images' or 'codes'.", "images")
        if self.images and self.first:
            raise contradiction("first", "images")
        return self


# ---- reading requests


def read_request(model: type[Model], body: bytes | Mapping[str, object]) -> Model:
    """Parse and validate a request: JSON, or the fields of a form.

    Raises:
        RequestError: a missing field, or one of the wrong type or out of range.
    """
    if isinstance(body, bytes):
        # 1. JSON is UTF-8; some editors put a byte order mark before it.
        encoding = json.detect_encoding(body)
        if "utf-8" not in encoding:
            raise RequestError(f"The request body is {encoding.upper()}; send it as UTF-8.")
        body = body.removeprefix(b"\xef\xbb\xbf")

        # 2. Parsed values need much more memory than their text.
        if body.count(b",") > MAX_VALUES:
            raise RequestError("The request body holds too many values.")
    try:
        if isinstance(body, bytes):
            return model.model_validate_json(body)
        return model.model_validate(body)
    except ValidationError as error:
        # Of the alternatives of a union, the one that matches best fails at the deepest field.
        details = sorted(error.errors(), key=lambda details: len(details["loc"]))[-1]
        names = sent_names(body, details["loc"])
        message = f"{details['msg']}.".replace("unexpected end of hex", "lone surrogate in hex")
        if names[-1:] == ["size"]:
            message = "It must be WIDTHxHEIGHT, as 1024x1024, or auto."
        if details["type"] == "missing" and names[-1:] != [str(details["loc"][-1])]:
            names.append(str(details["loc"][-1]))
        if details["type"] == "extra_forbidden":
            message = unknown_field(model, names)
        raise RequestError(message, ".".join(names)) from None


def sent_names(body: Any, location: Sequence[int | str]) -> list[str]:
    """The keys and indices of a body in pydantic's location, which also has types of a union."""
    if isinstance(body, bytes) and location:
        body = JSON.validate_json(body)
    names: list[str] = []
    for item in location:
        try:
            body = body[item]
        except (LookupError, TypeError):
            continue
        names.append(str(item))
    return names


def unknown_field(model: type[Fields], names: Sequence[str]) -> str:
    """What to do instead of sending a field, as a sentence."""
    values = model.ignored().get(".".join(names))
    exception = f", except {json.dumps(values)}" if values else ""
    advice = model.ignored(advice=True).get(names[-1], "")
    similar = ""
    if not values and not advice:
        document = model.model_json_schema()
        parts = [document, *document.get("$defs", {}).values()]
        known = [name for part in parts for name in part["properties"] if name not in names]
        similar = nearest(short_name(names[-1]).lower(), known, 0.7)
    return f"This server does not support it{exception}{similar}. {advice}".rstrip()


def contradiction(field: str, other: str) -> RequestError:
    """The error of two fields of a request of which one can be followed."""
    return RequestError(f"It contradicts {other!r}; send one of them.", field)


POSTED: dict[str, type[Fields]] = {
    "/generate": GenerateRequest,
    "/v1/chat/completions": ChatRequest,
    "/v1/responses": ResponsesRequest,
    "/v1/images/generations": ImagesRequest,
    "/v1/images/edits": EditsRequest,
    "/v1/images/tokens": TokensRequest,
}


def openapi() -> JsonObject:
    """The OpenAPI document of all routes."""
    # 1. Schemas of the bodies.
    models: list[type[BaseModel]] = [*POSTED.values(), GenerateResponse]
    refs, schemas = models_json_schema(
        [(model, VALIDATION) for model in models], ref_template="#/components/schemas/{model}"
    )
    responses = {
        "200": {"description": "The answer."},
        "default": {"description": "An error: `error` is a sentence."},
    }

    # 2. Routes that are read.
    read_paths = ("/", "/health", "/ready", "/metrics", "/openapi.json", "/v1/models")
    paths: JsonObject = dict.fromkeys(read_paths, {"get": {"responses": responses}})
    model_name = {
        "name": "name",
        "in": "path",
        "required": True,
        "schema": {"type": "string", "minLength": 1},
    }
    paths["/v1/models/{name}"] = {"get": {"parameters": [model_name], "responses": responses}}

    # 3. Routes with a body. Some also answer with a stream, edits are a form with a file.
    for path, model in POSTED.items():
        body: JsonObject = {"application/json": {"schema": refs[model, VALIDATION]}}
        answer: JsonObject = {"application/json": {"schema": {"type": "object"}}}
        if path == "/generate":
            answer["application/json"]["schema"] = refs[GenerateResponse, VALIDATION]
        elif "stream" in model.model_fields:
            answer["text/event-stream"] = {}
        if model is EditsRequest:
            body = {"multipart/form-data": body["application/json"]}
        operation = {
            "requestBody": {"required": True, "content": body},
            "responses": {**responses, "200": {"description": "The answer.", "content": answer}},
        }
        paths[path] = {"post": operation}
    return {
        "openapi": "3.1.0",
        "info": {"title": "SEED Multimodal", "version": __version__},
        "paths": paths,
        "components": {"schemas": schemas["$defs"]},
    }
