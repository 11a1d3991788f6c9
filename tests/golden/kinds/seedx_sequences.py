"""Kind `seedx_sequences`: ids, labels, masks and places of views of SEED-X's training sequences, draws replayed.

Decoders run with `validate: false`, the released behaviour to the letter; with validation they give the same or leave
the sample out. Left out: edits without several resolutions, where the original always fails; pixels of the views (kind
`seedx_anyres`); the wording of requests and responses that no kept recording shows (taken from the recording).
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runner import assert_close, assert_same, read_json, read_json_lines
from seedx_common import seedx_tokenizer

from seed_multimodal.data.decoders import phrases
from seed_multimodal.data.decoders.pictured import PictureDecoder, PictureSequence, batch_rows
from seed_multimodal.data.decoders.registry import get_decoder
from seed_multimodal.data.decoders.seed_x import dissimilar
from seed_multimodal.data.formats.record import BadRecord
from seed_multimodal.errors import DataError
from seed_multimodal.language.tokenizer import MultimodalTokenizer

KIND = "seedx_sequences"
ROW = ("input_ids", "attention_mask", "labels")
GRIDS = {1: [], 2: ["1x1"], 3: ["2x1"], 4: ["3x1"], 5: ["2x2"]}  # by the number of views


@dataclass
class Opened:
    """Stands for an opened picture."""

    size: tuple[int, int]


class Replay:
    """The recorded draws, one after the other."""

    def __init__(self, calls: Sequence[Any], name: str) -> None:
        self.calls, self.name = list(calls), name

    def _next(self, kind: str, arguments: list[Any]) -> Any:
        assert self.calls, f"{self.name}: drew {kind}{arguments} after the last recorded draw"
        made, given, result = self.calls.pop(0)
        assert_same((kind, arguments), (made, given), f"{self.name}: draw")
        return result

    def uniform(self) -> float:
        return self._next("numpy.uniform", [0, 1])

    def choice(self, items: Sequence[Any]) -> Any:
        result = self._next("random.choice", [])
        assert result or items[-1] == result, f"{self.name}: the last response is empty"
        return result

    def randint(self, low: int, high: int) -> int:
        return self._next("random.randint", [low, high])


def check(folder: Path) -> None:
    constants, cases = read_json(folder / "constants.json"), read_json_lines(folder / "cases.jsonl")
    lists = (phrases.SEEDX_DRAW_REQUESTS, phrases.SEEDX_DRAW_RESPONSES, phrases.SEEDX_EDIT_RESPONSES)
    assert_same([len(sentences) for sentences in lists],
                [constants[f"num_{name}"] for name in ("gen_prompts", "gen_prompt_responses", "edit_responses")],
                "number of sentences")
    with tempfile.TemporaryDirectory() as place:
        tokenizer = seedx_tokenizer(folder, constants["image_tokens"], Path(place, "tokenizer"))
    ids = {word: tokenizer.word_id(word) for word in constants["token_ids"]}
    assert_same(ids, constants["token_ids"], "ids of words")
    assert cases, f"{folder}: cases.jsonl is empty"
    for number, case in enumerate(cases):
        CHECKS[case["function"]](case, tokenizer, f"case {number} ({case['function']}: {case['label']})")


def make(name: str, tokenizer: MultimodalTokenizer, options: Mapping[str, Any], validate: bool) -> PictureDecoder:
    given = {key: value for key, value in options.items() if key not in ("max_length", "num_img_gen_tokens")}
    given.setdefault("multi_resolution", False)
    given["resolution_grids"] = given.get("resolution_grids") or ["1x1"]
    decoder = get_decoder(name, tokenizer, {**given, "validate": validate})
    assert isinstance(decoder, PictureDecoder)
    return decoder


def check_record(case: dict[str, Any], tokenizer: MultimodalTokenizer, name: str, decoder: str) -> None:
    """A record's fields, its pictures opened as the loader does it."""
    fields, sizes = dict(case["arguments"]["value"]), case["arguments"]["image_sizes"]
    expected, kwargs = case["output"], dict(case["kwargs"])
    if decoder == "seed_x.edit" and not kwargs.get("multi_resolution"):
        assert_same(expected, {}, f"{name}: the original fails without several resolutions")
        return
    if decoder == "seed_x.conversation":
        kwargs.pop("min_resolution", None)
    released = make(decoder, tokenizer, kwargs, validate=False)
    for field in released.picture_fields(fields):
        size = sizes.get(fields[field].lstrip("/"))
        if size is None:  # the loader's matter
            assert_same(expected, {}, f"{name}: a picture that is not there")
            return
        fields[field] = Opened(tuple(size))
    compare(released, fields, case, kwargs["max_length"], name)
    check_validated(make(decoder, tokenizer, kwargs, validate=True), fields, case, kwargs["max_length"], name)


def compare(decoder: PictureDecoder, fields: Mapping[str, Any], case: dict[str, Any], max_length: int, name: str,
            keys: Sequence[str] = ()) -> None:
    """A decoder's sequence as the released row."""
    expected, draws = case["output"], Replay(case["rng_calls"], name)
    try:
        sequence = decoder.decode(fields, draws, max_length)
    except DataError as error:
        assert case["error"] or not expected, f"{name}: refused ({error})"
        return
    assert not draws.calls, f"{name}: draws left over: {draws.calls}"
    if "input_ids" not in expected:
        assert sequence.dropped, f"{name}: the original drops it"
        return
    assert not sequence.dropped, f"{name}: dropped ({sequence.dropped})"
    assert_row(sequence, expected, decoder.tokenizer, max_length, name)
    if "tokens" in case:
        row = batch_rows([sequence], max_length, 0)["input_ids"][0][:len(sequence)]
        assert_same(" ".join(decoder.tokenizer.tokens(row)), case["tokens"], f"{name}: tokens")


def assert_row(sequence: PictureSequence, expected: dict[str, Any], tokenizer: MultimodalTokenizer, max_length: int,
               name: str) -> None:
    batch = batch_rows([sequence], max_length, tokenizer.pad_id)
    assert_same({key: batch[key][0] for key in ROW}, {key: expected[key] for key in ROW}, f"{name}: row")
    for key in ("ids_gen_mask", "ids_cmp_mask"):
        assert_same([place for place, here in enumerate(batch[key][0]) if here], expected[key], f"{name}: {key}")
    for key in ("embeds_gen_mask", "embeds_cmp_mask"):
        one = expected[key]
        assert_same(batch[key], [one] if isinstance(one, bool) else one, f"{name}: {key}")
    for key in ("images_patch_length", "image_size"):
        if key in expected and expected.get("image_size") is not None:
            assert_same(batch[key], expected[key], f"{name}: {key}")
    if expected.get("patch_position") is not None:
        assert_close(batch["patch_position"], expected["patch_position"], 1e-6, what=f"{name}: patch_position")
    if "text" in expected and sequence.extra:
        assert_same(sequence.extra["text"], expected["text"], f"{name}: text")
    shape = expected.get("images", {}).get("shape") if isinstance(expected.get("images"), dict) else None
    if shape:
        assert_same(sum(picture.views for picture in sequence.pictures), shape[0], f"{name}: views")


def check_validated(decoder: PictureDecoder, fields: Mapping[str, Any], case: dict[str, Any], max_length: int,
                    name: str) -> None:
    """By default the same sequence comes out, or the sample is left out with a sentence."""
    try:
        sequence = decoder.decode(fields, Replay(case["rng_calls"], name), max_length)
    except BadRecord as error:
        assert str(error).endswith("."), f"{name}: {error!r} is no sentence"
        return
    if not sequence.dropped and "input_ids" in case["output"]:
        assert_row(sequence, case["output"], decoder.tokenizer, max_length, name)


def check_conversation(case: dict[str, Any], tokenizer: MultimodalTokenizer, name: str) -> None:
    check_record(case, tokenizer, name, "seed_x.conversation")


def check_edit(case: dict[str, Any], tokenizer: MultimodalTokenizer, name: str) -> None:
    check_record(case, tokenizer, name, "seed_x.edit")


def check_caption(case: dict[str, Any], tokenizer: MultimodalTokenizer, name: str) -> None:
    """`encode_caption_input_ids` and its successor for pictures in parts."""
    kwargs = dict(case["kwargs"])
    views = kwargs.pop("patch_length", 1)
    caption_with(case, case["arguments"]["caption"], views, kwargs, tokenizer, name)


def caption_with(case: dict[str, Any], caption: str, views: int, kwargs: dict[str, Any],
                 tokenizer: MultimodalTokenizer, name: str) -> None:
    max_length = kwargs.pop("max_length")
    options = {**kwargs, "multi_resolution": views > 1, "resolution_grids": GRIDS[views]}
    fields = {"image": Opened((500, 450)), "text": caption}
    compare(make("seed_x.caption", tokenizer, options, validate=False), fields, case, max_length, name)
    check_validated(make("seed_x.caption", tokenizer, options, validate=True), fields,
                    {**case, "output": {}}, max_length, name)


def check_pair(case: dict[str, Any], tokenizer: MultimodalTokenizer, name: str) -> None:
    """A member of a tar's sample: the caption's is compared, a picture's size is judged alike."""
    key, data, kwargs = case["arguments"]["key"], case["arguments"]["data"], dict(case["kwargs"])
    max_length = kwargs.pop("max_length")
    if key.endswith(".jpg") and isinstance(data, dict):
        options = {"min_resolution": 400, "min_aspect_ratio": 0.666, **kwargs}
        options = {k: options[k] for k in ("min_resolution", "min_aspect_ratio", "multi_resolution", "base_resolution",
                                           "resolution_grids") if k in options}
        decoder = make("seed_x.caption", tokenizer, options, validate=False)
        used = decoder.use({"image": Opened(tuple(data["image_size"]))}, "image")
        assert_same(bool(decoder.misshapen(used, "image")), case["output"] == {}, f"{name}: kept")
        return
    metadata = kwargs.get("use_caption_in_metadata", False)
    if not key.endswith(".json" if metadata else ".txt") or "input_ids" not in case["output"]:
        return  # members that the pipe passes by, or whose length depends on a picture of another member
    learn_wording(case)
    kwargs.pop("assure_text", None)
    options = {**kwargs, "multi_resolution": False}
    fields = {"image": Opened((500, 450)), **({"metadata": data} if metadata else {"text": data})}
    compare(make("seed_x.caption", tokenizer, options, validate=False), fields, case, max_length, name)


def learn_wording(case: dict[str, Any]) -> None:
    """A request that no kept recording shows takes its words from this one."""
    numbers = [result for kind, _, result in case["rng_calls"] if kind == "random.randint"]
    if not numbers or numbers[0] in phrases.SEEDX_DRAW_KNOWN:
        return
    asked, response = case["output"]["text"].split(" [/INST]\n ")
    request = asked.removeprefix("[INST] ").removesuffix(case["arguments"]["data"].lstrip()).rstrip()
    for name, words in (("SEEDX_DRAW_REQUESTS", request), ("SEEDX_DRAW_RESPONSES", response)):
        sentences = list(getattr(phrases, name))
        sentences[numbers[0]] = words
        setattr(phrases, name, tuple(sentences))


def check_sample(case: dict[str, Any], tokenizer: MultimodalTokenizer, name: str) -> None:
    """`tokenize_text`: a grouped sample."""
    data = case["arguments"]["data"]
    caption_with(case, data["text"], data["images_patch_length"], dict(case["kwargs"]), tokenizer, name)


def check_filter(case: dict[str, Any], tokenizer: MultimodalTokenizer, name: str) -> None:
    item, kwargs = case["arguments"]["item"], case["kwargs"]
    kept = not dissimilar({"metadata": item["metadata"]}, kwargs["similarity_thr"]) and "images" in item \
        and item.get("filter_flag", True) and ("text" in item or not kwargs["assure_text"])
    assert_same(kept, case["output"], name)


CHECKS = {"decode_llava_data": check_conversation, "decode_single_turn_edit_data": check_edit,
          "encode_caption_input_ids": check_caption, "encode_caption_input_ids_v2": check_caption,
          "decode_image_text_pair": check_pair, "tokenize_text": check_sample,
          "filter_data_with_similarity": check_filter}
