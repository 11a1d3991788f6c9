"""Every decoder with odd values: a sequence or a named broken record, never another error."""

from __future__ import annotations

import copy
import json
import random
import time
from collections.abc import Iterator
from typing import Any

import pytest
from data_files import jpeg

from seed_multimodal.data.decoders import decoder_names
from seed_multimodal.data.stream.config import read_data_settings
from seed_multimodal.data.stream.mixture import BROKEN, Mixture, SkippedRecord
from seed_multimodal.language.tokenizer import MultimodalTokenizer
from seed_multimodal.models.lavit.processing import LavitTokenizer
from seed_nano.train.words import train_text_tokenizer

CHANGES = 90  # changed records of each decoder
SECONDS = 20  # of a core, for all decoders together
ODD = (
    None,
    True,
    False,
    0,
    -1,
    1.5,
    float("nan"),
    float("inf"),
    10**40,
    "",
    " ",
    "n/a",
    "a" * 5000,
    "\ud83d",
    "[" * 900,
    [],
    [[]],
    [None],
    ["", 1],
    [1.5] * 4,
    {},
    {"a": {}},
    [{}],
    [{"role": "user"}],
)
TEXTS = [
    "USER: red cat ASSISTANT: here [INST] make it blue [/INST] Question: What is it? Answer: a dog."
] * 30
IMAGES = ("seed_x", "lavit")  # decoders that open images
# Options that read more fields than the defaults.
OPTIONS = {
    "seed_x.caption": {"similarity_thr": 0.2, "min_resolution": 2},
    "sft.qa": {"reverse_ratio": 0.5},
    "pretrain.video": {"num_frames": 2},
}


def records(codes: list[int], image: str) -> dict[str, dict[str, Any]]:
    """A valid record for each decoder."""
    answer = {"question": "What is it?", "answer": "A dog."}
    edit = {"source_image_ids": codes, "target_image_ids": codes, "instruction": "make it blue"}
    opened = {"source_image": image, "target_image": image, "instruction": "make it blue"}
    talk = {
        "image_ids": codes,
        "question": "Question: What? Question: Red?",
        "answer": "Answer: a cat Answer: no",
    }
    turns = {"image_ids": codes, "data": ["What is it?", "A dog."]}
    chat = [
        {"role": "user", "content": [{"codes": codes}, "What?"]},
        {"role": "assistant", "content": ["A dog."]},
    ]
    seen = [
        {"role": "user", "content": [{"image": image}, "blue"]},
        {"role": "assistant", "content": ["Here.", {"image": image}]},
    ]
    return {
        "pretrain.caption": {
            "image_ids": codes,
            "views": [codes, codes],
            "text": ["a dog", "one"],
            "metadata": {},
        },
        "pretrain.interleaved": {
            "image_ids": [codes, None],
            "texts": [None, "a dog"],
            "metadata": {},
        },
        "pretrain.video": {"image_ids": codes * 2, "answer": "a dog"},
        "pretrain.text": {"text": "a red dog"},
        "pretrain.edit": edit,
        "pretrain.visual_question": turns,
        "pretrain.text_conversation": {"data": ["red?", "blue."]},
        "sft.qa": {"image_ids": codes, "views": [codes, codes], "text": "a dog", **answer},
        "sft.edit": edit,
        "sft.multi_edit": {"image_ids": codes * 2, "instruction0": "make it blue"},
        "sft.story": {"image_ids": codes * 2, "caption0": "a dog", "caption1": "a cat"},
        "sft.difference": {"image_ids": codes * 2, **answer},
        "sft.interleaved": {"instruction": "a dog", "response": "here"},
        "sft.conversation": talk,
        "sft.video": {"image_ids": codes * 2, **answer},
        "sft.video_conversation": {**talk, "image_ids": codes * 2},
        "sft.visual_question": {
            "image_ids": codes,
            "inputs": "",
            "instruction": "red?",
            "outputs": "no",
        },
        "sft.text_conversation": {"data": ["red?", "blue."]},
        "chat": {"messages": chat, "system": "red"},
        "seed_x.conversation": {"image": image, "data": ["What is it?", "A dog."]},
        "seed_x.caption": {
            "image": image,
            "text": "a dog",
            "similarity": 0.5,
            "all_similarities": [0.3, 0.4],
            "metadata": {"score": 0.3},
        },
        "seed_x.edit": {**opened, "instruction_new": "make it red", "response": "Here."},
        "seed_x.chat": {"messages": seen},
        "lavit.caption": {"image": image, "text": ["a dog", "red"]},
        "lavit.question": {"image": image, **answer},
        "lavit.compose": opened,
    }


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of everything in a record."""
    for key in list(value) if isinstance(value, dict) else range(len(value)):
        yield value, key
        if isinstance(value[key], dict | list):
            yield from places(value[key])


def changed(record: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """The record with one to three odd values, or without one of its fields."""
    record = copy.deepcopy(record)
    for _ in range(rng.randint(1, 3)):
        container, key = rng.choice(list(places(record)) or [(record, "text")])
        if rng.random() < 0.1 and key in container and isinstance(container, dict):
            del container[key]
        else:
            container[key] = copy.deepcopy(rng.choice(ODD))
    return record


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory, tokenizer: MultimodalTokenizer) -> dict[str, MultimodalTokenizer]:
    """Family of decoders -> tokenizer."""
    seed_x = train_text_tokenizer(
        MultimodalTokenizer,
        TEXTS,
        tmp_path_factory.mktemp("seed_x"),
        vocab_size=320,
        n_codes=6,
        tokens_per_image=4,
        n_locations=16,
    )
    lavit = train_text_tokenizer(
        LavitTokenizer,
        TEXTS,
        tmp_path_factory.mktemp("lavit"),
        vocab_size=320,
        n_codes=8,
        tokens_per_image=16,
    )
    return {"seed_x": seed_x, "lavit": lavit, "": tokenizer}


def test_every_decoder_has_a_record_here():
    assert set(records([], "")) == {*decoder_names()}


def test_decode_of_records_with_odd_values(
    tmp_path,
    tokenizers: dict,
    codes,
):
    (tmp_path / "a.jpg").write_bytes(jpeg(0, 24, 16))
    started = time.process_time()
    broken = 0
    for seed, (name, record) in enumerate(records(codes(0), "a.jpg").items()):
        rng = random.Random(seed)
        family = name.partition(".")[0]
        rows = [record, *(changed(record, rng) for _ in range(CHANGES))]
        file = tmp_path / f"{name}.jsonl"
        file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        source = {
            "name": name,
            "files": str(file),
            "decoder": name,
            "options": OPTIONS.get(name, {}),
        }
        tokenizer = tokenizers[family if family in IMAGES else ""]
        mixture = Mixture(read_data_settings({"sources": [source], "length": 4000}), tokenizer)
        assert {
            int(index)
            for position in range(len(rows))
            for index in mixture.sources[0].order.parts(position, 1)[0][1]
        } == set(range(len(rows)))
        for position in range(len(rows)):
            read = mixture.sources[0].read(position)
            (index,) = mixture.sources[0].order.parts(position, 1)[0][1].tolist()
            assert index > 0 or read.pieces, (name, read.note)
            if isinstance(read.note, SkippedRecord) and read.note.kind == BROKEN:
                broken += 1
                assert (
                    f"{name}.jsonl: line {index + 1}" in read.note.location
                    and "\n" not in read.note.location
                )
    assert broken > 200
    assert time.process_time() - started < SECONDS
