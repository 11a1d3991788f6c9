"""Instruction tuning uses the prompt template of the model that is trained."""

import llm_runs as runs
import pytest
from tiny import write_json

from seed_multimodal.training.llm.task import LlmTask


@pytest.mark.parametrize(
    "width, template, data, options, expected",
    [
        (4096, None, {}, {}, "vicuna"),
        (5120, None, {}, {}, "llama2"),
        (5120, "vicuna", {}, {}, "vicuna"),
        (5120, None, {"template": "vicuna"}, {}, "vicuna"),
        (5120, None, {}, {"template": "vicuna"}, "vicuna"),
    ],
)
def test_read_gives_the_sources_the_template_of_the_model(
    width, template, data, options, expected, tmp_path
):
    # That of the 7B or 13B by its width, unless the model, the data or the source names one;
    # captions have none.
    write_json(tmp_path / "config.json", {"hidden_size": width})
    data = {**runs.write_data(tmp_path, runs.CODES, runs.PER_IMAGE), **data}
    data["sources"][1]["options"] = options
    config = {
        "output_dir": "x",
        "optim": runs.OPTIM,
        "trainer": runs.TRAINER,
        "model": {"path": str(tmp_path), "template": template},
        "tokenizer": {"pretrained_model_name_or_path": str(runs.TOKENIZER)},
        "data": data,
    }
    sources = LlmTask.run_type.read(config).data.sources
    assert [source.options.get("template") for source in sources] == [None, expected]
