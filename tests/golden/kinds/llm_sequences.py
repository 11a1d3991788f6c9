"""Kind `llm_sequences`: exact ids of training sequences.

* `tokenization.json`: every string -> ids, pieces, both decodings, with the fixture's own tokenizer folder.
* `cases.jsonl`: every decoder of the released modules on a record, with its draws replayed in order: ids, mask, labels
  and the other fields, what the filter keeps, and a refusal of ours where the original raised.
* `pipeline.json`: records on disk -> batches, through our readers, for the caption data.

Left out: the messages the original printed (ours are in `TokenSequence.dropped`). Members that are no records (another
suffix) are the readers' matter: the pipeline has one, cases of them are passed over. Decoders run with
`validate: false`, the released behaviour to the letter; with validation on they give the same or refuse.
"""

from __future__ import annotations

import io
import json
import random
import tarfile
import tempfile
from collections.abc import MutableSequence, Sequence
from pathlib import Path
from typing import Any

from runner import assert_same, read_json, read_json_lines

from seed_multimodal.data.decoders.registry import get_decoder
from seed_multimodal.data.decoders.sequence import IGNORED, pad
from seed_multimodal.data.formats.record import BadRecord
from seed_multimodal.data.formats.sources import open_records
from seed_multimodal.data.stream.data_settings import read_data_settings
from seed_multimodal.data.stream.llm_batches import LlmBatches
from seed_multimodal.data.stream.mixture import EndOfData
from seed_multimodal.errors import ConfigError, DataError
from seed_multimodal.language.tokenizer import MultimodalTokenizer

KIND = "llm_sequences"

DECODERS = {
    ("train", "image_text_pair"): "pretrain.caption", ("train", "mmc4_data"): "pretrain.interleaved",
    ("train", "video_pair"): "pretrain.video", ("train", "text_pretrain_data"): "pretrain.text",
    ("train", "edit_pair"): "pretrain.edit", ("train", "ra_data"): "pretrain.retrieval",
    ("train", "coco_cap_eval_data"): "pretrain.caption_eval",
    ("train", "visual_question_data"): "pretrain.visual_question",
    ("train", "text_conversation_data"): "pretrain.text_conversation",
    ("sft", "question_answer_pair"): "sft.qa", ("sft", "edit_pair"): "sft.edit", ("sft", "story_pair"): "sft.story",
    ("sft", "difference_pair"): "sft.difference", ("sft", "conversation_pair"): "sft.conversation",
    ("sft", "video_pair"): "sft.video", ("sft", "video_conversation_pair"): "sft.video_conversation",
    ("sft", "edit_multi_pair"): "sft.multi_edit", ("sft", "interleaved_pair"): "sft.interleaved",
    ("sft", "visual_question_data"): "sft.visual_question",
    ("sft", "text_conversation_data"): "sft.text_conversation",
}
TEXT_FUNCTIONS = ("text_pretrain_data", "text_conversation_data")  # these read lines, not members of a tar


class Replay:
    """The recorded draws, one after the other.

    A shuffle's outcome is not recorded; it comes from Python's generator, seeded as recorded and kept in step.
    """

    def __init__(self, calls: Sequence[Any], seed: int, name: str) -> None:
        self.calls, self.name, self.random = list(calls), name, random.Random(seed)

    def _next(self, kind: str, arguments: list[Any]) -> Any:
        assert self.calls, f"{self.name}: drew {kind}{arguments} after the last recorded draw"
        made, given, result = self.calls.pop(0)
        assert_same((kind, arguments), (made, given), f"{self.name}: draw")
        return result

    def uniform(self) -> float:
        return self._next("numpy.uniform", [0, 1])

    def choice(self, items: Sequence[Any]) -> Any:
        self.random.choice(items)
        result = self._next("random.choice", [])
        assert result in items, f"{self.name}: {result!r} was drawn, ours are {items!r}"
        return result

    def randint(self, low: int, high: int) -> int:
        self.random.randint(low, high)
        return self._next("random.randint", [low, high])

    def shuffle(self, items: MutableSequence[Any]) -> None:
        self._next("random.shuffle", [])
        self.random.shuffle(items)


def plain(value: Any) -> Any:
    """A recorded sample as json holds it: arrays are lists."""
    if isinstance(value, dict):
        return plain(value["__numpy__"]) if set(value) == {"__numpy__"} else {k: plain(v) for k, v in value.items()}
    return [plain(item) for item in value] if isinstance(value, list) else value


def check(folder: Path) -> None:
    tokenizer = MultimodalTokenizer.from_pretrained(folder / "tokenizer")
    check_tokenization(read_json(folder / "tokenization.json"), tokenizer)
    cases = read_json_lines(folder / "cases.jsonl")
    assert cases, f"{folder}: cases.jsonl is empty"
    for case in cases:
        check_case(case, tokenizer)
    check_pipeline(read_json(folder / "pipeline.json"), tokenizer)


def check_tokenization(expected: dict[str, Any], tokenizer: MultimodalTokenizer) -> None:
    vocabulary = tokenizer.vocabulary
    assert_same(len(tokenizer), expected["length"], "length")
    assert_same((tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.unk_id),
                (expected["bos"], expected["eos"], expected["pad"], expected["unk"]), "special ids")
    assert_same((vocabulary.n_text, vocabulary.boi_id, vocabulary.eoi_id),
                (expected["first_image_id"], expected["img_open"], expected["img_close"]), "image ids")
    assert expected["cases"], "the fixture holds no strings"
    for case in expected["cases"]:
        text = case["text"]
        ids = tokenizer.encode(text)
        assert_same(ids, case["ids"], f"ids of {text!r}")
        assert_same(tokenizer.encode(text, add_bos=True), case["ids_with_special_tokens"], f"ids with bos of {text!r}")
        assert_same(tokenizer.tokens(ids), case["tokens"], f"pieces of {text!r}")
        assert_same(tokenizer.decode(ids), case["decoded"], f"decoding of {text!r}")
        assert_same(tokenizer.decode(ids, skip_special_tokens=True), case["decoded_skip_special"],
                    f"decoding of {text!r} without special tokens")


def check_case(case: dict[str, Any], tokenizer: MultimodalTokenizer) -> None:
    function = case["function"].removeprefix("decode_").removesuffix("_for_llm")
    decoder = DECODERS[case["module"], function]
    name = f"case {case['id']} ({decoder})"
    options = dict(case["kwargs"])
    max_length = options.pop("max_length", None)
    expected = case.get("output")
    if function not in TEXT_FUNCTIONS and not case["key"].endswith(".pkl"):
        assert_same((expected, case["rng_calls"]), (None, []), f"{name}: a member that is no record")
        return
    if max_length is None and expected and "attention_mask" in expected:
        max_length = len(expected["input_ids"])  # the function's own default

    fields, draws = plain(case["sample"]), Replay(case["rng_calls"], case["seed"], name)
    try:
        sequence = get_decoder(decoder, tokenizer, {**options, "validate": False}).decode(fields, draws, max_length)
    except (DataError, ConfigError) as error:
        assert case.get("error"), f"{name}: refused ({error})"
        assert str(error).strip().endswith("."), f"{name}: {error!r} is no sentence"
        return
    assert not case.get("error"), f"{name}: the original raised {case['error']}, ours gave {sequence}"
    assert not draws.calls, f"{name}: draws left over: {draws.calls}"
    assert_same(not sequence.dropped, case["kept_by_filter"], f"{name}: kept by the filter ({sequence.dropped})")
    assert_same(sequence.extra, {k: v for k, v in expected.items()
                                 if k not in ("input_ids", "attention_mask", "labels")}, f"{name}: other fields")
    if "labels" in expected:
        row = pad(sequence, max_length, tokenizer.pad_id)
        assert_same(row, {key: expected[key] for key in row}, name)
        assert_same([n for n, label in enumerate(row["labels"]) if label != IGNORED], case["label_positions"], name)
    else:
        assert_same(sequence.ids, expected.get("input_ids", []), f"{name}: ids")
        assert_same(set(sequence.labels) - {IGNORED}, set(), f"{name}: labels")
    assert len(sequence.labels) == len(sequence.ids), f"{name}: {len(sequence.labels)} labels"
    if "tokens" in case:
        assert_same(" ".join(tokenizer.tokens(sequence.ids)), case["tokens"], f"{name}: tokens")
    check_validated(decoder, options, case, max_length, sequence, tokenizer, name)


def check_validated(decoder: str, options: dict[str, Any], case: dict[str, Any], max_length: int | None,
                    sequence: Any, tokenizer: MultimodalTokenizer, name: str) -> None:
    """By default (with validation) the same sequence comes out, or a refusal."""
    draws = Replay(case["rng_calls"], case["seed"], name)
    try:
        again = get_decoder(decoder, tokenizer, options)(plain(case["sample"]), draws, max_length)
    except (DataError, ConfigError) as error:
        assert str(error).endswith("."), f"{name}: {error!r} is no sentence"
        return
    assert again is None or again == sequence, f"{name}: another sequence with validation"


def check_pipeline(recorded: dict[str, Any], tokenizer: MultimodalTokenizer) -> None:
    """Shards through our readers: every kept sample as the released pipe gives it, then those as padded batches."""
    settings, expected = dict(recorded["settings"]), recorded["samples_sorted_by_text"]
    assert settings["reverse_ratio"] in (0, 1), "pipeline: the samples' direction is drawn, so they cannot be compared"
    kept = {row["text"] for row in expected}
    with tempfile.TemporaryDirectory() as place:
        everything, good = Path(place, "all"), Path(place, "kept")
        for shard, members in recorded["shards"].items():
            write_shard(everything / shard, members)
            write_shard(good / shard, [m for m in members if "sample" in m and m["sample"]["text"] in kept])
        assert_same(padded_samples(everything, settings, tokenizer), expected, "pipeline: samples")
        check_batches(good, settings, recorded["batched"], expected, tokenizer)


def check_batches(folder: Path, settings: dict[str, Any], recorded: dict[str, Any], rows: list[dict[str, Any]],
                  tokenizer: MultimodalTokenizer) -> None:
    """The released data file of that pipe, read as it is, over the kept samples: ours are dropped after batching."""
    given = {key: value for key, value in {**settings, **recorded["settings"]}.items() if key != "function"}
    target = f"src.data.torchdata_train.{settings['function']}"
    data = read_data_settings({"_target_": target, "data_dir": str(folder), **given, "packing": False})
    keys = ("input_ids", "attention_mask", "labels")
    shapes: list[dict[str, list[int]]] = []
    seen: list[tuple[Any, ...]] = []
    with LlmBatches(data, tokenizer) as batches:
        for step in range(len(recorded["batches"]) + 1):
            try:
                batch = batches.at(step)
            except EndOfData:
                break
            shapes.append({key: list(getattr(batch, key).shape) for key in keys})
            seen += list(zip(*(getattr(batch, key).tolist() for key in keys), strict=True))
    assert_same(shapes, [{key: batch[key] for key in keys} for batch in recorded["batches"]], "pipeline: batches")
    once = [tuple(row[key] for key in keys) for row in rows]
    assert_same(sorted(seen), sorted(once * given["cycle_count"]), "pipeline: rows of all batches")


def write_shard(path: Path, members: Sequence[dict[str, Any]]) -> None:
    """A tar with the recorded samples as json; the members beside them, which are no records, as text."""
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for member in members:
            name = Path(member["member"])
            record = "sample" in member
            data = json.dumps(member["sample"]) if record else member["content"]
            entry = tarfile.TarInfo(str(name.with_suffix(".json" if record else ".txt")))
            entry.size = len(data.encode())
            tar.addfile(entry, io.BytesIO(data.encode()))


def padded_samples(folder: Path, settings: dict[str, Any], tokenizer: MultimodalTokenizer) -> list[dict[str, Any]]:
    """Every kept sample of a folder of shards as the released pipe gives it, sorted by text."""
    decoder = get_decoder("pretrain.caption", tokenizer, {"reverse_ratio": settings["reverse_ratio"]})
    source, rows = open_records(str(folder)), []
    for number in range(len(source)):
        try:
            record = source.read(number)
        except BadRecord as error:  # a member that is no record: left out there, named and counted here
            assert "has no .json member" in str(error), error
            continue
        draws = Replay([["random.choice", [], "{}"], ["numpy.uniform", [0, 1], 0.5]], 0, record.where)
        sequence = decoder(record.fields, draws, settings["max_length"])
        if sequence is not None:
            rows.append({"__key__": record.key.rsplit("/", 1)[-1],
                         **pad(sequence, settings["max_length"], tokenizer.pad_id), **sequence.extra,
                         "metadata": "{}"})  # the released pipe puts this where a decoder gives no metadata
    return sorted(rows, key=lambda row: row["text"])
