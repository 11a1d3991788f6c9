"""lmms-eval's own program on tiny tasks; runs where lmms-eval is installed."""

from __future__ import annotations

import json
import os
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from real_processes import run_process
from repository import ROOT

FOX = str(ROOT / "images" / "fox.png")
TASK = """
task: toy
dataset_path: json
dataset_kwargs: {{data_files: {{test: {samples}}}}}
test_split: test
doc_to_visual: !function toy.images
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
{more}
"""
FUNCTIONS = """
import json
from PIL import Image

def images(doc):
    return [Image.open(doc['image']).convert('RGB')] if doc['image'] else []

def results(doc, answers):
    [file] = json.loads(answers[0])['images']
    return {'width': Image.open(file).width}
"""
ANSWERED = """
output_type: generate_until
generation_kwargs:
  {max_new_tokens: 16, temperature: 0, top_p: null, do_sample: false, until: ["."]}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
CHOSEN = """
output_type: multiple_choice
doc_to_choice: "{{choices}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
DRAWN = """
output_type: generate_until
process_results: !function toy.results
metric_list: [{metric: width, aggregation: mean, higher_is_better: true}]
"""
pytestmark = [pytest.mark.nightly, pytest.mark.process, pytest.mark.slow]
SYSTEMS = pytest.mark.parametrize("model", ["nano", "nano-x"])


def evaluated(
    folder: Path, task: str, samples: list[dict[str, Any]], model: str, *flags: str
) -> list[dict[str, Any]]:
    """The lines that lmms-eval logs, in the order of the samples."""
    pytest.importorskip("lmms_eval", exc_type=ImportError)
    (folder / "samples.json").write_text("\n".join(map(json.dumps, samples)))
    (folder / "toy.yaml").write_text(TASK.format(samples=folder / "samples.json", more=task))
    (folder / "toy.py").write_text(FUNCTIONS)
    command = (
        f"{sys.executable} -m lmms_eval --model seed --model_args pretrained={model} --tasks toy "
        f"--include_path {folder} --batch_size 3 --output_path {folder}/out --log_samples"
    )
    environment = {**os.environ, "HF_HOME": str(folder / "hub"), "HF_HUB_OFFLINE": "1"}
    run = run_process([*command.split(), *flags], env=environment)
    assert run.returncode == 0, run.stderr[-3000:]
    lines: list[dict[str, Any]] = []
    for file in (folder / "out").rglob("*samples*.jsonl"):
        lines += map(json.loads, file.read_text().splitlines())
    return sorted(lines, key=lambda line: line["doc_id"])


@SYSTEMS
def test_lmms_eval_scores_a_system(model, tmp_path):
    """Answers equal those of `ask`."""
    from seed_multimodal.pipelines.base import MultimodalSystem

    images = [str(file) for file in sorted((ROOT / "images").glob("*.png"))[:5]]
    question = "What is in the picture?"
    system = MultimodalSystem.from_pretrained(model, log=None, load_decoder=False)
    answers = system.ask(images, question, short=False, max_new_tokens=16)
    expected = [text.partition(".")[0].strip() for text in answers]
    samples = [
        {"image": image, "question": question, "answer": answer}
        for image, answer in zip(images, expected, strict=True)
    ]
    lines = evaluated(tmp_path, ANSWERED, samples, model)
    assert [line["filtered_resps"] for line in lines] == expected
    assert len(set(expected)) > 1


@SYSTEMS
def test_lmms_eval_compares_likelihoods(model, tmp_path):
    """As SEED-Bench: the choice with the lowest loss; in the first sample it is right."""
    sample = {"image": FOX, "question": "What is in the picture?"}
    sample["choices"] = ["a dog", "a fox", "three large houses"]
    samples = [{**sample, "answer": answer} for answer in ("a fox", "a dog")]
    lines = evaluated(tmp_path, CHOSEN, samples, model, "--force_simple")
    assert [line["acc"] for line in lines] == [1.0, 0.0]


@SYSTEMS
def test_lmms_eval_receives_images(model, tmp_path):
    """A drawing and an edited image, which equal those of `draw` and `edit`."""
    from PIL import Image, ImageChops

    from seed_multimodal.pipelines.base import MultimodalSystem

    samples = [
        {"question": "a dog", "image": "", "answer": "a dog"},
        {"question": "Put it at night.", "image": FOX, "answer": "a fox"},
    ]
    evaluated(tmp_path, DRAWN, samples, f"{model},image_dir={tmp_path / 'images'}")
    system = MultimodalSystem.from_pretrained(model, log=None)
    for number, image in enumerate((system.draw("a dog"), system.edit(FOX, "Put it at night."))):
        file = tmp_path / "images" / "toy" / f"toy_{number}_0.png"
        assert ImageChops.difference(Image.open(file), image).getbbox() is None


def test_entry_point_names_the_model():
    pytest.importorskip("lmms_eval", exc_type=ImportError)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    module, _, name = project["entry-points"]["lmms_eval.models"]["seed"].partition(":")
    manifest = getattr(__import__(module, fromlist=[name]), name)
    assert manifest.chat_class_path == f"{module}.SeedModel"
    assert manifest.simple_class_path == f"{module}.SimpleSeedModel"
