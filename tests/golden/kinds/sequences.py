"""Training sequences: exact ids, masks and labels of every decoder on recorded records, with the
recorded random choices.

A sample that the original skipped or that raised is skipped or raises here too; further ones only
for the reasons in `stricter`.

* `llm_sequences`: SEED-LLaMA's decoders, also other fields and the filter; `tokenization.json`:
  strings → ids, pieces, both decodings; `pipeline.json`: records on disk → batches. Not compared:
  messages that the original printed; members that are no records.
* `seedx_sequences`: SEED-X's decoders, and the positions of views. Not compared: edits without
  several resolutions, where the original always fails; pixels of the views (kind `seedx_anyres`);
  cases with requests and responses that are not in tests/golden/data.
"""

import io
import itertools
import json
import random
import tarfile
import tempfile
from collections.abc import Callable, Mapping, MutableSequence, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from kinds.seed_x_agent import seedx_tokenizer
from PIL import Image
from runner import assert_close, assert_same, read_json_lines
from yaml_tables import read_tables

from seed_multimodal.data.decoders import DECODERS, get_decoder, phrases
from seed_multimodal.data.decoders.base import TrainingSequence
from seed_multimodal.data.formats.pairs import similarity_problem
from seed_multimodal.data.stream.config import read_data_settings
from seed_multimodal.data.stream.llm_batches import LlmBatches
from seed_multimodal.errors import ConfigError, DataError
from seed_multimodal.language.tokenizer import MultimodalTokenizer
from seed_multimodal.language.vocabulary import IGNORE_INDEX
from seed_multimodal.recipes.seed_x.data import SeedXDecoder, metadata_of

TABLES = read_tables(__file__)
BATCH = ("input_ids", "attention_mask", "labels")


class Replay:
    """A generator that returns the recorded values in order.

    Shuffles are not recorded; they come from Python's generator with the recorded seed, after the
    same calls.
    """

    def __init__(self, calls: Sequence, name, seed=0):
        self.calls = list(calls)
        self.name = name
        self.random = random.Random(seed)

    def _next(self, kind: str, arguments: list):
        assert self.calls, f"{self.name}: called {kind}{arguments} after the last recorded call"
        recorded_kind, recorded_arguments, result = self.calls.pop(0)
        assert_same((kind, arguments), (recorded_kind, recorded_arguments), f"{self.name}: call")
        return result

    def uniform(self) -> float:
        return self._next("numpy.uniform", [0, 1])

    def choice(self, items: Sequence):
        self.random.choice(items)
        result = self._next("random.choice", [])
        assert result in items, f"{self.name}: {result!r} was chosen, not one of {items!r}"
        return result

    def randint(self, low: int, high: int) -> int:
        self.random.randint(low, high)
        return self._next("random.randint", [low, high])

    def shuffle(self, items: MutableSequence):
        self._next("random.shuffle", [])
        self.random.shuffle(items)


def decoded(decode: Callable[[], Any], rng: Replay, usable: bool):
    """A decoder's sequence with the recorded choices; None: it raised. It may leave out what the
    original does not use, the rest for the reasons in `stricter` only."""
    sequence = None
    try:
        sequence = decode()
        reason = sequence.drop_reason
        assert not rng.calls, f"{rng.name}: recorded random calls left: {rng.calls}"
    except (DataError, ConfigError) as error:
        reason = str(error)
    if reason:
        assert not usable or any(part in reason for part in TABLES["stricter"]), (
            f"{rng.name}: {reason}"
        )
    else:
        assert usable, f"{rng.name}: the original skips it"
    return sequence


def opened_image(size: Sequence[int]) -> Image.Image:
    return Image.new("1", tuple(size))


# ---- SEED-LLaMA


def plain(value):
    """A recorded sample as json: arrays are lists."""
    if isinstance(value, list):
        return [plain(item) for item in value]
    if not isinstance(value, dict):
        return value
    if "__numpy__" in value:
        return plain(value["__numpy__"])
    return {key: plain(item) for key, item in value.items()}


def check_llm(recording):
    tokenizer = MultimodalTokenizer.from_pretrained(recording.folder / "tokenizer")
    check_tokenization(recording.json("tokenization.json"), tokenizer)
    for case in read_json_lines(recording.folder / "cases.jsonl"):
        check_case(case, tokenizer)
    check_pipeline(recording.json("pipeline.json"), tokenizer)


def check_tokenization(expected: dict, tokenizer):
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
        "cases": [tokenized(case["text"], tokenizer) for case in expected["cases"]],
    }
    assert_same(actual, {key: expected[key] for key in actual}, "tokenization")


def tokenized(text, tokenizer) -> dict:
    ids = tokenizer.encode(text)
    return {
        "text": text,
        "ids": ids,
        "ids_with_special_tokens": tokenizer.encode(text, add_bos=True),
        "tokens": tokenizer.tokens(ids),
        "decoded": tokenizer.decode(ids),
        "decoded_skip_special": tokenizer.decode(ids, skip_special_tokens=True),
    }


def pad(sequence: TrainingSequence, max_length, pad_id: int) -> dict[str, list[int]]:
    """The original's row: truncated or padded on the right to `max_length`."""
    ids = sequence.ids[:max_length]
    labels = sequence.labels[:max_length]
    rest = max_length - len(ids)
    return {
        "input_ids": ids + [pad_id] * rest,
        "attention_mask": [1] * len(ids) + [0] * rest,
        "labels": labels + [IGNORE_INDEX] * rest,
    }


def check_case(case, tokenizer):
    function = case["function"].removeprefix("decode_").removesuffix("_for_llm")
    is_record = function in TABLES["of_texts"] or case["key"].endswith(".pkl")
    # Members of a tar that are no records, and metadata, which is not read here.
    if function in TABLES["left_out"] or not is_record or "'metadata'" in str(case.get("error")):
        return
    decoder = TABLES["pretrain" if case["module"] == "train" else "sft"][function]
    name = f"case {case['id']} ({decoder})"
    expected = case.get("output")
    kept = case.get("kept_by_filter")

    # 1. The library's sequence.
    max_length = case["kwargs"].get("max_length")
    if max_length is None and expected and "attention_mask" in expected:
        max_length = len(expected["input_ids"])  # the function's own default
    option_names = DECODERS[decoder].option_names()
    options = {key: value for key, value in case["kwargs"].items() if key in option_names}
    rng = Replay(case["rng_calls"], name, case["seed"])
    built = partial(get_decoder, decoder, tokenizer, options)
    sequence = decoded(lambda: built().decode(plain(case["sample"]), rng, max_length), rng, kept)
    if sequence is None or not sequence.ids or (sequence.drop_reason and kept):
        return

    # 2. The original's row, its text and other fields.
    assert not case.get("error"), f"{name}: the original raised {case['error']}, not {sequence}"
    other = {key: value for key, value in expected.items() if key not in (*BATCH, "filter_flag")}
    assert_same(sequence.extra, other, f"{name}: other fields")
    actual = {"tokens": " ".join(tokenizer.tokens(sequence.ids))}
    if "labels" in expected:
        actual |= pad(sequence, max_length, tokenizer.pad_token_id)
    else:
        actual |= {"input_ids": sequence.ids}
        assert set(sequence.labels) <= {IGNORE_INDEX}, f"{name}: labels"
    wanted = {"input_ids": [], **case, **expected}
    assert_same(actual, {key: wanted[key] for key in actual if key in wanted}, name)


def check_pipeline(recorded, tokenizer):
    """Records on disk → every usable sample, then those samples in batches. The original skips
    the others before it makes batches, the library after."""
    settings = recorded["settings"]
    ratio = settings["reverse_ratio"]
    assert ratio in (0, 1), "pipeline: the direction of samples is random"
    decoder = get_decoder("pretrain.caption", tokenizer, {"reverse_ratio": ratio})
    samples = []
    with tempfile.TemporaryDirectory() as folder:
        for shard, members in recorded["shards"].items():
            usable = []
            for member in members:
                if "sample" not in member:
                    continue
                rng = Replay([["random.choice", [], "{}"], ["numpy.uniform", [0, 1], 0.5]], shard)
                sequence = decoder.decode(member["sample"], rng, settings["max_length"])
                if not sequence.drop_reason:
                    usable.append(member)
                    row = pad(sequence, settings["max_length"], tokenizer.pad_token_id)
                    samples.append({**row, **sequence.extra})
            write_shard(Path(folder, shard), usable)
        samples.sort(key=lambda sample: sample["text"])
        expected = [
            {key: row[key] for key in (*BATCH, "text")}
            for row in recorded["samples_sorted_by_text"]
        ]
        assert_same(samples, expected, "pipeline: samples")
        check_batches(Path(folder), settings, recorded["batched"], samples, tokenizer)


def check_batches(folder, settings, recorded, samples: list[dict], tokenizer):
    """The original's data configuration: shapes of all batches, and their rows in any order."""
    configuration = {
        **settings,
        **recorded["settings"],
        "_target_": f"src.data.torchdata_train.{settings['function']}",
        "data_dir": str(folder),
        "packing": False,
    }
    del configuration["function"]
    shapes = []
    rows = []
    with LlmBatches(read_data_settings(configuration), tokenizer) as batches:
        for batch in itertools.islice(batches, len(recorded["batches"]) + 1):
            tensors = [getattr(batch, key) for key in BATCH]
            shapes.append({key: [*t.shape] for key, t in zip(BATCH, tensors, strict=True)})
            rows += zip(*(tensor.tolist() for tensor in tensors), strict=True)
    wanted = [{key: batch[key] for key in BATCH} for batch in recorded["batches"]]
    assert_same(shapes, wanted, "pipeline: batches")
    once = [tuple(sample[key] for key in BATCH) for sample in samples]
    repeated = once * recorded["settings"]["cycle_count"]
    assert_same(sorted(rows), sorted(repeated), "pipeline: rows of all batches")


def write_shard(path, members: Sequence[dict]):
    """A tar with the recorded samples as json."""
    with tarfile.open(path, "w") as tar:
        for member in members:
            data = json.dumps(member["sample"]).encode()
            entry = tarfile.TarInfo(member["member"].replace(".pkl", ".json"))
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))


# ---- SEED-X


class SeedXReplay(Replay):
    """With choices from lists that are only in the recording."""

    def choice(self, items: Sequence):
        result = self._next("random.choice", [])
        assert result or items[-1] == result, f"{self.name}: the last response is empty"
        return result


def check_seedx(recording):
    constants = recording.json("constants.json")
    sentences = {
        "num_gen_prompts": phrases.SEEDX_DRAW_REQUESTS,
        "num_gen_prompt_responses": phrases.SEEDX_DRAW_RESPONSES,
        "num_edit_responses": phrases.SEEDX_EDIT_RESPONSES,
    }
    for count, options in sentences.items():
        assert_same(len(options), constants[count], count)
    # The recorded number of tokens of an image, which tells the ids of all later tokens.
    tokenizer = seedx_tokenizer(recording.folder, constants["image_tokens"])
    ids = {word: tokenizer.token_id(word) for word in constants["token_ids"]}
    assert_same(ids, constants["token_ids"], "ids of words")
    for index, case in enumerate(read_json_lines(recording.folder / "cases.jsonl")):
        case["name"] = f"case {index} ({case['function']}: {case['label']})"
        SEED_X[case["function"]](case, tokenizer)


def make(name, tokenizer, kwargs: Mapping, grids: list[str]) -> SeedXDecoder:
    """A decoder with the options of an original function. `grids`: if it has none of its own."""
    options = {
        "multi_resolution": False,
        **{key: value for key, value in kwargs.items() if key not in TABLES["no_options"]},
        "resolution_grids": kwargs.get("resolution_grids") or grids,
    }
    decoder = get_decoder(name, tokenizer, options)
    assert isinstance(decoder, SeedXDecoder)
    return decoder


def check_record(case, tokenizer):
    """The fields of a record, with images opened as in the loader."""
    arguments = case["arguments"]
    sizes = arguments["image_sizes"]
    kwargs = dict(case["kwargs"])
    decoder = "seed_x.conversation"
    if case["function"] == "decode_single_turn_edit_data":
        decoder = "seed_x.edit"
        if not kwargs.get("multi_resolution"):  # the original fails
            return
    else:
        kwargs.pop("min_resolution", None)
    built = make(decoder, tokenizer, kwargs, ["1x1"])

    def open_image(value: str, field: str):
        size = sizes.get(value.lstrip("/"))
        if size is None and "null" not in value:
            raise FileNotFoundError(value)
        return value if size is None else opened_image(size)

    try:
        fields = built.open_images(dict(arguments["value"]), open_image)
    except FileNotFoundError:
        assert_same(case["output"], {}, f"{case['name']}: a missing image")
    else:
        compare(built, fields, case)


def compare(decoder: SeedXDecoder, fields: Mapping, case):
    """A decoder's sequence and the original's row, without pixels."""
    expected = case["output"]
    max_length = case["kwargs"]["max_length"]
    rng = SeedXReplay(case["rng_calls"], case["name"])
    usable = "input_ids" in expected
    sequence = decoded(lambda: decoder.decode(fields, rng, max_length), rng, usable)
    if sequence is None or sequence.drop_reason:
        return
    images = sequence.images
    read = []
    drawn = []
    for image in images:
        read += [not image.is_target] * image.views
        # Of an output image only the whole is drawn, its last view.
        drawn += [False] * (image.views - 1) + [image.is_target]
    tokens = decoder.tokenizer.tokens(sequence.ids[:max_length])
    actual = {
        **pad(sequence, max_length, decoder.tokenizer.pad_token_id),
        "ids_gen_mask": sorted(p for p in sequence.target_positions if p < max_length),
        "ids_cmp_mask": sorted(p for p in sequence.input_positions if p < max_length),
        "embeds_cmp_mask": read or None,
        "embeds_gen_mask": drawn or None,
        "images_patch_length": [image.views for image in images],
        "image_size": [list(image.image.size) for image in images],
        "tokens": " ".join(tokens),
        **sequence.extra,
    }
    wanted = {**case, **expected}
    for key in ("embeds_gen_mask", "embeds_cmp_mask"):
        if isinstance(wanted[key], bool):
            wanted[key] = [wanted[key]]
    if expected.get("image_size") is None:  # then the number of views is not the image's
        actual.pop("image_size")
        actual.pop("images_patch_length")
    assert_same(
        actual, {key: wanted.get(key, actual[key]) for key in actual}, f"{case['name']}: row"
    )
    if expected.get("patch_position") is not None:
        positions = [position for image in images for position in image.positions]
        assert_close(
            positions, expected["patch_position"], 1e-6, what=f"{case['name']}: patch_position"
        )


def check_caption(case, tokenizer):
    """An image with the recorded number of views and its caption."""
    sample = case["arguments"].get("data", {})  # of a grouped sample
    views = sample.get("images_patch_length", case["kwargs"].get("patch_length", 1))
    caption = sample.get("text") or case["arguments"]["caption"]
    fields = {"image": opened_image((500, 450)), "text": caption}
    options = {**case["kwargs"], "multi_resolution": views > 1}
    decoder = make("seed_x.caption", tokenizer, options, TABLES["grids"][views])
    compare(decoder, fields, case)


def check_pair(case, tokenizer):
    """A member of a tar's sample: the sequence of a caption, the filter on an image's size."""
    data = case["arguments"]["data"]
    kwargs = case["kwargs"]
    suffix = Path(case["arguments"]["key"]).suffix
    if suffix == ".jpg" and isinstance(data, dict):
        limits = {"min_resolution": 400, "min_aspect_ratio": 0.666, **kwargs}
        decoder = make("seed_x.caption", tokenizer, limits, ["1x1"])
        image = decoder.opened_image({"image": opened_image(data["image_size"])}, "image")
        assert_same(
            bool(decoder.shape_problem(image)), case["output"] == {}, f"{case['name']}: filter"
        )
        return
    field, of_field = "text", ".txt"
    if kwargs.get("use_caption_in_metadata", False):
        field, of_field = "metadata", ".json"
    # Not members that the pipe ignores, whose length depends on an image of another member, or
    # whose random sentences are not in the recordings from which the library has its own.
    numbers = [result for kind, _, result in case["rng_calls"] if kind == "random.randint"]
    is_known = set(numbers[:1]) <= set(phrases.SEEDX_DRAW_RECORDED)
    if suffix == of_field and "input_ids" in case["output"] and is_known:
        fields = {"image": opened_image((500, 450)), field: data}
        options = {**kwargs, "multi_resolution": False}
        decoder = make("seed_x.caption", tokenizer, options, ["1x1"])
        compare(decoder, fields, case)


def check_similarity(case, tokenizer):
    item = case["arguments"]["item"]
    kwargs = case["kwargs"]
    problem = similarity_problem(metadata_of(item), kwargs["similarity_thr"])
    has_fields = "images" in item and ("text" in item or not kwargs["assure_text"])
    is_usable = has_fields and item.get("filter_flag", True) and not problem
    assert_same(is_usable, case["output"], case["name"])


# Functions of the original → their checks.
SEED_X = {
    "decode_llava_data": check_record,
    "decode_single_turn_edit_data": check_record,
    "encode_caption_input_ids": check_caption,
    "encode_caption_input_ids_v2": check_caption,
    "tokenize_text": check_caption,
    "decode_image_text_pair": check_pair,
    "filter_data_with_similarity": check_similarity,
}
KINDS = {"llm_sequences": check_llm, "seedx_sequences": check_seedx}
