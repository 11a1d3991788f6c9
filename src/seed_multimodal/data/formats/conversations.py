"""Conversations in any known format -> `messages`: LLaVA's, SEED-X's, Alpaca's, chat lists.

    fields["messages"] = [{"role": "user" | "assistant", "content": [part, ...]}, ...]
    part = "text" | {"codes": [12, 7, ...]} | {"image": "a.jpg"}
           | {"codes": [[...], [...]]} (views of one image)

An answer that gives context, but is not learned, also has `"learned": False`.

| format | images | position of an image |
| --- | --- | --- |
| `conversations: [{from, value}]` (LLaVA) | `image`, or `image_ids` if tokenized | placeholders |
| `messages: [{role, content}]` | in `content`, of a turn, or as above | there or placeholders |
| `texts: [{user, assistant}]` (the_cauldron) | `images` | placeholders, else first |
| `data: [question, answer, ...]` (SEED-X) | `image` | placeholders, else first |
| a question and its answer, as Alpaca's (`PAIRS`) | as above | placeholders, else first |
| `source_image`, `target_image`, `instruction` (SEED-X) | these | input first, target last |

Placeholders have any spelling of `_MARKUP`. Each key of a turn or of a part is read, harmless, or
refused by name, and so is each field of the record that names images. Turns in another order are
repaired as by LLaVA's and FastChat's readers, and `fields[REPAIRED]` says how. Other fields stay
unchanged; a system message goes to `fields["system"]`. Records of other kinds are returned as is.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain

from seed_multimodal.config import read_table
from seed_multimodal.data.formats.contents import IMAGE_SUFFIXES
from seed_multimodal.data.formats.record import (
    BadRecord,
    FieldValue,
    JsonObject,
    RecordFields,
    as_list,
    parse_json,
    shorten,
)
from seed_multimodal.errors import pluralize
from seed_multimodal.language.prompts import merge_text

_TABLES = read_table(__file__)
ROLES: dict[str, str] = _TABLES["roles"]
ROLE_ORDER = ("user", "assistant")
NO_IMAGE = (None, "", "none", "None", "null")
OTHER_MEDIA = ("video", "videos", "audio", "audios")  # fields
TURNS = ("messages", "conversations")
PAIRS: list[list[str]] = _TABLES["pairs"]
IMAGE_VALUES: list[str] = _TABLES["image"]
# Key by which a program says whether a turn is learned → what true means.
LEARNED = {
    **dict.fromkeys(_TABLES["learned"], True),
    **dict.fromkeys(_TABLES["masked"], False),
}
_FLAGS = {
    **dict.fromkeys(("true", "yes", "1", "1.0"), True),
    **dict.fromkeys(("false", "no", "0", "0.0"), False),
}
SYSTEM = ("system", "system_prompt")  # fields
EMPTY: Sequence[FieldValue] = (None, "", [], {})
CONTENTS = ("content", "value", "text")
IMAGES = ("images", "image")
TURN_KEYS = {"role", "from", *CONTENTS, *IMAGES, *LEARNED, *_TABLES["turn"]}
PART_KEYS = {"type", "text", "codes", "index", *IMAGE_VALUES, *_TABLES["part"]}
# Fields that name no image.
OTHER_FIELDS = {*_TABLES["fields"], *chain.from_iterable(PAIRS)}
ContentPart = str | JsonObject  # a text, or `{"codes": …}`, `{"image": …}`

REPAIRED = "repaired turns"  # field: how the turns were repaired, as text
NO_QUESTION = "an answer without a question was left out"
NO_ANSWER = "a question without an answer was left out"
NOT_LEARNED = "what follows the last learned answer was left out"
JOINED = "neighbouring turns of one author were joined"

# Markup of an image: `<image>`, `<image1>`, `<|image_1|>`, `<ImageHere>`, `[IMG]`, …; a path in it
# (Qwen-VL), or the names of SEED's codes; with the marks that some models put around it.
_SUFFIX = "here|content|placeholder|token|pad|soft_token|context"
_NAME = f"(?:image|img)(?:_?(?:{_SUFFIX}))?|start_of_image"
_PAIR = r"<(?P<tag>image|img)>(?P<content>(?:<\w+>)+|[^<>\n]*)</(?P=tag)>"
_TAG = rf"<\|?(?:{_NAME})[ _:-]?(?P<number>[0-9]*)\|? ?/?>"
_BRACKETS = r"(?-i:\[(?:IMG|IMAGE)[ _-]?(?P<bracketed>[0-9]*)\])"
_BORDER = "(?:<[|]?(?:im|image|vision)_(?:start|end)[|]?>|<fake_token_around_image>)?"
_MARKUP = re.compile(f"{_BORDER}(?:{_PAIR}|{_TAG}|{_BRACKETS}){_BORDER}", re.IGNORECASE)
_OBJECT = re.compile("<bbox>|<ref-object>")  # ms-swift's
_CODE = re.compile("<img_([0-9]+)>")
_ADDRESS = re.compile(rf"\w+://\S+(?:{'|'.join(IMAGE_SUFFIXES)})(?:\?|$)", re.IGNORECASE)
_BASE64 = ("data:image/", "/9j/", "iVBORw0KGgo")  # JPEG, PNG


@dataclass(frozen=True)
class Placeholder:
    """The place of an image; `number`: which one; None: the next one."""

    text: str
    number: int | None = None


RawPart = ContentPart | Placeholder


@dataclass
class Turn:
    """A turn; `images`: of its own, for its placeholders."""

    role: str
    content: list[RawPart]
    learned: bool = True
    images: list[JsonObject] = field(default_factory=list)

    @property
    def message(self) -> JsonObject:
        """The turn as `messages` have it."""
        message: JsonObject = {"role": self.role, "content": merge_text(self.content)}
        return message if self.learned else {**message, "learned": False}


def with_messages(item: RecordFields, location: str) -> JsonObject:
    """The fields of a record, with `messages` if it is a conversation.

    Raises BadRecord: a turn lacks role or text, or has a key that is not read; no question has an
    answer; there are more or fewer placeholders than images, or other media.
    """
    # 1. The turns, with placeholders of images.
    fields = dict(item)
    _parse_json_texts(fields, location)
    turns = _find_turns(fields, location)
    if turns is None:
        return fields
    for name in OTHER_MEDIA:
        if fields.get(name):
            raise BadRecord("other media", f"{location}: has {name!r}; only images are read.")
    for name, meaning in LEARNED.items():
        value = fields.get(name)
        flag = _FLAGS.get(str(value).lower())  # tables have texts
        if isinstance(value, list) or flag is (not meaning):
            reason = "says that something is not learned; write it into the turns"
            raise BadRecord("unlearned answer", f"{location}: {name!r} {reason}.")

    if str(fields.get("label")).lower() == "false":  # tables have texts
        reason = "is false, as KTO marks an answer that is not wanted; leave it out, or rename this"
        raise BadRecord("unlearned answer", f"{location}: 'label' {reason}.")
    if fields.get("objects") and any(map(_OBJECT.search, _texts(turns))):
        reason = "has 'objects' for marks in the texts, which are not read; write them as text"
        raise BadRecord("other media", f"{location}: {reason}.")

    # 2. Their images; turns that are left out in the next step take theirs along.
    _place_images(turns, fields, location)

    # 3. The system message, then question and answer in turn.
    system, turns, repairs = _repaired(turns, location)
    systems = {"a system message": system, **{key: fields.get(key) for key in SYSTEM}}
    system_message = _one_of(systems, location)
    if not isinstance(system_message, str | None):
        raise BadRecord("wrong type", f"{location}: its system message is no text.")
    if system_message:
        fields["system"] = system_message
    if repairs:
        fields[REPAIRED] = ", ".join(repairs)
    fields["messages"] = [turn.message for turn in turns]
    return fields


def conversation(item: RecordFields, location: str) -> JsonObject:
    """As `with_messages`; raises BadRecord also for a record that is no conversation."""
    fields = with_messages(item, location)
    if "messages" not in fields:
        raise not_a_conversation(fields)
    return fields


def not_a_conversation(fields: RecordFields) -> BadRecord:
    """The error of a record without `messages`."""
    forms = [*TURNS, "texts", "data", *(" with ".join(pair) for pair in PAIRS)]
    keys = ", ".join(sorted(map(str, fields))[:8]) or "no keys"
    message = f"is not a conversation: it has none of {', '.join(forms)} (it has {keys})"
    return BadRecord("missing key", f"{message}.")


def _parse_json_texts(fields: JsonObject, location: str) -> None:
    """Parse turns that are stored as JSON text, as often in parquet tables."""
    for key in (*TURNS, "texts", "data", "history", "prompt", "completion", *IMAGES):
        value = fields.get(key)
        # Under the other keys may be a text, or a date.
        if isinstance(value, str) and (key in TURNS or re.match(r'\s*\[\s*["{[]', value)):
            fields[key] = parse_json(value, f"{location}: {key!r}")


def _find_turns(fields: RecordFields, location: str) -> list[Turn] | None:
    """The turns of a conversation in one of the formats; None: it is none."""
    for key in TURNS:
        if fields.get(key) is not None:
            return _read_turns(fields[key], key, location)
    if _is_edit(fields):
        return _edit_turns(fields, location)
    for question, answer in PAIRS:
        if fields.get(question) is not None and fields.get(answer) is not None:
            return _pair_turns(fields, question, answer, location)

    # Question and answer in turn; other data sets have fields of these names, too.
    pairs = as_list(fields.get("texts"))
    texts = fields.get("data")
    if all(isinstance(pair, Mapping) and pair.keys() >= {*ROLE_ORDER} for pair in pairs):
        texts = [pair[role] for pair in pairs for role in ROLE_ORDER]
    if "image_ids" in fields or not isinstance(texts, list) or len(texts) < 2:
        return None
    return _alternating(texts) if all(isinstance(text, str) for text in texts) else None


def _alternating(texts: Iterable[str]) -> list[Turn]:
    """Texts as question and answer in turn."""
    return [Turn(ROLE_ORDER[index % 2], split_images(text)) for index, text in enumerate(texts)]


def _pair_turns(
    fields: RecordFields, question_key: str, answer_key: str, location: str
) -> list[Turn]:
    """A question and its answer under these keys, after the rounds of `history`."""
    question = fields[question_key]
    answer = fields[answer_key]
    # TRL's lists of messages: only the completion is learned.
    if isinstance(question, list) and isinstance(answer, list):
        prompt = _read_turns(question, question_key, location)
        prompt = [replace(turn, learned=turn.role != "assistant") for turn in prompt]
        return [*prompt, *_read_turns(answer, answer_key, location)]
    rounds = [*as_list(fields.get("history") or []), [question, answer]]
    details = (question_key == "instruction" and fields.get("input")) or ""
    for texts in (*rounds, [details, details]):
        is_pair = isinstance(texts, list) and len(texts) == 2
        if not is_pair or not all(isinstance(text, str) for text in texts):
            reason = f"{shorten(texts)} is no pair of a question and an answer"
            raise BadRecord("wrong type", f"{location}: {reason}.")
    if details:
        rounds[-1] = [f"{question}\n{details}", answer]
    return _alternating(chain.from_iterable(rounds))


def _read_turns(turns: FieldValue, key: str, location: str) -> list[Turn]:
    """The turns under `key`, with role names and parts of content in our form."""
    all_objects = isinstance(turns, list) and all(isinstance(turn, Mapping) for turn in turns)
    if not all_objects or not turns:
        raise BadRecord(
            "wrong type", f"{location}: {key!r} must be a list of turns, not {shorten(turns)}."
        )
    return [
        _read_turn(turn, f"{location}: turn {number} of {key!r}")
        for number, turn in enumerate(turns, 1)
    ]


def _read_turn(turn: RecordFields, location: str) -> Turn:
    # 1. LLaVA's keys are `from` and `value`, a chat API's `role` and `content`.
    authors = {key: turn[key] for key in ("role", "from") if turn.get(key)}
    roles = {key: ROLES.get(str(author).lower(), author) for key, author in authors.items()}
    role = _one_of(roles, location)
    if role not in ROLES.values():
        reason = f"its role is {shorten(role)}, not one of {', '.join(ROLES)}"
        raise BadRecord("wrong role", f"{location}: {reason}.")
    _refuse_unread(turn, TURN_KEYS, location)
    contents = {key: turn[key] for key in CONTENTS if turn.get(key) is not None}
    content = _one_of(contents, location)
    images = _images(value for key in IMAGES for value in as_list(turn.get(key)))
    if not contents and not images:
        raise BadRecord("missing key", f"{location}: has no 'content'.")

    # 2. Texts and images. Its own images are for its placeholders, or around its text.
    parts: list[RawPart] = []
    for part in as_list(content) if content is not None else ():
        parts += _read_part(part, location)
    learned = _is_learned(turn, role, location)
    n_placeholders = sum(isinstance(part, Placeholder) for part in parts)
    if images and n_placeholders not in (0, len(images)):
        raise _mismatch(parts, images, location)
    if n_placeholders:
        return Turn(role, parts, learned, images)
    return Turn(role, [*parts, *images] if role == "assistant" else [*images, *parts], learned)


def _one_of(values: RecordFields, location: str) -> FieldValue:
    """The value that is not empty, of several keys that mean the same; None: there is none.

    Raises BadRecord: they differ.
    """
    full = {key: value for key, value in values.items() if value not in EMPTY}
    first = next(iter(full.values()), None)
    if any(value != first for value in full.values()):
        raise BadRecord("two values", f"{location}: {' and '.join(full)} differ; keep one of them.")
    return first


def _refuse_unread(item: RecordFields, known: Collection[str], location: str) -> None:
    """Raise BadRecord for a key with a value that is neither read nor harmless."""
    for key, value in item.items():
        if key not in known and value not in EMPTY:
            raise BadRecord("unread key", f"{location}: has {key!r}, which is not read.")


def _is_learned(turn: RecordFields, role: str, location: str) -> bool:
    """Whether a turn is learned if it is an answer. Raises BadRecord: it is not clear."""
    is_answer = role == "assistant"
    is_learned = True
    for key in LEARNED.keys() & turn.keys():
        value = turn[key]
        if value in (None, ""):
            continue
        flag = _FLAGS.get(str(value).lower())
        says_learned = flag is LEARNED[key]
        # A mask of 1 is what is learned for some programs, and what is not for others.
        is_unclear = flag is None or (key == "mask" and not isinstance(value, bool))
        if is_unclear or (flag and says_learned and not is_answer):
            reason = "write train: true or false; only answers can be learned"
            raise BadRecord("unclear loss", f"{location}: {key!r} is {shorten(value)}; {reason}.")
        is_learned &= says_learned
    return is_learned or not is_answer


def _read_part(part: object, location: str) -> list[RawPart]:
    """A part of a turn, converted from a chat API's form (`{"type": "text", "text": …}`)."""
    if isinstance(part, str):
        return split_images(part)
    parts: list[RawPart] = []
    if isinstance(part, Mapping):
        _refuse_unread(part, PART_KEYS, location)
        if part.get("codes") is not None:
            return [{"codes": as_list(part["codes"])}]
        kind = str(part.get("type") or "")
        text = str(part.get("text") or "")
        # The image itself, or its place.
        if not kind or "image" in kind or "text" in kind:
            parts += _images([part])
        if "image" in kind and not parts:
            index = part.get("index")
            parts.append(Placeholder(shorten(part), index if isinstance(index, int) else None))
        if text or "text" in kind:
            parts += split_images(text)
    if not parts:
        reason = f"a part has neither text, 'codes' nor 'image': {shorten(part)}"
        raise BadRecord("missing key", f"{location}: {reason}.")
    return parts


def _images(values: Iterable[FieldValue]) -> list[JsonObject]:
    """The images among some values: paths, contents, or objects of chat APIs and tables."""
    images: list[JsonObject] = []
    for value in values:
        if isinstance(value, Mapping):
            images += _images(value.get(key) for key in IMAGE_VALUES)[:1]
        elif value not in NO_IMAGE:
            images.append({"image": value})
    return images


def split_images(text: str) -> list[RawPart]:
    """A text as texts with an image or a placeholder between them."""
    parts: list[RawPart] = []
    start = 0
    for match in _MARKUP.finditer(text):
        parts.append(text[start : match.start()])
        start = match.end()
        number = match["number"] or match["bracketed"]
        content = match["content"] or ""
        codes = _CODE.findall(content)
        if codes:
            parts.append({"codes": [int(code) for code in codes]})
        elif content.strip("./ ") and "<" not in content:  # `./`: MiniCPM's
            parts.append({"image": content.strip()})
        else:
            parts.append(Placeholder(match[0], int(number) if number else None))
    return [*parts, text[start:]]


def _is_edit(fields: RecordFields) -> bool:
    """Whether it is an edit whose images are not tokenized; tables have empty columns."""
    if not {"source_image", "target_image"} <= fields.keys():
        return False
    return fields.get("source_image_ids") is None and fields.get("target_image_ids") is None


def _edit_turns(fields: RecordFields, location: str) -> list[Turn]:
    """An edit as a question with the source image, and an answer with the target image."""
    # Rewritten texts replace the instruction only together.
    instruction = fields.get("instruction")
    response = ""
    if fields.get("instruction_new") is not None and fields.get("response") is not None:
        instruction = fields["instruction_new"]
        response = fields["response"]
    if not isinstance(instruction, str):
        raise BadRecord(
            "missing key", f"{location}: 'instruction' must be a text, not {shorten(instruction)}."
        )
    question: list[RawPart] = [{"image": fields["source_image"]}]
    first_text, *others = split_images(instruction)
    # A placeholder is the source's.
    question = [first_text, *question, *others[1:]] if others else [*question, first_text]
    answer: list[RawPart] = [response, {"image": fields["target_image"]}]
    return [Turn("user", question), Turn("assistant", answer)]


def _place_images(turns: Sequence[Turn], fields: RecordFields, location: str) -> None:
    """Put the images of other fields, and of turns with placeholders, into the contents."""
    # 1. Where images are in the turns, a field `image` only names their source.
    parts = list(chain.from_iterable(turn.content for turn in turns))
    placeholders = [part for part in parts if isinstance(part, Placeholder)]
    numbers = [part.number for part in placeholders]
    written = {number for number in numbers if number is not None}
    if not placeholders and any(isinstance(part, Mapping) for part in parts):
        return
    images = list(chain.from_iterable(turn.images for turn in turns))
    if not images:
        images = _field_images(fields, len(written) or len(placeholders), location)
    if not placeholders and fields.keys().isdisjoint(TURNS):
        first = next((turn for turn in turns if turn.role == "user"), turns[0])
        first.content[:0] = images
        return

    # 2. Placeholders take the next image, or that of their number, from 0 or 1 on.
    indices = [*range(len(numbers))]
    if written and None not in numbers:
        start = min(1, *written)
        indices = [number - start for number in numbers if number is not None]
    if {*indices} != {*range(len(images))} or (written and None in numbers):
        raise _mismatch(parts, images, location)
    remaining = iter(indices)
    for turn in turns:
        for index, part in enumerate(turn.content):
            if isinstance(part, Placeholder):
                turn.content[index] = images[next(remaining)]


def _mismatch(parts: Sequence[RawPart], images: Sequence[JsonObject], location: str) -> BadRecord:
    """The error of contents with another number of placeholders than of images."""
    placeholders = [part.text for part in parts if isinstance(part, Placeholder)]
    return BadRecord(
        "images and placeholders",
        f"{location}: {pluralize(len(placeholders), 'image placeholder')} for "
        f"{pluralize(len(images), 'image')}: {shorten(placeholders)}, {shorten(images)}.",
    )


def _field_images(fields: RecordFields, n_images: int, location: str) -> list[JsonObject]:
    """The images outside the turns; `n_images`: by the placeholders, to divide joined codes."""
    codes = fields.get("image_ids")
    if codes is not None:
        codes = as_list(codes)
        if codes and not isinstance(codes[0], list):
            # One flat list, of equal numbers of codes for each image.
            size = -(-len(codes) // max(1, n_images))
            codes = [codes[start : start + size] for start in range(0, len(codes), size)]
        return [{"codes": image_codes} for image_codes in codes]

    # Paths or contents, in columns of any name; others may name the same files.
    columns: dict[str, list[JsonObject]] = {}
    for name, value in fields.items():
        values = _images(as_list(value)) if name not in OTHER_FIELDS else []
        if values and (name in IMAGES or None not in map(_file_name, values)):
            columns[name] = values
    name = next((name for name in (*IMAGES, *columns) if name in columns), "")
    images = columns.pop(name, [])
    files = {_file_name(image) for image in images}
    for name, values in columns.items():
        # Of contents no name is known.
        if not files & {"", None} and not files >= {*map(_file_name, values)}:
            reason = "names an image that no turn has; write all of them into 'images'"
            raise BadRecord("unread image", f"{location}: {name!r} {reason}.")

    # An address alone; else it is where the image is from.
    for name, value in {} if images else fields.items():
        if name not in OTHER_FIELDS and isinstance(value, str) and _ADDRESS.match(value):
            reason = "is the address of an image; download it, and write its file into 'images'"
            raise BadRecord("unread image", f"{location}: {name!r} {reason}.")
    return images


def _file_name(image: JsonObject) -> str | None:
    """The name of an image's file; "": it is the content, None: neither."""
    value = image["image"]
    if isinstance(value, bytes) or str(value).startswith(_BASE64):
        return ""
    is_path = isinstance(value, str) and value.lower().endswith(IMAGE_SUFFIXES)
    return re.split(r"[\\/]", value)[-1] if is_path and "://" not in value else None


def _texts(turns: Iterable[Turn]) -> list[str]:
    return [part for turn in turns for part in turn.content if isinstance(part, str)]


def _repaired(turns: Sequence[Turn], location: str) -> tuple[str, list[Turn], list[str]]:
    """The system message, questions and answers in turn, and what was repaired.

    Raises BadRecord: an empty turn, a later system message, or no question with a learned answer.
    """
    system: list[str] = []
    dialogue: list[Turn] = []
    repairs: list[str] = []
    for number, turn in enumerate(turns, 1):
        turn_location = f"{location}: turn {number} (the {turn.role}'s)"
        texts = _texts([turn])
        is_text = len(texts) == len(turn.content)
        if turn.role == "system":
            if not is_text or dialogue or repairs:
                reason = "a system message is text, before all other turns"
                raise BadRecord("wrong role", f"{turn_location}: {reason}.")
            system += texts
        elif is_text and not "".join(texts).strip():
            raise BadRecord("empty text", f"{turn_location} is empty.")
        elif dialogue and dialogue[-1].role == turn.role:
            if turn.learned is not dialogue[-1].learned:
                reason = "continues an answer of which another part is learned"
                raise BadRecord("unclear loss", f"{turn_location} {reason}.")
            dialogue[-1].content.extend(["\n", *turn.content])
            repairs.append(JOINED)
        elif turn.role == "user" or dialogue:
            dialogue.append(turn)
        else:
            repairs.append(NO_QUESTION)
    while dialogue and (dialogue[-1].role == "user" or not dialogue[-1].learned):
        is_question = dialogue.pop().role == "user" and NOT_LEARNED not in repairs
        repairs.append(NO_ANSWER if is_question else NOT_LEARNED)
    if not dialogue:
        is_masked = NOT_LEARNED in repairs
        reason = "no answer is learned" if is_masked else "no question has an answer"
        raise BadRecord("unlearned answer" if is_masked else "no answer", f"{location}: {reason}.")
    return "\n".join(system), dialogue, [*dict.fromkeys(repairs)]
