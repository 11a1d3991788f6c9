"""The papers' tables, and SEED-Bench by likelihood."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from random_images import noise

from seed_multimodal.cli.main import main
from seed_multimodal.errors import DataError
from seed_multimodal.evaluation.benchmarks import JUDGED
from seed_multimodal.evaluation.choices import read_choices
from seed_multimodal.evaluation.drawing import ClipScores
from seed_multimodal.evaluation.suite import read_suite
from seed_multimodal.evaluation.tasks import EVALUATIONS, TASKS
from seed_multimodal.models.registry import families
from seed_nano.world.scene import render
from seed_nano.world.splits import scenes

STYLES = ["noto", "twemoji", "fluent", "a large one"]
QUESTION = {
    "question_id": "7",
    "data_type": "image",
    "data_id": "0.png",
    "question": "Which style is it drawn in?",
    **{f"choice_{letter}": choice for letter, choice in zip("abcd", STYLES, strict=True)},
    "answer": "A",
    "question_type_id": 3,
}


def write(path: Path, value: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))
    return path


@pytest.fixture
def data(tmp_path) -> Path:
    """Files of three benchmarks, of nano's scenes."""
    root = tmp_path / "data"
    captions = []
    asked = []
    answers = []
    questions = []
    for index, scene in enumerate(scenes("val")[:4]):
        for folder in ("coco", "seedbench"):
            (root / folder).mkdir(parents=True, exist_ok=True)
            Image.fromarray(render(scene)).save(root / folder / f"{index}.png")
        captions.append({"image": f"{index}.png", "caption": ["a cat"], "image_id": index})
        asked.append({"question_id": index, "image": f"{index}.png", "question": "Is it?"})
        answers.append({"question_id": index, "answers": [{"answer": "yes"}] * 10})
        answer = "ABC"[STYLES.index(scene.style)]
        changes = {"question_id": str(index), "data_id": f"{index}.png", "answer": answer}
        questions.append({**QUESTION, **changes})
    questions.append({**QUESTION, "data_type": "video", "data_id": "1.mp4"})
    types = {"Scene Understanding": 3}
    write(root / "coco" / "coco_karpathy_test.json", captions)
    vqa = root / "vqav2"
    write(vqa / "v2_OpenEnded_mscoco_val2014_questions.json", {"questions": asked})
    write(vqa / "v2_mscoco_val2014_annotations.json", {"annotations": answers})
    write(root / "seedbench" / "SEED-Bench.json", {"questions": questions, "question_type": types})
    write(root / "geneval" / "evaluation_metadata.jsonl", {})
    answered = [{"answer": "yes"}] * 10
    missing = {"image": "nowhere.png", "question": "Is it?", "answers": answered}
    write(root / "vizwiz" / "val.json", [missing, missing])
    return root


def test_every_row_names_a_task_and_a_source():
    rows = read_suite()
    models = {name for spec in families() for name in spec.config.originals}
    for row in rows:
        assert row.kind == "tokenizer" or (
            row.dataset in TASKS[row.kind] and row.kind in {**EVALUATIONS, **JUDGED}
        )
        assert set(row.published) <= models
        assert all(source and figure > 0 for figure, source in row.published.values())
    assert len({row.name for row in rows}) == len(rows)


def test_suite_runs_what_is_there(data, tiny_folder, tmp_path, capsys):
    out = tmp_path / "out"
    command = f"eval suite --model {tiny_folder} --compare 8b --data {data} --out {out} --limit 2"
    kinds = "--only vqa choices geneval tokenizer --device cpu".split()
    assert main([*command.split(), *kinds]) == 1
    table = capsys.readouterr().out
    assert table == (out / "suite.md").read_text()
    results = {row["benchmark"]: row for row in json.loads((out / "suite.json").read_text())}
    assert results["VQAv2"]["samples"] == 2 and results["VQAv2"]["published"] == 66.2
    assert "is missing" in results["OK-VQA"]["not_run"]
    assert results["SEED-Bench (images)"]["ours"] is not None
    assert results["GenEval"]["not_run"] == "needs --judge"
    assert results["Retrieval by codes, COCO, image to text R@1"]["not_run"].startswith("needs")
    assert "| SEED-Bench (images) | accuracy |" in table and "| 51.5 | SEED-LLaMA-I" in table
    assert results["VizWiz"]["ours"] is None and results["VizWiz"]["bad"] == 2
    assert results["VizWiz"]["not_run"].startswith("no sample is usable: ")
    assert main([*command.split(), *kinds]) == 1  # resumes
    assert capsys.readouterr().out == table
    # Some kinds again, with settings that they do not read: the others keep their figures.
    more = ["--only", "vqa", "--clip", "nowhere", "--best-of", "2", "--device", "cpu"]
    assert main([*command.split(), *more]) == 1
    assert capsys.readouterr().out == table
    # Not those of another limit.
    other = command.replace("--limit 2", "--limit 1").split()
    assert main([*other, "--only", "geneval", "--device", "cpu"]) == 0
    assert "| SEED-Bench (images) | accuracy | not run: not asked for |" in capsys.readouterr().out
    assert main([*command.split(), "--only", "vqq"]) == 2
    assert "not 'vqq' (did you mean 'vqa'?)" in capsys.readouterr().err


def test_seedbench_takes_the_likeliest_choice(data, tmp_path, capsys):
    out = tmp_path / "out"
    file = data / "seedbench" / "SEED-Bench.json"
    argv = f"eval seedbench --questions {file} --device cpu --out {out} --batch-size 3".split()
    assert main(argv) == 0
    summary = json.loads((out / "summary.json").read_text())
    assert summary["accuracy"] == 100 and summary["samples"] == 4
    assert summary["per_question_type"] == {"Scene Understanding": 100}
    right = ["ABC"[STYLES.index(scene.style)] for scene in scenes("val")[:4]]
    results = json.loads((out / "results.json").read_text())
    assert [result["prediction"] for result in results] == right


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"question": None}, "item 0: has no question"),
        ({"choice_d": None}, "needs choice_a to choice_d"),
        ({"choice_d": " "}, "needs choice_a to choice_d"),
        ({"answer": "E"}, "an answer of A to D"),
        ({"data_type": "video"}, "no questions about images"),
    ],
)
def test_read_choices_names_the_faulty_item(change, message, tmp_path):
    item = {key: value for key, value in {**QUESTION, **change}.items() if value is not None}
    with pytest.raises(DataError, match=message):
        read_choices(write(tmp_path / "q.json", {"questions": [item]}))


def test_image_cosine_is_that_of_two_images(clip_folder):
    clip = ClipScores(clip_folder, torch.device("cpu"))
    assert clip.image_cosine(noise(1), noise(1)) == pytest.approx(1)
    assert clip.image_cosine(noise(1), noise(2)) < 0.9999
