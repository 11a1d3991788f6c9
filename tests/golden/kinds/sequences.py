"""Training sequences: exact ids, masks and labels of every decoder on recorded records, with the
recorded random choices.

A sample that the original skipped or that raised is skipped or raises here too; further ones only
for the reasons in `STRICTER`.

* `llm_sequences`: SEED-LLaMA's decoders, also other fields and the filter; `tokenization.json`:
strings → ids, pieces,
  both decodings; `pipeline.json`: records on disk → batches. Not compared: messages that the
  original printed; members that are no records (the pipeline has one).
* `seedx_sequences`: SEED-X's decoders, and the positions of views. Not compared: edits without
several resolutions,
  where the original always fails; pixels of the views (kind `seedx_anyres`); requests and responses
  that are not in tests/golden/data (read from the recording).
"""

from __future__ import annotations

import io
import itertools
import json
import random
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Mapping, MutableSequence, Sequence
from pathlib import Path
from typing import Any

from kinds.seed_x_agent import seedx_tokenizer
from PIL import Image
from runner import Recording, assert_close, assert_same, read_json_lines

from seed_multimodal.data.decoders import DECODERS, get_decoder, phrases
from seed_multimodal.data.decoders.base import TrainingSequence
from seed_multimodal.data.formats.pairs import similarity_problem
from seed_multimodal.data.formats.record import BadRecord
from seed_multimodal.data.formats.sources import open_records
from seed_multimodal.data.stream.config import read_data_settings
from seed_multimodal.data.stream.llm_batches import LlmBatches
from seed_multimodal.errors import ConfigError, DataError
from seed_multimodal.language.tokenizer import MultimodalTokenizer
from seed_multimodal.language.vocabulary import IGNORE_INDEX
from seed_multimodal.models.seed_x.data import (
    ImageSequence,
    SeedXDecoder,
    metadata_of,
)

# Functions `decode_…` of the original → decoders.
PRETRAIN = {
    "image_text_pair": "caption",
    "mmc4_data": "interleaved",
    "video_pair": "video",
    "text_pretrain_data": "text",
    "edit_pair": "edit",
    "visual_question_data": "visual_question",
    "text_conversation_data": "text_conversation",
}
SFT = {
    "question_answer_pair": "qa",
    "edit_pair": "edit",
    "story_pair": "story",
    "difference_pair": "difference",
    "conversation_pair": "conversation",
    "video_pair": "video",
    "video_conversation_pair": "video_conversation",
    "edit_multi_pair": "multi_edit",
    "interleaved_pair": "interleaved",
    "visual_question_data": "visual_question",
    "text_conversation_data": "text_conversation",
}
LEFT_OUT = (
    "ra_data",
    "coco_cap_eval_data",
)  # in no data file of the original; the second has no labels
# Samples that only this library skips: images of another length, clips without enough frames,
# records whose labels are only </s> or a full stop, an impossible direction, captions that are too
# long, paths with "null" in them.
STRICTER = (
    "codes, not",
    "num_frames",
    "nothing to learn",
    "is empty",
    "no dialogue",
    "reverse_ratio must be",
    "do not fit into",
    "'nullable.png'",
    "instruction: missing",
)
TEXT_FUNCTIONS = (
    "text_pretrain_data",
    "text_conversation_data",
)  # these read lines, not members of a tar
BATCH = ("input_ids", "attention_mask", "labels")
GRIDS = {1: [], 2: ["1x1"], 3: ["2x1"], 4: ["3x1"], 5: ["2x2"]}  # by the number of views


class Replay:
    """A generator that returns the recorded values in order.

    Shuffles are not recorded; they come from Python's generator with the recorded seed, after the
    same calls.
    """

    def __init__(self, calls: Sequence[Any], name: str, seed: int = 0) -> None:
        self.calls = list(calls)
        self.name = name
        self.random = random.Random(seed)

    def _next(self, kind: str, arguments: list[Any]) -> Any:
        assert self.calls, f"{self.name}: called {kind}{arguments} after the last recorded call"
        recorded_kind, recorded_arguments, result = self.calls.pop(0)
        assert_same((kind, arguments), (recorded_kind, recorded_arguments), f"{self.name}: call")
        return result

    def uniform(self) -> float:
        return self._next("numpy.uniform", [0, 1])

    def choice(self, items: Sequence[Any]) -> Any:
        self.random.choice(items)
        result = self._next("random.choice", [])
        assert result in items, f"{self.name}: {result!r} was chosen, not one of {items!r}"
        return result

    def randint(self, low: int, high: int) -> int:
        self.random.randint(low, high)
        return self._next("random.randint", [low, high])

    def shuffle(self, items: MutableSequence[Any]) -> None:
        self._next("random.shuffle", [])
        self.random.shuffle(items)


def decoded(
    decode: Callable[[], TrainingSequence], rng: Replay, usable: bool
) -> TrainingSequence | None:
    """A decoder's sequence with the recorded choices; None: it raised. It may leave out what the
    original does not use, the rest for the reasons in `STRICTER` only."""
    sequence = None
    try:
        sequence = decode()
        reason = sequence.drop_reason
    except (DataError, ConfigError) as error:
        reason = str(error)
    else:
        assert not rng.calls, f"{rng.name}: recorded random calls left: {rng.calls}"
    if reason:
        assert not usable or any(part in reason for part in STRICTER), f"{rng.name}: {reason}"
    else:
        assert usable, f"{rng.name}: the original skips it"
    return sequence


# ---- SEED-LLaMA


def plain(value: Any) -> Any:
    """A recorded sample as json: arrays are lists."""
    if isinstance(value, dict):
        return (
            plain(value["__numpy__"])
            if set(value) == {"__numpy__"}
            else {k: plain(v) for k, v in value.items()}
        )
    return [plain(item) for item in value] if isinstance(value, list) else value


def check_llm(recording: Recording) -> None:
    tokenizer = MultimodalTokenizer.from_pretrained(recording.folder / "tokenizer")
    check_tokenization(recording.json("tokenization.json"), tokenizer)
    for case in read_json_lines(recording.folder / "cases.jsonl"):
        check_case(case, tokenizer)
    check_pipeline(recording.json("pipeline.json"), tokenizer)


def check_tokenization(expected: dict[str, Any], tokenizer: MultimodalTokenizer) -> None:
    vocabulary = tokenizer.vocabulary
    actual = {
        "length": len(tokenizer),
        "bos": tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id,
        "pad": tokenizer.pad_token_id,
        "unk": tokenizer.unk_token_id,
        "first_image_id": vocabulary.n_text,
        "img_open": vocabulary.boi_id,
        "img_close": vocabulary.eoi_id,
    }
    assert_same(actual, {key: expected[key] for key in actual}, "length and special ids")
    assert expected["cases"], "the fixture holds no strings"
    for case in expected["cases"]:
        text = case["text"]
        ids = tokenizer.encode(text)
        actual = {
            "ids": ids,
            "ids_with_special_tokens": tokenizer.encode(text, add_bos=True),
            "tokens": tokenizer.tokens(ids),
            "decoded": tokenizer.decode(ids),
            "decoded_skip_special": tokenizer.decode(ids, skip_special_tokens=True),
        }
        assert_same(actual, {key: case[key] for key in actual}, f"{text!r}")


def pad(sequence: TrainingSequence, max_length: int, pad_id: int) -> dict[str, list[int]]:
    """The original's row: truncated or padded on the right to `max_length`."""
    ids = sequence.ids[:max_length]
    labels = sequence.labels[:max_length]
    rest = max_length - len(ids)
    return {
        "input_ids": ids + [pad_id] * rest,
        "attention_mask": [1] * len(ids) + [0] * rest,
        "labels": labels + [IGNORE_INDEX] * rest,
    }


def check_case(case: dict[str, Any], tokenizer: MultimodalTokenizer) -> None:
    function = case["function"].removeprefix("decode_").removesuffix("_for_llm")
    if function in LEFT_OUT or "'metadata'" in str(case.get("error")):  # which is not read here
        return
    decoder = (
        f"pretrain.{PRETRAIN[function]}" if case["module"] == "train" else f"sft.{SFT[function]}"
    )
    name = f"case {case['id']} ({decoder})"
    options = dict(case["kwargs"])
    max_length = options.pop("max_length", None)
    expected = case.get("output")
    if function not in TEXT_FUNCTIONS and not case["key"].endswith(".pkl"):
        assert_same(
            (expected, case["rng_calls"]), (None, []), f"{name}: a member that is no record"
        )
        return
    if max_length is None and expected and "attention_mask" in expected:
        max_length = len(expected["input_ids"])  # the function's own default

    option_names = DECODERS[decoder].option_names()
    options = {key: value for key, value in options.items() if key in option_names}
    rng = Replay(case["rng_calls"], name, case["seed"])
    kept = case.get("kept_by_filter")
    sequence = decoded(
        lambda: get_decoder(decoder, tokenizer, options).decode(
            plain(case["sample"]), rng, max_length
        ),
        rng,
        kept,
    )
    if sequence is None:
        return
    assert not case.get("error"), f"{name}: the original raised {case['error']}, not {sequence}"
    if not sequence.ids or (sequence.drop_reason and kept):
        return
    other = {key: value for key, value in expected.items() if key not in (*BATCH, "filter_flag")}
    assert_same(sequence.extra, other, f"{name}: other fields")
    if "labels" in expected:
        row = pad(sequence, max_length, tokenizer.pad_token_id)
        assert_same(row, {key: expected[key] for key in row}, name)
    else:
        assert_same(sequence.ids, expected.get("input_ids", []), f"{name}: ids")
        assert_same(set(sequence.labels) - {IGNORE_INDEX}, set(), f"{name}: labels")
    assert len(sequence.labels) == len(sequence.ids), f"{name}: {len(sequence.labels)} labels"
    if "tokens" in case:
        assert_same(" ".join(tokenizer.tokens(sequence.ids)), case["tokens"], f"{name}: tokens")


def check_pipeline(recorded: dict[str, Any], tokenizer: MultimodalTokenizer) -> None:
    """Shards → every usable sample as in the original pipe, then those samples as padded
    batches."""
    settings = dict(recorded["settings"])
    expected = recorded["samples_sorted_by_text"]
    assert settings["reverse_ratio"] in (0, 1), "pipeline: the direction of samples is random"
    usable = {row["text"] for row in expected}
    with tempfile.TemporaryDirectory() as folder:
        everything = Path(folder, "all")
        good = Path(folder, "usable")
        for shard, members in recorded["shards"].items():
            write_shard(everything / shard, members)
            write_shard(
                good / shard,
                [m for m in members if "sample" in m and m["sample"]["text"] in usable],
            )
        assert_same(padded_samples(everything, settings, tokenizer), expected, "pipeline: samples")
        check_batches(good, settings, recorded["batched"], expected, tokenizer)


def check_batches(
    folder: Path,
    settings: dict[str, Any],
    recorded: dict[str, Any],
    rows: list[dict[str, Any]],
    tokenizer: MultimodalTokenizer,
) -> None:
    """The data configuration of that pipe over the usable samples (here the others are skipped
    after batching)."""
    overrides = {
        key: value
        for key, value in {**settings, **recorded["settings"]}.items()
        if key != "function"
    }
    target = f"src.data.torchdata_train.{settings['function']}"
    data = read_data_settings(
        {"_target_": target, "data_dir": str(folder), **overrides, "packing": False}
    )
    shapes: list[dict[str, list[int]]] = []
    consumed: list[tuple[Any, ...]] = []
    with LlmBatches(data, tokenizer) as batches:
        for batch in itertools.islice(batches, len(recorded["batches"]) + 1):
            shapes.append({key: list(getattr(batch, key).shape) for key in BATCH})
            consumed += list(zip(*(getattr(batch, key).tolist() for key in BATCH), strict=True))
    assert_same(
        shapes,
        [{key: batch[key] for key in BATCH} for batch in recorded["batches"]],
        "pipeline: batches",
    )
    once = [tuple(row[key] for key in BATCH) for row in rows]
    assert_same(
        sorted(consumed), sorted(once * overrides["cycle_count"]), "pipeline: rows of all batches"
    )


def write_shard(path: Path, members: Sequence[dict[str, Any]]) -> None:
    """A tar with the recorded samples as json; members that are no records as text."""
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for member in members:
            record = "sample" in member
            data = (json.dumps(member["sample"]) if record else member["content"]).encode()
            entry = tarfile.TarInfo(
                str(Path(member["member"]).with_suffix(".json" if record else ".txt"))
            )
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))


def padded_samples(
    folder: Path, settings: dict[str, Any], tokenizer: MultimodalTokenizer
) -> list[dict[str, Any]]:
    """Every usable sample of a folder of shards as in the original pipe, sorted by text."""
    decoder = get_decoder(
        "pretrain.caption", tokenizer, {"reverse_ratio": settings["reverse_ratio"]}
    )
    source = open_records(str(folder))
    rows = []
    for index in range(len(source)):
        try:
            record = source.read(index)
        except BadRecord as error:
            assert "has no .json member" in str(error), error
            continue
        rng = Replay([["random.choice", [], "{}"], ["numpy.uniform", [0, 1], 0.5]], record.location)
        sequence = decoder.decode(record.fields, rng, settings["max_length"])
        if not sequence.drop_reason:
            rows.append(
                {
                    "__key__": record.key.rsplit("/", 1)[-1],
                    **pad(sequence, settings["max_length"], tokenizer.pad_token_id),
                    **sequence.extra,
                    "filter_flag": True,
                    "metadata": "{}",
                }
            )  # in the original pipe if a decoder returns no metadata
    return sorted(rows, key=lambda row: row["text"])


# ---- SEED-X


def opened_image(size: Sequence[int]) -> Image.Image:
    return Image.new("1", tuple(size))


class SeedXReplay(Replay):
    """With choices from lists that are only in the recording."""

    def choice(self, items: Sequence[Any]) -> Any:
        result = self._next("random.choice", [])
        assert result or items[-1] == result, f"{self.name}: the last response is empty"
        return result


def check_seedx(recording: Recording) -> None:
    constants = recording.json("constants.json")
    lists = (
        phrases.SEEDX_DRAW_REQUESTS,
        phrases.SEEDX_DRAW_RESPONSES,
        phrases.SEEDX_EDIT_RESPONSES,
    )
    assert_same(
        [len(sentences) for sentences in lists],
        [
            constants[f"num_{name}"]
            for name in ("gen_prompts", "gen_prompt_responses", "edit_responses")
        ],
        "number of sentences",
    )
    tokenizer = seedx_tokenizer(recording.folder, constants["image_tokens"])
    ids = {word: tokenizer.token_id(word) for word in constants["token_ids"]}
    assert_same(ids, constants["token_ids"], "ids of words")
    for index, case in enumerate(read_json_lines(recording.folder / "cases.jsonl")):
        name = f"case {index} ({case['function']}: {case['label']})"
        if case["function"] in RECORDS:
            check_record(case, tokenizer, name, RECORDS[case["function"]])
        elif case["function"].startswith("encode_caption_input_ids"):
            kwargs = dict(case["kwargs"])
            check_caption(
                case,
                case["arguments"]["caption"],
                kwargs.pop("patch_length", 1),
                kwargs,
                tokenizer,
                name,
            )
        elif case["function"] == "tokenize_text":  # a grouped sample
            data = case["arguments"]["data"]
            check_caption(
                case,
                data["text"],
                data["images_patch_length"],
                dict(case["kwargs"]),
                tokenizer,
                name,
            )
        elif case["function"] == "decode_image_text_pair":
            check_pair(case, tokenizer, name)
        else:
            assert_same(case["function"], "filter_data_with_similarity", name)
            item = case["arguments"]["item"]
            kwargs = case["kwargs"]
            usable = (
                not similarity_problem(metadata_of(item), kwargs["similarity_thr"])
                and "images" in item
                and item.get("filter_flag", True)
                and ("text" in item or not kwargs["assure_text"])
            )
            assert_same(usable, case["output"], name)


RECORDS = {
    "decode_llava_data": "seed_x.conversation",
    "decode_single_turn_edit_data": "seed_x.edit",
}


def make(name: str, tokenizer: MultimodalTokenizer, options: Mapping[str, Any]) -> SeedXDecoder:
    arguments = {
        key: value
        for key, value in options.items()
        if key not in ("max_length", "num_img_gen_tokens")
    }
    arguments.setdefault("multi_resolution", False)
    arguments["resolution_grids"] = arguments.get("resolution_grids") or ["1x1"]
    decoder = get_decoder(name, tokenizer, arguments)
    assert isinstance(decoder, SeedXDecoder)
    return decoder


def check_record(
    case: dict[str, Any], tokenizer: MultimodalTokenizer, name: str, decoder: str
) -> None:
    """The fields of a record, with images opened as in the loader."""
    fields = dict(case["arguments"]["value"])
    sizes = case["arguments"]["image_sizes"]
    expected = case["output"]
    kwargs = dict(case["kwargs"])
    if decoder == "seed_x.edit" and not kwargs.get("multi_resolution"):
        assert_same(expected, {}, f"{name}: the original fails without several resolutions")
        return
    if decoder == "seed_x.conversation":
        kwargs.pop("min_resolution", None)
    built = make(decoder, tokenizer, kwargs)
    missing = False

    def open_image(value: str, field: str) -> Any:
        nonlocal missing
        size = sizes.get(value.lstrip("/"))
        missing = missing or size is None and "null" not in value
        return value if size is None else opened_image(size)

    fields = built.open_images(fields, open_image)
    if missing:
        assert_same(expected, {}, f"{name}: a missing image")
        return
    compare(built, fields, case, kwargs["max_length"], name)


def compare(
    decoder: SeedXDecoder,
    fields: Mapping[str, Any],
    case: dict[str, Any],
    max_length: int,
    name: str,
) -> None:
    """A decoder's sequence and the original's row."""
    expected = case["output"]
    usable = "input_ids" in expected
    rng = SeedXReplay(case["rng_calls"], name)
    sequence = decoded(lambda: decoder.decode(fields, rng, max_length), rng, usable)
    if sequence is None or sequence.drop_reason:
        return
    assert_row(sequence, expected, decoder.tokenizer.pad_token_id, max_length, name)
    if "tokens" in case:
        ids = sequence.ids[:max_length]
        assert_same(" ".join(decoder.tokenizer.tokens(ids)), case["tokens"], f"{name}: tokens")


def assert_row(
    sequence: ImageSequence, expected: dict[str, Any], pad_id: int, max_length: int, name: str
) -> None:
    """The original's row without pixels; masks of views."""

    def within(positions: Iterable[int]) -> list[int]:
        return sorted(position for position in positions if position < max_length)

    images = sequence.images
    actual: dict[str, Any] = {
        **pad(sequence, max_length, pad_id),
        "ids_gen_mask": within(sequence.target_positions),
        "ids_cmp_mask": within(sequence.input_positions),
        "embeds_cmp_mask": None,
        "embeds_gen_mask": None,
    }
    if images:
        read = [[not image.is_target] * image.views for image in images]
        # Of an output image only the whole is drawn.
        drawn = [[False] * (image.views - 1) + [image.is_target] for image in images]
        actual |= {"embeds_cmp_mask": sum(read, []), "embeds_gen_mask": sum(drawn, [])}
    wanted = {key: expected[key] for key in actual}
    for key in ("embeds_gen_mask", "embeds_cmp_mask"):
        if isinstance(wanted[key], bool):
            wanted[key] = [wanted[key]]
    if expected.get("image_size") is not None:
        sizes = {
            "images_patch_length": [image.views for image in images],
            "image_size": [list(image.image.size) for image in images],
        }
        actual |= {key: value for key, value in sizes.items() if key in expected}
        wanted |= {key: expected[key] for key in sizes if key in expected}
    assert_same(actual, wanted, f"{name}: row")
    if expected.get("patch_position") is not None:
        positions = [position for image in images for position in image.positions]
        assert_close(positions, expected["patch_position"], 1e-6, what=f"{name}: patch_position")
    if "text" in expected and sequence.extra:
        assert_same(sequence.extra["text"], expected["text"], f"{name}: text")
    pixels = expected.get("images")
    if isinstance(pixels, dict) and pixels.get("shape"):
        views = sum(image.views for image in images)
        assert_same(views, pixels["shape"][0], f"{name}: views")


def check_caption(
    case: dict[str, Any],
    caption: str,
    views: int,
    kwargs: dict[str, Any],
    tokenizer: MultimodalTokenizer,
    name: str,
) -> None:
    """An image with this number of views and its caption."""
    max_length = kwargs.pop("max_length")
    fields = {"image": opened_image((500, 450)), "text": caption}
    options = {**kwargs, "multi_resolution": views > 1, "resolution_grids": GRIDS[views]}
    compare(make("seed_x.caption", tokenizer, options), fields, case, max_length, name)


def check_pair(case: dict[str, Any], tokenizer: MultimodalTokenizer, name: str) -> None:
    """A member of a tar's sample: the sequence of a caption, the filter on an image's size."""
    key = case["arguments"]["key"]
    data = case["arguments"]["data"]
    kwargs = dict(case["kwargs"])
    max_length = kwargs.pop("max_length")
    if key.endswith(".jpg") and isinstance(data, dict):
        options = {"min_resolution": 400, "min_aspect_ratio": 0.666, **kwargs}
        options = {
            k: options[k]
            for k in (
                "min_resolution",
                "min_aspect_ratio",
                "multi_resolution",
                "base_resolution",
                "resolution_grids",
            )
            if k in options
        }
        decoder = make("seed_x.caption", tokenizer, options)
        used = decoder.opened_image({"image": opened_image(data["image_size"])}, "image")
        assert_same(bool(decoder.shape_problem(used)), case["output"] == {}, f"{name}: filter")
        return
    metadata = kwargs.get("use_caption_in_metadata", False)
    if not key.endswith(".json" if metadata else ".txt") or "input_ids" not in case["output"]:
        # Members that the pipe ignores, or whose length depends on an image of another member.
        return
    add_sentences(case)
    kwargs.pop("assure_text", None)
    fields = {
        "image": opened_image((500, 450)),
        **({"metadata": data} if metadata else {"text": data}),
    }
    decoder = make("seed_x.caption", tokenizer, {**kwargs, "multi_resolution": False})
    compare(decoder, fields, case, max_length, name)


def add_sentences(case: dict[str, Any]) -> None:
    """Read a request and a response that are not in tests/golden/data from this case."""
    indices = [result for kind, _, result in case["rng_calls"] if kind == "random.randint"]
    if not indices or indices[0] in phrases.SEEDX_DRAW_RECORDED:
        return
    prompt, response = case["output"]["text"].split(" [/INST]\n ")
    request = (
        prompt.removeprefix("[INST] ").removesuffix(case["arguments"]["data"].lstrip()).rstrip()
    )
    for name, replacements in (
        ("SEEDX_DRAW_REQUESTS", request),
        ("SEEDX_DRAW_RESPONSES", response),
    ):
        sentences = list(getattr(phrases, name))
        sentences[indices[0]] = replacements
        setattr(phrases, name, tuple(sentences))


KINDS = {"llm_sequences": check_llm, "seedx_sequences": check_seedx}
