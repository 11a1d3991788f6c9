"""`LlmBatches`: equal for any number of workers and after any stop.

No sample lost or doubled with another number of processes.
"""

import itertools
import json
import shutil
from collections import Counter

import pytest
import torch
from data_files import lines
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import write_json
from yaml_tables import read_tables

from seed_multimodal.data.stream.config import LlmDataSettings, read_data_settings, read_once
from seed_multimodal.data.stream.llm_batches import LlmBatch, LlmBatches
from seed_multimodal.data.stream.source import open_sources
from seed_multimodal.errors import ConfigError, DataError

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")  # few cores
SIZES = read_tables(__file__)
RECORDS = [*range(66), *range(1000, 1030), *range(2000, 2035), *range(3000, 3050, 5)]


def same(left: LlmBatch, right: LlmBatch) -> bool:
    """Whether two batches are equal to the last bit."""
    equal = True
    for name, value in vars(left).items():
        other = getattr(right, name)
        equal &= torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other
    return equal


def saved(batches: LlmBatches) -> dict:
    """The state as a checkpoint stores it."""
    return json.loads(json.dumps(batches.state_dict()))


OURS = {"kind": "caption", "transform": ""}  # of pre-tokenizing


@pytest.mark.parametrize(
    "second, is_refused",
    [
        ({**OURS, "tokenizer": "aa"}, False),
        ({**OURS, "tokenizer": "bb"}, True),
        ({"tokenizer": "bert"}, False),  # of another program
        (["aa"], False),
    ],
    ids=str,
)
def test_codes_of_two_tokenizers_are_not_mixed(tokenizer, tmp_path, second, is_refused):
    # Their numbers mean different things, and no loss says so. The nearest file counts.
    write_json(tmp_path / "settings.json", {**OURS, "tokenizer": "cc"})
    sources = []
    for name, identity in (("first", {**OURS, "tokenizer": "aa"}), ("second", second)):
        file = lines(tmp_path / name / "a" / "b" / "c.jsonl", [{"text": "a cat"}])
        sources.append({"name": name, "files": str(file), "decoder": "pretrain.text"})
        write_json(tmp_path / name / "settings.json", identity)
    if not is_refused and "kind" not in second:
        (tmp_path / "settings.json").write_text("{} // a comment")
    config = read_data_settings({"sources": sources})
    if is_refused:
        with pytest.raises(DataError, match="first.*second.*name different"):
            open_sources(config, tokenizer)
    else:
        assert len(open_sources(config, tokenizer)) == 2


@pytest.fixture(scope="module")
def read_settings(mixed, tmp_path_factory):
    """`read_settings(packing, cycles, **settings)`: the three sets, and one of which four of five
    records are dropped, padded in micro-batches of their own sizes.
    """
    texts = [{"text": "" if n % 5 else f"number {n}"} for n in range(3000, 3050)]
    path = lines(tmp_path_factory.mktemp("filtered") / "a.jsonl", texts)
    filtered = {"name": "filtered", "files": str(path), "decoder": "pretrain.text", "weight": 2}

    def make(packing: bool, cycles: tuple[int, ...] = (), **options) -> LlmDataSettings:
        config = mixed(packing=packing, **options)
        config["sources"].append(dict(filtered))
        for source in config["sources"]:
            source["max_length"], source["batch_size"] = SIZES[source["name"]]
        for source, count in zip(config["sources"], cycles, strict=False):
            source["cycles"] = count
        return read_data_settings(config)

    return make


def test_next_packed(mixed, tokenizer, sequences, record_numbers):
    # Whole sequences in full rows; the counts are those of the logs.
    batches = LlmBatches(read_data_settings(mixed(rows=3)), tokenizer)
    tokens = 0
    for batch in itertools.islice(batches, 12):
        assert batch.input_ids.shape == batch.labels.shape == (3, 192)
        assert batch.attention_mask is None
        pairs = sequences(batch)
        lengths = [len(ids) for ids, _ in pairs]
        assert len(pairs) == len(record_numbers(batch))
        assert (sum(lengths), sum(n**2 for n in lengths)) == (batch.tokens, batch.squares)
        assert int((batch.labels[:, 1:] != -100).sum()) == batch.learned
        for ids, labels in pairs:
            assert (ids[0], ids[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
            # Pre-training learns the whole sequence.
            assert (labels[0], labels[1:]) == (-100, ids[1:])
        tokens += batch.tokens
    report = batches.report()
    assert (report["tokens"], report["positions"]) == (tokens, 12 * 3 * 192)
    assert tokens > 0.9 * report["positions"]


def test_next_padded(read_settings, tokenizer, record_numbers):
    # As in the original: micro-batches of one source, each row a padded or cut sequence.
    batches = LlmBatches(read_settings(packing=False), tokenizer)
    kinds = Counter[int]()
    for batch in itertools.islice(batches, 25):
        (kind,) = {number // 1000 for number in record_numbers(batch)}
        length, size = list(SIZES.values())[kind]
        assert batch.input_ids.shape == (size, length)
        assert batch.position_ids.tolist() == [list(range(length))] * size
        assert batch.tokens == int(batch.attention_mask.sum())
        kinds[kind] += 1
    assert set(kinds) == {0, 1, 2, 3}
    cut = batches.report()["sources"]["documents"]["skipped"]["too long, cut"]
    assert cut["count"] > 3
    assert "documents/0000000.tar: sample" in cut["first"][0]


@pytest.mark.slow
@settings(max_examples=15)
@given(st.booleans(), st.integers(1, 2), st.integers(0, 90))
def test_restore_continues_exactly(read_settings, tokenizer, packing, world, stop):
    # Stopped anywhere, also behind the end, a rank reads what it would have read.
    options = read_settings(packing, (1, 2, 1, 1), too_long="truncate")
    straight, first, second = (
        LlmBatches(options, tokenizer, rank=world - 1, world=world) for _ in range(3)
    )
    expected = list(straight)
    assert all(map(same, expected[:stop], itertools.islice(first, stop)))
    other_ranks = [
        saved(LlmBatches(options, tokenizer, rank=rank, world=world)) for rank in range(world - 1)
    ]
    state = saved(first)
    sources = [{**source, "counts": None} for source in state["sources"]]
    assert len(json.dumps({**state, "sources": sources})) < 3000
    second.load_state_dict([state, *other_ranks])
    assert saved(second) == state
    rest = list(second)
    assert len(rest) == len(expected[stop:])
    assert all(map(same, expected[stop:], rest))
    assert second.report() == straight.report()


@pytest.mark.slow
@settings(max_examples=12)
@given(
    st.booleans(),
    st.lists(st.tuples(st.integers(1, 4), st.integers(0, 6)), min_size=1, max_size=4),
    st.integers(1, 4),
)
def test_restore_in_any_number_of_processes(
    read_settings, tokenizer, record_numbers, packing, phases, last_world
):
    # Over all changes of the number of processes each record is used as often as its cycles.
    options = read_settings(packing, (1, 2, 1, 1), too_long="truncate")
    reads = Counter[int]()
    states = []
    for world, steps in [*phases, (last_world, 1000)]:
        ranks = [LlmBatches(options, tokenizer, rank=rank, world=world) for rank in range(world)]
        for batches in ranks:
            if states:
                batches.load_state_dict(states[::-1])
            # Ranks may differ by some steps.
            for batch in itertools.islice(batches, steps + batches.stream.rank):
                reads.update(record_numbers(batch))
        states = [saved(batches) for batches in ranks]
    assert reads == {number: (1, 2, 1, 1)[number // 1000] for number in RECORDS}
    # So are the counts, whichever records were read again since they waited to be packed.
    counts = [source["counts"] for state in states for source in state["sources"]]
    assert sum(count["sequences"] for count in counts) == reads.total()
    assert sum(count["draws"] for count in counts) == 66 + 2 * 30 + 35 + 50
    skipped = Counter[str]()
    for count in counts:
        skipped.update({reason: entry["count"] for reason, entry in count["skipped"].items()})
    once = LlmBatches(options, tokenizer)
    assert len(list(once))
    for source in once.report()["sources"].values():
        skipped.subtract({reason: entry["count"] for reason, entry in source["skipped"].items()})
    assert not any(skipped.values())


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.parametrize("packing, workers, stop", [(True, 3, 31), (False, 1, 7)])
def test_restore_with_workers(read_settings, tokenizer, packing, workers, stop, no_workers_left):
    options = read_settings(packing, rows=2)
    expected = list(itertools.islice(LlmBatches(options, tokenizer), stop + 9))
    with LlmBatches(options, tokenizer, workers=workers) as first:
        generator = torch.random.get_rng_state()
        assert all(map(same, expected[:stop], itertools.islice(first, stop)))
        # Loading does not use the generator that a training draws from.
        assert torch.equal(torch.random.get_rng_state(), generator)
        state = saved(first)
    with LlmBatches(options, tokenizer, workers=workers) as second:
        second.load_state_dict([state])
        assert all(map(same, expected[stop:], second))


def test_restore_with_other_data(mixed, tokenizer, tmp_path):
    # Else records would be skipped or read twice without a word.
    config = mixed()
    ranks = [
        LlmBatches(read_data_settings(config), tokenizer, rank=rank, world=2) for rank in range(2)
    ]
    states = [saved(batches) for batches in ranks]
    with pytest.raises(ConfigError):
        ranks[0].load_state_dict(states[:1])
    for change, named in (
        ({"seed": 7}, "seed"),
        ({"length": 256}, "length"),
        ({"sources": config["sources"][::-1]}, "source texts"),
    ):
        batches = LlmBatches(read_data_settings(config | change), tokenizer)
        with pytest.raises(ConfigError, match=named):
            batches.load_state_dict(states)
    # Weights may change during a run.
    config["sources"][0]["weight"] = 9
    LlmBatches(read_data_settings(config), tokenizer).load_state_dict(states)

    # The same records elsewhere, and others in their place.
    texts = config["sources"][2]
    folder = shutil.copytree(texts["files"], tmp_path / "texts")
    texts["files"] = str(folder)
    LlmBatches(read_data_settings(config), tokenizer).load_state_dict(states)
    for file in folder.iterdir():
        file.write_bytes(file.read_bytes().replace(b"number", b"letter"))
    with pytest.raises(ConfigError, match="checksums.texts"):
        LlmBatches(read_data_settings(config), tokenizer).load_state_dict(states)


@pytest.mark.parametrize("packing", [True, False])
def test_held_out_data_is_read_once(read_settings, tokenizer, record_numbers, packing):
    # By any number of processes, whatever the cycles of its sources: else a loss is biased.
    options = read_once(read_settings(packing))
    learned = set()
    for world in (1, 2, 3):
        ranks = [LlmBatches(options, tokenizer, rank=rank, world=world) for rank in range(world)]
        batches = list(itertools.chain.from_iterable(ranks))
        reads = Counter(itertools.chain.from_iterable(map(record_numbers, batches)))
        assert reads == dict.fromkeys(RECORDS, 1)
        learned.add(sum(batch.learned for batch in batches))
    assert len(learned) == 1
