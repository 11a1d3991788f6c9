"""Answers in OpenAI's forms, built of the changes of a message (`Backend.chat`)."""

from __future__ import annotations

import itertools
import secrets
import time
from collections.abc import Iterator
from operator import itemgetter

from seed_multimodal.disk import JsonObject
from seed_multimodal.serving.schema import JSON, ChatRequest, ResponsesRequest

NamedFields = tuple[str, JsonObject]  # of an event
ECHOED = ("instructions", "temperature", "top_p", "tools", "tool_choice")
TEXTS = {"reasoning_content": "reasoning", "content": "message"}  # fields of changes → items
PREFIXES = {"reasoning": "rs", "message": "msg", "image_generation_call": "ig"}  # of their ids


def completion(
    request: ChatRequest, model: str, changes: Iterator[JsonObject]
) -> Iterator[JsonObject]:
    """`POST /v1/chat/completions`: an answer as chunks, or as one object."""
    # All chunks have the same head.
    head: JsonObject = {
        "id": f"chatcmpl-{secrets.token_hex(12)}",
        "object": "chat.completion.chunk" if request.stream else "chat.completion",
        "created": int(time.time()),
        "model": model,
    }
    has_usage = not request.stream or request.stream_options.get("include_usage")
    if has_usage:
        head["usage"] = None  # but of the last chunk
    role = {"role": "assistant"}  # in the first chunk
    message: JsonObject = {**role, "content": "", "images": [], "boxes": [], "notes": []}
    for change in changes:
        # Only the last change has these two.
        finish_reason = change.pop("finish_reason", None)
        usage = change.pop("usage", None)
        for name, value in change.items():
            message[name] = message[name] + value if name in message else value
        if request.stream:
            choice = {"index": 0, "delta": {**role, **change}, "finish_reason": finish_reason}
            yield {**head, "choices": [choice]}
        role = {}
    if has_usage:
        choice = {"index": 0, "message": message, "finish_reason": finish_reason}
        yield {**head, "usage": usage, "choices": [] if request.stream else [choice]}


def response_events(
    request: ResponsesRequest, model: str, changes: Iterator[JsonObject]
) -> Iterator[JsonObject]:
    """`POST /v1/responses`: the events of an answer; the last one has the whole `response`.

    Events share its objects, so each must be serialised before the next one is asked for.
    """
    response: JsonObject = {
        "id": f"resp_{secrets.token_hex(12)}",
        "object": "response",
        "created_at": int(time.time()),
        "status": "in_progress",
        "model": model,
        "output": [],
        "parallel_tool_calls": False,
        "error": None,
        "incomplete_details": None,
        "usage": None,
        "boxes": [],
        "notes": [],
        **{name: JSON.dump_python(getattr(request, name), mode="json") for name in ECHOED},
    }
    for index, (name, fields) in enumerate(_events(response, changes)):
        yield {"type": f"response.{name}", "sequence_number": index, **fields}


def _events(response: JsonObject, changes: Iterator[JsonObject]) -> Iterator[NamedFields]:
    """Names of events with their fields; fills the response."""
    yield "created", {"response": response}

    # 1. Each item of the output is made of pieces that follow each other: of a text or of the
    #    reasoning before it, or of an image (its previews and itself), which have its index.
    output: list[JsonObject] = response["output"]
    for index, pieces in itertools.groupby(_pieces(response, changes), itemgetter("index")):
        kind = TEXTS.get(index, "image_generation_call")
        item_id = f"{PREFIXES[kind]}_{secrets.token_hex(12)}"
        item: JsonObject = {"id": item_id, "type": kind, "status": "in_progress"}
        of_item = {"item_id": item_id, "output_index": len(output)}
        output.append(item)
        events_of = _text if index in TEXTS else _image
        for name, fields in events_of(item, pieces):
            yield name, {**of_item, **fields}
        broke_off = item.get("result", "") is None
        item["status"] = "failed" if broke_off else "completed"
        yield "output_item.done", {**of_item, "item": item}

    # 2. The end.
    response["status"] = "incomplete" if response["incomplete_details"] else "completed"
    yield response["status"], {"response": response}


def _pieces(response: JsonObject, changes: Iterator[JsonObject]) -> Iterator[JsonObject]:
    """The texts and images of changes; what is no piece of the output is added to the response."""
    for change in changes:
        for name in TEXTS.keys() & change.keys():
            yield {"index": name, "text": change[name]}
        yield from change.get("images", ())
        for name in ("boxes", "notes"):
            response[name] += change.get(name, [])
        # The last change has these two.
        if "usage" in change:
            response["usage"] = {**change["usage"], "input_tokens_details": {"cached_tokens": 0}}
        if change.get("finish_reason") == "length":
            response["incomplete_details"] = {"reason": "max_output_tokens"}


def _text(item: JsonObject, pieces: Iterator[JsonObject]) -> Iterator[NamedFields]:
    item["content"] = []
    if item["type"] == "message":
        item["role"] = "assistant"
        part: JsonObject = {"type": "output_text", "text": "", "annotations": []}
    else:
        item["summary"] = []
        part = {"type": "reasoning_text", "text": ""}
    yield "output_item.added", {"item": item}
    item["content"].append(part)
    of_part = {"content_index": 0, "part": part}
    yield "content_part.added", of_part
    for piece in pieces:
        part["text"] += piece["text"]
        delta = {"content_index": 0, "delta": piece["text"], "logprobs": []}
        yield f"{part['type']}.delta", delta
    yield f"{part['type']}.done", {"content_index": 0, "text": part["text"], "logprobs": []}
    yield "content_part.done", of_part


def _image(item: JsonObject, pieces: Iterator[JsonObject]) -> Iterator[NamedFields]:
    item["result"] = None
    yield "output_item.added", {"item": item}
    yield "image_generation_call.generating", {}
    for count, piece in enumerate(pieces):
        head, _, data = piece["image_url"]["url"].partition(";base64,")
        if piece["preview"]:
            preview = {"partial_image_index": count, "partial_image_b64": data}
            yield "image_generation_call.partial_image", preview
        else:
            item |= {"result": data, "codes": piece["codes"]}
            if "revised_prompt" in piece:
                item["revised_prompt"] = piece["revised_prompt"]
            item["output_format"] = head.removeprefix("data:image/")
            yield "image_generation_call.completed", {}
