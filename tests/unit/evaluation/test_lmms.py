"""lmms-eval's own program on a tiny task; runs where lmms-eval is installed."""

from __future__ import annotations

import json
import os
import sys
import tomllib

import pytest
from real_processes import run_process
from repository import ROOT

pytest.importorskip("lmms_eval", exc_type=ImportError)
TASK = """
task: pictures
dataset_path: json
dataset_kwargs: {{data_files: {{test: {samples}}}}}
test_split: test
output_type: generate_until
doc_to_visual: !function pictures.images
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs:
  {{max_new_tokens: 16, temperature: 0, top_p: null, do_sample: false, until: ["."]}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""
IMAGES = (
    "from PIL import Image\n\ndef images(doc):\n"
    "    return [Image.open(doc['image']).convert('RGB')]\n"
)


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.timeout(300)
@pytest.mark.parametrize("model", ["nano", "nano-x", "nano-lavit"])
def test_lmms_eval_scores_a_system(model, tmp_path):
    """Answers equal those of `ask`."""
    from PIL import Image

    from seed_multimodal.pipelines.base import MultimodalSystem

    images = sorted((ROOT / "images").glob("*.png"))[:5]
    question = "What is in this picture? Answer in a word."
    system = MultimodalSystem.from_pretrained(model, log=None, load_decoder=False)
    loaded = [Image.open(file).convert("RGB") for file in images]
    answers = system.ask(loaded, question, short=False, max_new_tokens=16)
    expected = [text.partition(".")[0].strip() for text in answers]
    samples = tmp_path / "samples.json"
    samples.write_text(
        "\n".join(
            json.dumps({"image": str(file), "question": question, "answer": answer})
            for file, answer in zip(images, expected, strict=True)
        )
    )
    (tmp_path / "pictures.yaml").write_text(TASK.format(samples=samples))
    (tmp_path / "pictures.py").write_text(IMAGES)
    run = run_process(
        (
            f"{sys.executable} -m lmms_eval --model seed --model_args pretrained={model} "
            f"--tasks pictures --include_path {tmp_path} --batch_size 3 "
            f"--output_path {tmp_path / 'out'} --log_samples"
        ).split(),
        env={**os.environ, "HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"},
    )
    assert run.returncode == 0, run.stderr[-3000:]
    lines = [
        json.loads(line)
        for file in (tmp_path / "out").rglob("*samples*.jsonl")
        for line in file.read_text().splitlines()
    ]
    answered = {line["doc_id"]: line["filtered_resps"] for line in lines}
    assert [answered[row] for row in range(len(images))] == expected, expected
    assert len(set(expected)) > 1


def test_entry_point_names_the_model():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    module, _, name = project["entry-points"]["lmms_eval.models"]["seed"].partition(":")
    manifest = getattr(__import__(module, fromlist=[name]), name)
    assert manifest.chat_class_path == f"{module}.SeedModel"
