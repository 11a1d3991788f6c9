"""Instruction tuning asks in the prompts of the model that is trained, and says where something else asks otherwise."""

from __future__ import annotations

import itertools
import json

import pytest

from seed_multimodal.config import load_yaml
from seed_multimodal.data.stream.config import read_data_settings
from seed_multimodal.data.stream.llm_batches import LlmBatches
from seed_multimodal.language.tokenizer import MultimodalTokenizer
from seed_multimodal.training.llm.config import LlmModelSettings, read_model_settings, template_of, with_prompts


@pytest.fixture
def questions(tmp_path) -> dict:
    """A configuration of questions and captions."""
    for name in ("qa", "captions"):
        record = {"image_ids": [32 * place for place in range(32)], "question": "What?", "answer": "a fox", "text": "a"}
        (tmp_path / f"{name}.jsonl").write_text(f"{json.dumps(record)}\n" * 8)
    return {"sources": [
        {"name": "qa", "files": str(tmp_path / "qa.jsonl"), "decoder": "sft.qa"},
        {"name": "captions", "files": str(tmp_path / "captions.jsonl"), "decoder": "pretrain.caption"}],
        "length": 160, "rows": 1}


def test_the_template_is_that_of_the_model(runs, tmp_path):
    released = load_yaml(runs.APPLICATION / "configs" / "model" / "llama2_13b_lora.yaml")
    assert template_of(read_model_settings(released)) == "llama2"
    assert template_of(LlmModelSettings(path=str(tmp_path))) == "vicuna"  # no config.json
    for width, template in ((4096, "vicuna"), (5120, "llama2")):
        assert template_of(LlmModelSettings(sizes={"hidden_size": width})) == template
        (tmp_path / "config.json").write_text(json.dumps({"hidden_size": width}))
        assert template_of(LlmModelSettings(path=str(tmp_path))) == template
    assert template_of(LlmModelSettings(sizes={"hidden_size": 5120}, template="vicuna")) == "vicuna"


def test_what_asks_otherwise_is_said(questions, runs, tmp_path):
    fourteen = LlmModelSettings(sizes={"hidden_size": 5120})
    data, said = with_prompts(read_data_settings(questions), fourteen, tmp_path)
    assert said == ["questions and answers are in the prompts of llama2."]
    assert [source.options for source in data.sources] == [{"template": "llama2"}, {}]
    words = MultimodalTokenizer.from_pretrained(runs.TOKENIZER)
    batches = LlmBatches(data, words)
    assert any("[INST]" in words.decode(batch.input_ids[0].tolist()) for batch in itertools.islice(batches, 4))

    _, said = with_prompts(read_data_settings(questions), fourteen, runs.TOKENIZER)  # nano's system asks as Vicuna
    assert "system.json asks with the template vicuna, and this run tunes with llama2" in said[1]
    given = read_data_settings({**questions, "template": "vicuna"})
    data, said = with_prompts(given, fourteen, tmp_path)
    assert data.sources[0].options == {"template": "vicuna"}
    assert said[1] == ("warning: the source qa has the template vicuna, but the model that is trained has llama2 "
                       "(model.template).")
    questions["sources"][0]["options"] = {"template": "llama2"}
    assert len(with_prompts(read_data_settings(questions), fourteen, tmp_path)[1]) == 1
    captions = read_data_settings({**questions, "sources": questions["sources"][1:]})
    assert with_prompts(captions, fourteen, runs.TOKENIZER)[1] == []
