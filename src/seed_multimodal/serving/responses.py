"""Answers in OpenAI's forms, built of the changes of a message (`Backend.chat`)."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from typing import Any

from pydantic import TypeAdapter

from seed_multimodal.disk import JsonObject
from seed_multimodal.serving.schema import ResponsesRequest

NamedFields = tuple[str, JsonObject]  # of an event
PLAIN: TypeAdapter[Any] = TypeAdapter(Any)  # models of a request → what JSON has
ECHOED = ("instructions", "temperature", "top_p", "tools", "tool_choice")
USAGE_DETAILS = {
    "input_tokens_details": {"cached_tokens": 0},
    "output_tokens_details": {"reasoning_tokens": 0},
}


def completion(model: str, stream: bool, changes: Iterator[JsonObject]) -> Iterator[JsonObject]:
    """`POST /v1/chat/completions`: an answer as chunks, or as one object."""
    # All chunks have the same head.
    head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}
    message: JsonObject = {"role": "assistant", "content": "", "images": [], "boxes": []}
    message["notes"] = []
    role = {"role": "assistant"}  # in the first chunk
    for change in changes:
        # Only the last change has these two.
        finish_reason = change.pop("finish_reason", None)
        usage = change.pop("usage", None)
        for name, value in change.items():
            message[name] += value
        if stream:
            choice = {"index": 0, "delta": {**role, **change}, "finish_reason": finish_reason}
            chunk = {**head, "object": "chat.completion.chunk", "choices": [choice]}
            if usage:
                chunk["usage"] = usage
            yield chunk
        role = {}
    if not stream:
        choice = {"index": 0, "message": message, "finish_reason": finish_reason}
        yield {**head, "object": "chat.completion", "usage": usage, "choices": [choice]}


class ResponseEvents:
    """`POST /v1/responses`: an answer as output items (texts and images) and their events.

    Events share its objects, so each must be serialised before the next one is asked for.
    """

    def __init__(self, request: ResponsesRequest, model: str) -> None:
        self.output: list[JsonObject] = []
        self.response: JsonObject = {
            "id": f"resp_{secrets.token_hex(12)}",
            "object": "response",
            "created_at": int(time.time()),
            "status": "in_progress",
            "model": model,
            "output": self.output,
            "parallel_tool_calls": False,
            "error": None,
            "incomplete_details": None,
            "usage": None,
            "boxes": [],
            "notes": [],
            **{name: PLAIN.dump_python(getattr(request, name), mode="json") for name in ECHOED},
        }
        self._image_format = request.image_options.output_format
        self._item: JsonObject = {}  # the last output item until it is complete
        self._n_previews = 0  # of that item

    def of_changes(self, changes: Iterator[JsonObject]) -> Iterator[JsonObject]:
        """All events; the last one has the whole `response`."""
        for index, (name, fields) in enumerate(self._events(changes)):
            yield {"type": f"response.{name}", "sequence_number": index, **fields}

    def _events(self, changes: Iterator[JsonObject]) -> Iterator[NamedFields]:
        # 1. Texts and images.
        yield "created", {"response": self.response}
        for change in changes:
            if "content" in change:
                yield from self._add_text(change["content"])
            for image in change.get("images", ()):
                yield from self._add_image(image)
            for name in ("boxes", "notes"):
                self.response[name] += change.get(name, [])
        yield from self._end_item()

        # 2. The last change has the finish reason.
        status = "completed"
        if change["finish_reason"] == "length":
            status = "incomplete"
            self.response["incomplete_details"] = {"reason": "max_output_tokens"}
        self.response |= {"status": status, "usage": {**change["usage"], **USAGE_DETAILS}}
        yield status, {"response": self.response}

    def _add_text(self, delta: str) -> Iterator[NamedFields]:
        if "content" not in self._item:
            yield from self._begin_item("msg", type="message", role="assistant", content=[])
            part = {"type": "output_text", "text": "", "annotations": []}
            self._item["content"].append(part)
            yield self._of_item("content_part.added", content_index=0, part=part)
        self._item["content"][0]["text"] += delta
        yield self._of_item("output_text.delta", content_index=0, delta=delta, logprobs=[])

    def _add_image(self, image: JsonObject) -> Iterator[NamedFields]:
        """The events of a preview or of the image; the item begins with the first of them."""
        if "result" not in self._item:
            yield from self._begin_item("ig", type="image_generation_call", result=None)
            yield self._of_item("image_generation_call.generating")
            self._n_previews = 0
        data = image["image_url"]["url"].partition(",")[2]
        if image["preview"]:
            preview = {"partial_image_index": self._n_previews, "partial_image_b64": data}
            yield self._of_item("image_generation_call.partial_image", **preview)
            self._n_previews += 1
            return
        self._item |= {"result": data, "codes": image["codes"], "output_format": self._image_format}
        yield self._of_item("image_generation_call.completed")
        yield from self._end_item()

    # ---- output items

    def _begin_item(self, prefix: str, **fields: object) -> Iterator[NamedFields]:
        yield from self._end_item()
        self._item = {"id": f"{prefix}_{secrets.token_hex(12)}", "status": "in_progress", **fields}
        self.output.append(self._item)
        yield self._of_item("output_item.added", item=self._item)

    def _end_item(self) -> Iterator[NamedFields]:
        """The events that complete the item, if there is one."""
        item = self._item
        if not item:
            return
        for part in item.get("content", ()):
            text = part["text"]
            yield self._of_item("output_text.done", content_index=0, text=text, logprobs=[])
            yield self._of_item("content_part.done", content_index=0, part=part)
        broke_off = item.get("result", "") is None
        item["status"] = "failed" if broke_off else "completed"
        yield self._of_item("output_item.done", item=item)
        self._item = {}

    def _of_item(self, name: str, **fields: object) -> NamedFields:
        return name, {
            "item_id": self._item["id"],
            "output_index": len(self.output) - 1,
            **fields,
        }
