"""The papers' tables, and SEED-Bench by likelihood, on nano's scenes."""

from pathlib import Path

import pytest
from PIL import Image
from tiny import read_json, write_json

from seed_multimodal.cli.main import main
from seed_multimodal.evaluation.suite import commands, read_suite
from seed_multimodal.weights.catalogue import catalogue

STYLES = ["noto", "twemoji", "fluent", "a large one"]


@pytest.fixture
def data(tmp_path) -> Path:
    """Files of two benchmarks, and VizWiz without its images."""
    from seed_nano.world.scene import render
    from seed_nano.world.splits import scenes

    root = tmp_path / "data"
    for folder in ("coco", "seedbench", "vqav2", "vizwiz"):
        (root / folder).mkdir(parents=True)
    asked = []
    answers = []
    choices = []
    for index, scene in enumerate(scenes("val")[:4]):
        for folder in ("coco", "seedbench"):
            Image.fromarray(render(scene)).save(root / folder / f"{index}.png")
        asked.append({"question_id": index, "image": f"{index}.png", "question": "Is it?"})
        answers.append({"question_id": index, "answers": [{"answer": "yes"}] * 10})
        choices.append(
            {
                "question_id": index,
                "data_id": f"{index}.png",
                "question": "Which style is it drawn in?",
                **{f"choice_{letter}": style for letter, style in zip("abcd", STYLES, strict=True)},
                "answer": "ABC"[STYLES.index(scene.style)],
            }
        )
    vqa = root / "vqav2"
    write_json(vqa / "v2_OpenEnded_mscoco_val2014_questions.json", {"questions": asked})
    write_json(vqa / "v2_mscoco_val2014_annotations.json", {"annotations": answers})
    write_json(root / "seedbench" / "SEED-Bench.json", {"questions": choices})
    missing = {"image": "nowhere.png", "question": "Is it?", "answers": [{"answer": "yes"}] * 10}
    write_json(root / "vizwiz" / "val.json", [missing, missing])
    return root


def test_every_row_names_a_task_and_a_source():
    # A row of another name would never run, and never say why.
    rows = read_suite()
    models = set(catalogue().systems)
    for row in rows:
        assert row.kind in {"tokenizer", *commands()}
        assert set(row.published) <= models
        assert all(source and figure > 0 for figure, source in row.published.values())
    assert len({row.name for row in rows}) == len(rows)


def test_suite_runs_what_is_there(data, tiny_folder, tmp_path, capsys):
    out = tmp_path / "out"

    def suite(limit, *more):
        argv = (
            f"eval suite --model {tiny_folder} --compare 8b --data {data} --out {out} --device cpu"
        )
        status = main([*argv.split(), "--limit", str(limit), *more])
        return status, capsys.readouterr().out

    # 1. Figures next to the published ones, and reasons of rows that cannot run.
    status, table = suite(2, "--only", "vqa", "choices")
    assert status == 1
    assert table.endswith((out / "suite.md").read_text())
    results = {row["benchmark"]: row for row in read_json(out / "suite.json")}
    assert (results["VQAv2"]["samples"], results["VQAv2"]["published"]) == (2, 66.2)
    assert results["SEED-Bench (images)"]["ours"] is not None
    assert (results["VizWiz"]["ours"], results["VizWiz"]["bad"]) == (None, 2)
    assert str(data) in results["OK-VQA"]["not_run"]

    # 2. Some kinds again, with settings that they do not read: the others keep their figures.
    rows = table[table.index("| benchmark") :]
    _, again = suite(2, "--only", "vqa", "--clip", "nowhere")
    assert again.endswith(rows)
    # Not those of another limit.
    _, other = suite(1, "--only", "vqa")
    assert "| SEED-Bench (images) | accuracy | not run" in other


def test_seedbench_takes_the_likeliest_choice(data, tmp_path):
    # The shipped model knows the styles of its drawings.
    out = tmp_path / "out"
    file = data / "seedbench" / "SEED-Bench.json"
    argv = f"eval seedbench --questions {file} --device cpu --out {out} --batch-size 3"
    assert main(argv.split()) == 0
    summary = read_json(out / "summary.json")
    assert (summary["accuracy"], summary["samples"]) == (100, 4)
