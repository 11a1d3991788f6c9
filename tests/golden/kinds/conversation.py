"""Kind `conversation`: the chat demo's templates and turn handling, step by step.

Checked: `templates.json` (every prompt), `helpers.json` (sizes, error suffix) and all `flows_*.json`: view, stored
messages, pending message, posted bodies (images as pixels), the model's input ids, the final prompt and the log record.
Not covered: request headers and addresses; image files' md5 names (they depend on the PNG encoder: compared by order);
the state of the original's buttons, of which the page has other ones; the server's answers and settings (kind
`flask_api`); and what the original does after it crashed on a typed `<image>`: here that text is refused when it is
added, and the flow ends there.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import pytest
from PIL import Image
from runner import assert_close, assert_same, files_named, golden_tokenizer_folder, read_json

from seed_multimodal.errors import RequestError
from seed_multimodal.images.io import (
    chat_image,
    crop_to_aspect,
    fit_longer_side,
    image_from_base64,
    image_to_base64,
    request_image,
)
from seed_multimodal.language.tokenizer import MultimodalTokenizer
from seed_multimodal.language.vocabulary import BOI, PLACEHOLDER
from seed_multimodal.serving.dialogue import Conversation, Dialogue, new_conversation

ERROR_RULE = "\n-------------\nSome errors occurred during response, please clear history and restart.\n"
SEPARATOR = "\n"
TEMPLATES = {"flows_8b.json": "conv_seed_vicuna", "flows_14b.json": "conv_seed_llama2"}


def check(folder: Path) -> None:
    for name, check_cases in (("templates.json", check_templates), ("helpers.json", check_helpers)):
        if (folder / name).is_file():
            check_cases(read_json(folder / name))
    tokenizer = MultimodalTokenizer.from_pretrained(golden_tokenizer_folder(folder))
    for file in files_named(folder, "flows_*.json"):
        for flow in read_json(file):
            Replay(flow, TEMPLATES[file.name], f"{file.stem} / {flow['name']}").run(tokenizer)


def check_templates(cases: list[dict[str, Any]]) -> None:
    assert cases
    for case in cases:
        conversation = new_conversation(case["template"])
        if case["template"].endswith("_system"):
            assert_same(conversation.system, case["system"], f"{case['template']}: system text")
        assert_same((list(conversation.roles), SEPARATOR), (case["roles"], case["sep"]), case["template"])
        conversation.system = case["system"]
        for turn in case["turns"]:
            conversation.append(turn["role"], turn["message"])
        prompt = conversation.get_prompt({}.__getitem__)  # the templates' images are all codes
        assert_same(prompt, case["prompt"], f"prompt of {case['template']}")


def check_helpers(cases: dict[str, Any]) -> None:
    for size, expected in cases["resize_image"]:
        assert_same(list(fit_longer_side(plain_image(size)).size), expected, f"resize_image {size}")
    for size, ratio, expected in cases["center_crop_image"]:
        assert_same(list(crop_to_aspect(plain_image(size), ratio).size), expected, f"center_crop_image {size}")
    for pairs, errors, expected in cases["update_error_msg"]:
        assert_same(with_errors(pairs, errors), expected, f"update_error_msg {errors}")


def plain_image(size: list[int], colour: Sequence[int] = (0, 0, 0)) -> Image.Image:
    return Image.new("RGB", (size[0], size[1]), tuple(colour))


class Replay:
    """One recorded flow, done again with our dialogue, images kept in memory under numbered names."""

    def __init__(self, flow: dict[str, Any], template: str, name: str) -> None:
        self.flow, self.name = flow, name
        self.dialogue = Dialogue(template, max_turns=flow["max_turns"])
        self.images: dict[str, Image.Image] = {}
        self.posted = 0

    def run(self, tokenizer: MultimodalTokenizer) -> None:
        for number, step in enumerate(self.flow["steps"]):
            where = f"{self.name}, step {number} ({step['step']})"
            if step["error"] is not None:
                with pytest.raises(RequestError):
                    self.do(step, tokenizer)
                return
            self.do(step, tokenizer)
            conversation = self.dialogue.conversation
            actual = {"chatbot": with_errors(pairs(conversation), self.dialogue.errors),
                      "messages": conversation.messages, "next_input_state": self.dialogue.pending}
            assert_same(_numbered(actual), _numbered({key: step[key] for key in actual}), where)
        assert_same(self.posted, len(self.flow["http"]), f"{self.name}: number of requests")
        made, name = self.dialogue.conversation, self.name
        assert_same(made.get_prompt(self._encode), self.flow["prompt_at_end"], f"{name}: prompt at the end")
        assert_same(_numbered(log_record(made)), _numbered(self.flow["dict_at_end"]), f"{name}: log record")

    def do(self, step: dict[str, Any], tokenizer: MultimodalTokenizer) -> None:
        kind, argument = step["step"], step["argument"]
        if kind == "text":
            self.dialogue.add_text(argument)
        elif kind == "image":
            if argument is not None:
                self.dialogue.add_image(self._store(chat_image(plain_image(*argument))))
        elif kind in ("regenerate", "clear"):
            getattr(self.dialogue, kind)()
        elif self.dialogue.waits():
            assert kind == "bot", f"{self.name}: unknown step {kind!r}"
            self.dialogue.refuse() if self.dialogue.too_long() else self._bot(tokenizer)

    def _bot(self, tokenizer: MultimodalTokenizer) -> None:
        assert self.posted < len(self.flow["http"]), f"{self.name}: a request the original did not send"
        recorded = self.flow["http"][self.posted]
        settings = {key: value for key, value in recorded["payload"].items() if key not in ("text", "images")}
        assert_same(settings["force_boi"], self.flow["force_image_gen"], f"{self.name}: force_boi")
        body = self.dialogue.request(self._encode, **settings)
        check_body(body, recorded["payload"], self.name)
        self.check_prompt(recorded, tokenizer)
        self.posted += 1
        self.dialogue.receive(recorded["response"], lambda text: self._store(image_from_base64(text)))

    def check_prompt(self, recorded: dict[str, Any], tokenizer: MultimodalTokenizer) -> None:
        """The ids of the text that is sent, with the codes that the server returned for its images."""
        payload = recorded["payload"]
        spans = payload["text"].split(PLACEHOLDER)
        codes = recorded["response"]["images_ids"][:len(payload["images"])]
        text = spans[0] + "".join("".join(tokenizer.tokens(tokenizer.vocabulary.image_ids(row))) + span
                                  for row, span in zip(codes, spans[1:], strict=True))
        assert_same([tokenizer.encode(text + (BOI if payload["force_boi"] else ""), add_bos=True)],
                    self.flow["model_calls"][self.posted]["input_ids"], f"{self.name}: the model's input ids")

    def _store(self, image: Image.Image) -> str:
        """Keep an image; equal images get the same name, as with the original's md5 names."""
        for path, known in self.images.items():
            if known.size == image.size and known.tobytes() == image.tobytes():
                return path
        path = f"log/images/{len(self.images):032x}.png"
        self.images[path] = image
        return path

    def _encode(self, path: str) -> str:
        return image_to_base64(request_image(self.images[path]))


def check_body(body: dict[str, Any], payload: dict[str, Any], name: str) -> None:
    """Same keys and values; images by their pixels (within one level: resizing is a matter of library versions)."""
    assert_same({**body, "images": len(body["images"])}, {**payload, "images": len(payload["images"])}, name)
    for mine, theirs in zip(body["images"], payload["images"], strict=True):
        if isinstance(theirs, str):
            sent, recorded = (np.array(image_from_base64(text)) for text in (mine, theirs))
            assert_close(sent, recorded, 1, what=f"{name}: the posted image")
        else:
            assert_same(mine, theirs, f"{name}: codes in the request")


def pairs(conversation: Conversation) -> list[list[str | None]]:
    """Pairs of [user's text, assistant's text or None] as the original page shows them, images as Markdown."""
    shown: list[list[str | None]] = []
    for number, entry in enumerate(conversation.messages):
        text, *rest = entry["message"]["text"].split(PLACEHOLDER)
        for path, piece in zip(entry["message"]["images"], rest, strict=True):
            text += (f"![](file={path})" if path else "<corrupt_image>") + piece
        if number % 2 == 0:
            shown.append([text, None])
        else:
            shown[-1][1] = text
    return shown


def with_errors(pairs: list[list[str | None]], errors: Sequence[str]) -> list[list[str | None]]:
    """What the released page shows: error messages under the last answer (unchanged without errors)."""
    shown = copy.deepcopy(pairs)
    if errors and shown:
        shown[-1][1] = (shown[-1][1] or "") + ERROR_RULE + "\n".join(errors)
    return shown


def log_record(conversation: Conversation) -> dict[str, Any]:
    """The conversation as the released server logs it: images by file name only."""
    messages = copy.deepcopy(conversation.messages)
    for entry in messages:
        entry["message"]["images"] = [PurePath(path).name for path in entry["message"]["images"]]
    return {"system": conversation.system, "roles": list(conversation.roles), "messages": messages,
            "offset": 0, "sep": SEPARATOR, "sep2": None}


def _numbered(value: Any) -> Any:
    """The value with the names of image files replaced by numbers in order of appearance."""
    seen: dict[str, str] = {}
    text = re.sub(r"[0-9a-f]{32}\.png", lambda m: seen.setdefault(m[0], f"image{len(seen)}"),
                  json.dumps(value, sort_keys=True))
    return json.loads(text)


KINDS = {"conversation": check}
