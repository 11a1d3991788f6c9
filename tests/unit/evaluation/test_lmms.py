"""lmms-eval's own program on a tiny task; runs where lmms-eval is installed."""

from __future__ import annotations

import json
import os
import sys
import tomllib
from pathlib import Path

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


def evaluated(folder: Path, model: str, *flags: str, task: str = "pictures") -> list[dict]:
    """The lines that lmms-eval logs."""
    run = run_process(
        [
            *(
                f"{sys.executable} -m lmms_eval --model seed --model_args pretrained={model} "
                f"--tasks {task} --include_path {folder} --batch_size 3 "
                f"--output_path {folder / 'out'} --log_samples"
            ).split(),
            *flags,
        ],
        env={**os.environ, "HF_HOME": str(folder / "hub"), "HF_HUB_OFFLINE": "1"},
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return [
        json.loads(line)
        for file in (folder / "out").rglob("*samples*.jsonl")
        for line in file.read_text().splitlines()
    ]


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.timeout(300)
@pytest.mark.parametrize("model", ["nano", "nano-x", "nano-lavit"])
def test_lmms_eval_scores_a_system(model, tmp_path):
    """Answers equal those of `ask`."""
    from PIL import Image

    from seed_multimodal.pipelines.base import MultimodalSystem

    images = sorted((ROOT / "images").glob("*.png"))[:5]
    question = "What is in the picture?"
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
    lines = evaluated(tmp_path, model)
    answered = {line["doc_id"]: line["filtered_resps"] for line in lines}
    assert [answered[row] for row in range(len(images))] == expected, expected
    assert len(set(expected)) > 1


CHOICES = """
task: choices
dataset_path: json
dataset_kwargs: {{data_files: {{test: {samples}}}}}
test_split: test
output_type: multiple_choice
doc_to_visual: !function pictures.images
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.timeout(300)
@pytest.mark.parametrize("model", ["nano", "nano-x"])
def test_lmms_eval_compares_likelihoods(model, tmp_path):
    """As SEED-Bench: the choice with the lowest loss; here the second one is right."""
    choices = ["a dog", "a fox", "three large houses"]
    sample = {"image": str(ROOT / "images" / "fox.png"), "question": "What is in the picture?"}
    sample |= {"choices": choices, "answer": "a fox"}
    other = {**sample, "answer": "a dog"}
    samples = tmp_path / "samples.json"
    samples.write_text("\n".join(map(json.dumps, (sample, other))))
    (tmp_path / "choices.yaml").write_text(CHOICES.format(samples=samples))
    (tmp_path / "pictures.py").write_text(IMAGES)
    lines = evaluated(tmp_path, model, "--force_simple", task="choices")
    assert [line["acc"] for line in sorted(lines, key=lambda line: line["doc_id"])] == [1.0, 0.0]


DRAWINGS = """
task: drawings
dataset_path: json
dataset_kwargs: {{data_files: {{test: {samples}}}}}
test_split: test
output_type: generate_until
doc_to_visual: !function drawings.images
doc_to_text: "{{{{text}}}}"
doc_to_target: "{{{{text}}}}"
process_results: !function drawings.results
metric_list:
  - {{metric: drawn, aggregation: mean, higher_is_better: true}}
  - {{metric: edited, aggregation: mean, higher_is_better: true}}
"""
DRAWING_FUNCTIONS = """
import json
from PIL import Image

def images(doc):
    return [Image.open(doc['image'])] if doc['image'] else []

def results(doc, answers):
    answer = json.loads(answers[0])
    [file] = answer['images']
    return {'drawn': Image.open(file).width / 64, 'edited': float(bool(doc['image']))}
"""


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.timeout(300)
@pytest.mark.parametrize("model", ["nano", "nano-x"])
def test_lmms_eval_receives_images(model, tmp_path):
    """A drawing and an edited image, which equal those of `draw` and `edit`."""
    from PIL import Image, ImageChops

    from seed_multimodal.pipelines.base import MultimodalSystem

    fox = ROOT / "images" / "fox.png"
    rows = [{"text": "a dog", "image": ""}, {"text": "Put it at night.", "image": str(fox)}]
    samples = tmp_path / "samples.json"
    samples.write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "drawings.yaml").write_text(DRAWINGS.format(samples=samples))
    (tmp_path / "drawings.py").write_text(DRAWING_FUNCTIONS)
    lines = evaluated(tmp_path, f"{model},image_dir={tmp_path / 'images'}", task="drawings")
    lines.sort(key=lambda line: line["doc_id"])
    assert [line["edited"] for line in lines] == [0.0, 1.0]
    system = MultimodalSystem.from_pretrained(model, log=None)
    drawn = (system.draw("a dog"), system.edit(Image.open(fox), "Put it at night."))
    for number, image in enumerate(drawn):
        file = tmp_path / "images" / "drawings" / f"drawings_{number}_0.png"
        assert ImageChops.difference(Image.open(file), image).getbbox() is None


def test_entry_point_names_the_model():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    module, _, name = project["entry-points"]["lmms_eval.models"]["seed"].partition(":")
    manifest = getattr(__import__(module, fromlist=[name]), name)
    assert manifest.chat_class_path == f"{module}.SeedModel"
    assert manifest.simple_class_path == f"{module}.SimpleSeedModel"
