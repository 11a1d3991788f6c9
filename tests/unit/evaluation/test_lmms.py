"""lmms-eval's own program on a tiny task; runs where lmms-eval is installed."""

from __future__ import annotations

import json
import os
import sys

import pytest
from real_processes import run_process
from repository import ROOT

TASK = """
task: toy
dataset_path: json
dataset_kwargs: {data_files: {test: SAMPLES}}
test_split: test
doc_to_visual: !function toy.images
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
output_type: generate_until
generation_kwargs:
  {max_new_tokens: 16, temperature: 0, top_p: null, do_sample: false, until: ["."]}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
FUNCTIONS = """
from PIL import Image

def images(doc):
    return [Image.open(doc['image']).convert('RGB')]
"""


@pytest.mark.nightly
@pytest.mark.process
@pytest.mark.slow
def test_lmms_eval_scores_a_system(tmp_path):
    # lmms-eval finds `seed` by its entry point; answers equal those of `ask`.
    pytest.importorskip("lmms_eval", exc_type=ImportError)
    from seed_multimodal.pipelines.base import MultimodalSystem

    images = [str(file) for file in sorted((ROOT / "images").glob("*.png"))[:5]]
    question = "What is in the picture?"
    system = MultimodalSystem.from_pretrained("nano", log=None, load_decoder=False)
    answers = system.ask(images, question, short=False, max_new_tokens=16)
    expected = [text.partition(".")[0].strip() for text in answers]
    samples = [
        {"image": image, "question": question, "answer": answer}
        for image, answer in zip(images, expected, strict=True)
    ]
    (tmp_path / "samples.json").write_text("\n".join(map(json.dumps, samples)))
    (tmp_path / "toy.yaml").write_text(TASK.replace("SAMPLES", str(tmp_path / "samples.json")))
    (tmp_path / "toy.py").write_text(FUNCTIONS)
    command = (
        f"{sys.executable} -m lmms_eval --model seed --model_args pretrained=nano --tasks toy "
        f"--include_path {tmp_path} --batch_size 3 --output_path {tmp_path}/out --log_samples"
    )
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    run = run_process(command.split(), env=environment)
    assert run.returncode == 0, run.stderr[-3000:]
    [file] = (tmp_path / "out").rglob("*samples*.jsonl")
    lines = sorted(map(json.loads, file.read_text().splitlines()), key=lambda row: row["doc_id"])
    assert [line["filtered_resps"] for line in lines] == expected
    assert len(set(expected)) > 1
