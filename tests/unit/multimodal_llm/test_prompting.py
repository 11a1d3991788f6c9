"""Instruction tuning uses the prompt template of the model that is trained."""

from __future__ import annotations

import json

import llm_runs as runs
import pytest

from seed_multimodal.training.llm.config import LlmModelSettings, template_of
from seed_multimodal.training.llm.task import LlmTask


@pytest.mark.parametrize(("width", "template"), [(4096, "vicuna"), (5120, "llama2")])
def test_template_of_a_model(width, template, tmp_path):
    assert template_of(LlmModelSettings(sizes={"hidden_size": width})) == template
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": width}))
    assert template_of(LlmModelSettings(path=str(tmp_path))) == template
    named = LlmModelSettings(sizes={"hidden_size": width}, template="vicuna")
    assert template_of(named) == "vicuna"


@pytest.mark.parametrize(
    ("data", "options", "expected"),
    [
        ({}, {}, "llama2"),
        ({"template": "vicuna"}, {}, "vicuna"),
        ({}, {"template": "vicuna"}, "vicuna"),
    ],
)
def test_read_gives_the_sources_the_template_of_the_model(data, options, expected):
    # Unless the data or the source names one; captions have none.
    source = {"name": "qa", "files": "qa.jsonl", "decoder": "sft.qa", "options": options}
    captions = {"name": "captions", "files": "c.jsonl", "decoder": "pretrain.caption"}
    config = {
        "output_dir": "x",
        "optim": {"learning_rate": 1e-4},
        "trainer": {"device": "cpu"},
        "model": {"sizes": {**runs.SIZES, "hidden_size": 5120}},
        "tokenizer": {"pretrained_model_name_or_path": str(runs.TOKENIZER)},
        "data": {"sources": [source, captions], "length": 160, "rows": 1, **data},
    }
    sources = LlmTask.read(config).data.sources
    assert [source.options.get("template") for source in sources] == [expected, None]
