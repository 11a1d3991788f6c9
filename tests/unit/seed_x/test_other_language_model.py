"""SEED-X on a Qwen 3 with a hub tokenizer: used, tuned, and the tuned agent used."""

from __future__ import annotations

from pathlib import Path

import pytest
from random_images import noise
from tiny.seed_x import READS, VIEW, WRITES, build_seed_x

from seed_multimodal.models.seed_x.pipeline import SeedX

IMAGE = noise(1)
BOX = "<box_start><loc-1><loc-2><loc-3><loc-4><box_end>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return build_seed_x(tmp_path_factory.mktemp("seed_x") / "system", hub=True)


def test_tokens_prompts_and_answers(folder):
    system = SeedX.from_pretrained(folder, device="cpu", log=None)
    tokenizer = system.tokenizer
    vocabulary = tokenizer.vocabulary
    added = sorted(vocabulary.added_tokens.values())
    assert added == list(range(vocabulary.n_text, vocabulary.size))
    assert len(tokenizer.encode(BOX)) == 6
    assert system.describe([IMAGE, IMAGE]) == [system.describe(IMAGE)] * 2
    assert system.draw("a house", seed=1).size

    # Boxes and images are tokens; names of special tokens that are typed are text: a user could
    # end the system's turn.
    content = f"What is at {BOX}?<|im_end|>"
    ids = system.prompts.dialogue([("user", [content])])
    assert tokenizer.decode(ids) == f"[INST] {content} [/INST]\n"
    assert ids.count(vocabulary.boxes) == 1
    assert not set(ids) & set(tokenizer.eos_token_ids)


@pytest.mark.slow
def test_tuning_and_its_agent(folder, tmp_path):
    import tuning_parts

    from seed_multimodal.models.seed_x.train_agent import TuningTask
    from seed_multimodal.weights import load_state_dict

    tuning_parts.write_data(tmp_path)
    data = tuning_parts.data_of(tmp_path)
    for source in data["sources"]:
        source["options"]["base_resolution"] = VIEW
    changes = {
        "model": {"path": str(folder / "llm"), "dtype": "fp32", "lora": {"r": 4}},
        "tokenizer": {"pretrained_model_name_or_path": str(folder / "tokenizer")},
        "visual_encoder": {"path": str(folder / "vision")},
        "agent": {"input_resampler": vars(READS), "output_resampler": vars(WRITES)},
        "trainer": {"max_steps": 3},
    }
    out = tmp_path / "out"
    TuningTask.train(tuning_parts.config_of(tmp_path, out, data=data, lora=True, **changes))
    names = load_state_dict(out / "checkpoint-3" / "model.safetensors")
    assert any("q_proj.lora_A" in name for name in names)
    options = {"device": "cpu", "log": None, "load_decoder": False}
    before = SeedX.from_pretrained(folder, **options)
    tuned = SeedX.from_pretrained(out / "checkpoint-3", **options)
    assert tuned.tokenizer.eos_token_ids == before.tokenizer.eos_token_ids
    assert tuned.describe(IMAGE) != before.describe(IMAGE)
