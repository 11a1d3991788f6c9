"""`POST /v1/responses`: an answer as OpenAI's output items (texts and images) and their events."""

from __future__ import annotations

import itertools
import secrets
import time
from collections.abc import Iterator

from seed_multimodal.disk import JsonObject
from seed_multimodal.serving.schema import ResponsesRequest

ECHOED = {"instructions", "temperature", "top_p", "tools", "tool_choice"}
USAGE_DETAILS = {
    "input_tokens_details": {"cached_tokens": 0},
    "output_tokens_details": {"reasoning_tokens": 0},
}


def response_events(
    request: ResponsesRequest, model: str, changes: Iterator[JsonObject]
) -> Iterator[JsonObject]:
    """The events of an answer; the last one has the whole `response`.

    They share its objects, so each must be serialised before the next one is asked for.

    changes: of an OpenAI message, see `Backend.chat`.
    """
    output: list[JsonObject] = []
    response: JsonObject = {
        "id": f"resp_{secrets.token_hex(12)}",
        "object": "response",
        "created_at": int(time.time()),
        "status": "in_progress",
        "model": model,
        "output": output,
        "parallel_tool_calls": False,
        "error": None,
        "incomplete_details": None,
        "usage": None,
        "boxes": [],
        "notes": [],
        **request.model_dump(include=ECHOED),
    }
    item: JsonObject = {}  # the last output item until it is complete
    numbers = itertools.count()

    def event(name: str, **fields: object) -> JsonObject:
        return {"type": f"response.{name}", "sequence_number": next(numbers), **fields}

    def item_event(name: str, **fields: object) -> JsonObject:
        """An event of `item`."""
        return event(name, item_id=item["id"], output_index=len(output) - 1, **fields)

    def begin(prefix: str, **fields: object) -> Iterator[JsonObject]:
        nonlocal item
        yield from end()
        item = {"id": f"{prefix}_{secrets.token_hex(12)}", "status": "in_progress", **fields}
        output.append(item)
        yield item_event("output_item.added", item=item)

    def end() -> Iterator[JsonObject]:
        """The events that complete `item`, if there is one."""
        nonlocal item
        if not item:
            return
        for part in item.get("content", ()):
            text = part["text"]
            yield item_event("output_text.done", content_index=0, text=text, logprobs=[])
            yield item_event("content_part.done", content_index=0, part=part)
        broke_off = item.get("result", "") is None
        item["status"] = "failed" if broke_off else "completed"
        yield item_event("output_item.done", item=item)
        item = {}

    yield event("created", response=response)
    for change in changes:
        # 1. Text.
        if "content" in change:
            if "content" not in item:
                yield from begin("msg", type="message", role="assistant", content=[])
                part = {"type": "output_text", "text": "", "annotations": []}
                item["content"].append(part)
                yield item_event("content_part.added", content_index=0, part=part)
            delta = change["content"]
            item["content"][0]["text"] += delta
            yield item_event("output_text.delta", content_index=0, delta=delta, logprobs=[])

        # 2. Images; an item begins with the first preview.
        for image in change.get("images", ()):
            if "result" not in item:
                yield from begin("ig", type="image_generation_call", result=None)
                yield item_event("image_generation_call.generating")
                n_previews = 0
            name = "image_generation_call.partial_image"
            data = image["image_url"]["url"].partition(",")[2]
            if image["preview"]:
                yield item_event(name, partial_image_index=n_previews, partial_image_b64=data)
                n_previews += 1
                continue
            image_format = request.image_options.output_format
            item |= {"result": data, "codes": image["codes"], "output_format": image_format}
            yield item_event("image_generation_call.completed")
            yield from end()
        for name in ("boxes", "notes"):
            response[name] += change.get(name, [])

    # 3. The last change has the finish reason.
    yield from end()
    status = "completed"
    if change["finish_reason"] == "length":
        status = "incomplete"
        response["incomplete_details"] = {"reason": "max_output_tokens"}
    response |= {"status": status, "usage": {**change["usage"], **USAGE_DETAILS}}
    yield event(status, response=response)
