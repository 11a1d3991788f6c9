"""Fixtures of the data tests: JPEG noise, shards of pairs, data of the LLM, the nano tokenizer.

Each record of the LLM's data contains its number in its text, `number N`.
"""

import itertools
import random
import re
from pathlib import Path

import pytest
from data_files import jpeg, lines, shard, write_tar
from repository import NANO

from seed_multimodal import MultimodalTokenizer


@pytest.fixture(scope="session")
def shards(tmp_path_factory) -> Path:
    """Folder with s-000.tar .. s-003.tar of 13, 7, 1 and 19 samples.

    Their keys are NNNNN, their captions `Picture N.`.
    """
    folder = tmp_path_factory.mktemp("shards")
    indices = iter(range(40))
    for part, size in enumerate((13, 7, 1, 19)):
        samples = []
        for index in itertools.islice(indices, size):
            caption = f"Picture {index}."
            members = {"jpg": jpeg(index), "json": {"caption": caption}, "txt": f"{caption}\n"}
            samples.append({"__key__": f"{index:05d}", **members})
        write_tar(folder / f"s-{part:03d}.tar", samples)
    return folder


@pytest.fixture(scope="session")
def tokenizer() -> MultimodalTokenizer:
    """The nano tokenizer."""
    return MultimodalTokenizer.from_pretrained(NANO / "seed_tokenizer")


@pytest.fixture(scope="session")
def codes(tokenizer):
    """`codes(n)`: the codes of image n."""

    def make(index) -> list[int]:
        vocabulary = tokenizer.vocabulary
        rng = random.Random(index)
        return [rng.randrange(vocabulary.n_codes) for _ in range(vocabulary.tokens_per_image)]

    return make


@pytest.fixture(scope="session")
def sets(tmp_path_factory, codes) -> Path:
    """Folders of records, by number.

    captions/     three tars of 40, 25 and 1 records, 0..65
    documents/    one tar, 1000..1029, two images each
    texts/        two jsonl of 20 and 15 records, 2000..2034
    """
    folder = tmp_path_factory.mktemp("sets")
    indices = iter(range(66))
    for part, size in enumerate((40, 25, 1)):
        captions = [
            {"image_ids": codes(n), "text": f"number {n}" + " and so on" * (n % 5)}
            for n in itertools.islice(indices, size)
        ]
        shard(folder / "captions" / f"part-{part:04d}" / "0000000.tar", captions)
    documents = [
        {
            "image_ids": [codes(n), None, codes(n + 1), None],
            "texts": [None, f"number {n}", None, "more words" * (n % 7)],
        }
        for n in range(1000, 1030)
    ]
    shard(folder / "documents" / "0000000.tar", documents)
    texts = [{"text": f"number {n}" + " of them" * (n % 20)} for n in range(2000, 2035)]
    lines(folder / "texts" / "a.jsonl", texts[:20])
    lines(folder / "texts" / "b.jsonl", texts[20:])
    return folder


@pytest.fixture(scope="session")
def mixed(sets):
    """`mixed(**settings)`: a configuration of the three sets with weights 4, 1 and 2."""
    names = ("captions", "documents", "texts")
    decoders = ("pretrain.caption", "pretrain.interleaved", "pretrain.text")

    def make(**settings) -> dict:
        sources = [
            {"name": name, "files": str(sets / name), "decoder": decoder, "weight": weight}
            for name, decoder, weight in zip(names, decoders, (4, 1, 2), strict=True)
        ]
        return {"sources": sources, "length": 192, **settings}

    return make


@pytest.fixture(scope="session")
def sequences():
    """`sequences(batch)`: the (ids, labels) of a batch without padding.

    A sequence starts at position 0.
    """

    def cut(batch) -> list[tuple[list[int], list[int]]]:
        pairs = []
        for ids, labels, positions in zip(
            batch.input_ids.tolist(),
            batch.labels.tolist(),
            batch.position_ids.tolist(),
            strict=True,
        ):
            starts = [index for index, position in enumerate(positions) if position == 0]
            starts.append(len(ids))
            for start, end in zip(starts, starts[1:], strict=False):
                sequence = ids[start:end]
                while sequence and sequence[-1] == 0:  # only padding is 0 here
                    sequence.pop()
                if sequence:
                    pairs.append((sequence, labels[start : start + len(sequence)]))
        return pairs

    return cut


@pytest.fixture(scope="session")
def record_numbers(tokenizer, sequences):
    """`numbers(batch)`: the record numbers of a batch's sequences, in order."""

    def read(batch) -> list[int]:
        return [
            int(re.search(r"number (\d+)", tokenizer.decode(ids))[1]) for ids, _ in sequences(batch)
        ]  # type: ignore

    return read
