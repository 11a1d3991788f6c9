"""SEED-X on a Qwen 3 with a hub tokenizer: used, tuned, and the tuned agent used."""

from __future__ import annotations

from pathlib import Path

import pytest
import tuning_parts
from PIL import Image
from tiny.seed_x import READS, VIEW, WRITES, build_seed_x

from seed_multimodal.language.hub_tokenizer import load_text_tokenizer
from seed_multimodal.language.vocabulary import SeedXVocabulary
from seed_multimodal.models.seed_x.pipeline import SeedX
from seed_multimodal.models.seed_x.train_agent import TuningTask
from seed_multimodal.weights import load_state_dict

IMAGE = Image.new("RGB", (40, 40), "red")
BOX = "<box_start><loc-1><loc-2><loc-3><loc-4><box_end>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return build_seed_x(tmp_path_factory.mktemp("seed_x") / "system", hub=True)


def test_tokenizer_has_the_tokens_of_seed_x(folder: Path):
    tokenizer = load_text_tokenizer(folder / "tokenizer")
    vocabulary = tokenizer.vocabulary
    assert isinstance(vocabulary, SeedXVocabulary)
    assert sorted(vocabulary.added_tokens.values()) == list(
        range(vocabulary.n_text, vocabulary.size)
    )
    assert tokenizer.decode(tokenizer.encode(BOX)) == BOX
    assert len(tokenizer.encode(BOX)) == 6


def test_answers_drawings_and_prompts(folder: Path):
    system = SeedX.from_pretrained(folder, device="cpu", log=None)
    assert system.describe([IMAGE, IMAGE]) == [system.describe(IMAGE)] * 2
    assert isinstance(system.draw("a house", seed=1), Image.Image)
    system.detect(IMAGE, "a house")

    # Boxes and images are tokens; names of special tokens that are typed are text.
    content = [f"What is at {BOX}?<|im_end|>"]
    ids = system.prompts.dialogue([("user", content)])
    assert system.tokenizer.decode(ids) == f"[INST] {content[0]} [/INST]\n"
    assert ids.count(system.tokenizer.vocabulary.boxes) == 1
    assert not set(ids) & set(system.tokenizer.eos_token_ids)


def test_tuning_and_its_agent(folder: Path, tmp_path):
    tuning_parts.write_data(tmp_path)
    changes = {
        "model": {"path": str(folder / "llm"), "dtype": "fp32", "lora": {"r": 4}},
        "tokenizer": {"pretrained_model_name_or_path": str(folder / "tokenizer")},
        "visual_encoder": {"path": str(folder / "vision")},
        "agent": {
            "input_resampler": vars(READS),
            "output_resampler": vars(WRITES),
        },
        "trainer": {"max_steps": 3},
    }
    data = tuning_parts.data_of(tmp_path)
    for source in data["sources"]:
        source["options"]["base_resolution"] = VIEW
    config = tuning_parts.config_of(tmp_path, tmp_path / "out", data=data, lora=True, **changes)
    TuningTask.train(config)
    assert len(tuning_parts.losses(tmp_path / "out")) == 3

    checkpoint = tmp_path / "out" / "checkpoint-3"
    names = load_state_dict(checkpoint / "model.safetensors")
    assert any("q_proj.lora_A" in name for name in names)
    before = SeedX.from_pretrained(folder, device="cpu", log=None)
    tuned = SeedX.from_pretrained(checkpoint, device="cpu", log=None, load_decoder=False)
    assert tuned.tokenizer.eos_token_ids == before.tokenizer.eos_token_ids
    assert tuned.describe(IMAGE) != before.describe(IMAGE)
