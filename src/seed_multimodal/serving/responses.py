"""`POST /v1/responses`: an answer as OpenAI's output items (texts and images) and their events."""

from __future__ import annotations

import itertools
import secrets
import time
from collections.abc import Iterator

from seed_multimodal.disk import JsonObject
from seed_multimodal.serving.schema import ResponsesRequest

ECHOED = {"instructions", "temperature", "top_p", "tools", "tool_choice"}


class ResponseEvents:
    """The events of one answer, and the `response` so far, which the last event has whole.

    Events share their objects: each must be serialised before the next one is asked for.
    """

    def __init__(self, request: ResponsesRequest, model: str) -> None:
        self.response: JsonObject = {
            "id": new_id("resp"),
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
            **request.model_dump(include=ECHOED),
        }
        self.output_format = request.image_options.output_format
        self.item: JsonObject = {}  # the output item that is not complete; {}: none
        self.n_previews = 0  # of it
        self._numbers = itertools.count()

    def events(self, changes: Iterator[JsonObject]) -> Iterator[JsonObject]:
        """changes: of an OpenAI message, see `Backend.chat`."""
        yield self._event("created", response=self.response)
        for change in changes:
            if "content" in change:
                yield from self._text(change["content"])
            for image in change.get("images", ()):
                yield from self._image(image)
            for name in ("boxes", "notes"):
                self.response[name] += change.get(name, [])

        # The last change has the finish reason.
        yield from self._end_item()
        status = "completed"
        if change["finish_reason"] == "length":
            status = "incomplete"
            self.response["incomplete_details"] = {"reason": "max_output_tokens"}
        details = {
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens_details": {"reasoning_tokens": 0},
        }
        self.response |= {"status": status, "usage": {**change["usage"], **details}}
        yield self._event(status, response=self.response)

    def _event(self, name: str, **fields: object) -> JsonObject:
        number = next(self._numbers)
        return {"type": f"response.{name}", "sequence_number": number, **fields}

    def _item_event(self, name: str, **fields: object) -> JsonObject:
        """An event of the item that is not complete."""
        index = len(self.response["output"]) - 1
        return self._event(name, item_id=self.item["id"], output_index=index, **fields)

    def _begin_item(self, **fields: object) -> JsonObject:
        self.item = {"status": "in_progress", **fields}
        self.response["output"].append(self.item)
        return self._item_event("output_item.added", item=self.item)

    def _text(self, text: str) -> Iterator[JsonObject]:
        if not self.item:
            yield self._begin_item(id=new_id("msg"), type="message", role="assistant", content=[])
            part = {"type": "output_text", "text": "", "annotations": []}
            self.item["content"].append(part)
            yield self._item_event("content_part.added", content_index=0, part=part)
        self.item["content"][0]["text"] += text
        yield self._item_event("output_text.delta", content_index=0, delta=text, logprobs=[])

    def _image(self, image: JsonObject) -> Iterator[JsonObject]:
        """image: a part of a message, complete or a preview."""
        # 1. The item begins with the first preview.
        if self.item.get("type") != "image_generation_call":
            yield from self._end_item()
            yield self._begin_item(id=new_id("ig"), type="image_generation_call", result=None)
            yield self._item_event("image_generation_call.generating")
            self.n_previews = 0

        # 2. A preview, or the image.
        data = image["image_url"]["url"].partition(",")[2]
        if image["preview"]:
            yield self._item_event(
                "image_generation_call.partial_image",
                partial_image_index=self.n_previews,
                partial_image_b64=data,
            )
            self.n_previews += 1
            return
        codes = image["codes"]
        self.item |= {"result": data, "codes": codes, "output_format": self.output_format}
        yield self._item_event("image_generation_call.completed")
        yield from self._end_item()

    def _end_item(self) -> Iterator[JsonObject]:
        """The events that complete the present item, if there is one."""
        if not self.item:
            return
        self.item["status"] = "completed"
        if self.item["type"] == "message":
            (part,) = self.item["content"]
            text = part["text"]
            yield self._item_event("output_text.done", content_index=0, text=text, logprobs=[])
            yield self._item_event("content_part.done", content_index=0, part=part)
        elif self.item["result"] is None:  # the image broke off
            self.item["status"] = "failed"
        yield self._item_event("output_item.done", item=self.item)
        self.item = {}


def new_id(kind: str) -> str:
    return f"{kind}_{secrets.token_hex(12)}"
