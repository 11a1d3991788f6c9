"""Instruction tuning uses the prompt template of the model that is trained."""

from __future__ import annotations

import itertools
import json

import llm_runs as runs
import pytest

from seed_multimodal.config import load_yaml
from seed_multimodal.data.stream.llm_batches import LlmBatches
from seed_multimodal.language.tokenizer import MultimodalTokenizer
from seed_multimodal.training.llm.config import LlmModelSettings, read_model_settings, template_of
from seed_multimodal.training.llm.task import LlmTask


@pytest.fixture
def questions(tmp_path) -> dict:
    """A configuration of questions and captions."""
    for name in ("qa", "captions"):
        record = {
            "image_ids": [32 * place for place in range(32)],
            "question": "What?",
            "answer": "a fox",
            "text": "a",
        }
        (tmp_path / f"{name}.jsonl").write_text(f"{json.dumps(record)}\n" * 8)
    return {
        "sources": [
            {"name": "qa", "files": str(tmp_path / "qa.jsonl"), "decoder": "sft.qa"},
            {
                "name": "captions",
                "files": str(tmp_path / "captions.jsonl"),
                "decoder": "pretrain.caption",
            },
        ],
        "length": 160,
        "rows": 1,
    }


def test_template_of_a_model(tmp_path):
    original = load_yaml(runs.APPLICATION / "configs" / "model" / "llama2_13b_lora.yaml")
    assert template_of(read_model_settings(original)) == "llama2"
    assert template_of(LlmModelSettings(path=str(tmp_path))) == "vicuna"  # no config.json
    for width, template in ((4096, "vicuna"), (5120, "llama2")):
        assert template_of(LlmModelSettings(sizes={"hidden_size": width})) == template
        (tmp_path / "config.json").write_text(json.dumps({"hidden_size": width}))
        assert template_of(LlmModelSettings(path=str(tmp_path))) == template
    assert template_of(LlmModelSettings(sizes={"hidden_size": 5120}, template="vicuna")) == "vicuna"


def test_read_gives_the_sources_the_template_of_the_model(
    questions,
):
    sizes = {**runs.SIZES, "hidden_size": 5120}
    config = {
        "output_dir": "x",
        "optim": {"learning_rate": 1e-4},
        "trainer": {"device": "cpu"},
        "model": {"sizes": sizes},
        "tokenizer": {"pretrained_model_name_or_path": str(runs.TOKENIZER)},
    }
    data = LlmTask.read({**config, "data": questions}).data
    assert [source.options for source in data.sources] == [{"template": "llama2"}, {}]
    words = MultimodalTokenizer.from_pretrained(runs.TOKENIZER)
    batches = LlmBatches(data, words)
    assert any(
        "[INST]" in words.decode(batch.input_ids[0].tolist())
        for batch in itertools.islice(batches, 4)
    )
    source = {**questions["sources"][0], "options": {"template": "vicuna"}}
    for other in ({"template": "vicuna"}, {"sources": [source]}):
        assert (
            LlmTask.read({**config, "data": {**questions, **other}})
            .data.sources[0]
            .options["template"]
            == "vicuna"
        )
