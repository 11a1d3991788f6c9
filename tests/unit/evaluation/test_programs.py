"""`seed eval` and the evaluation programs of MultiModalLLM and LaVIT on benchmark files."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from full_disk import file_size_limit
from PIL import Image
from repository import ROOT

from seed_multimodal.cli.evaluate import eval_program
from seed_multimodal.cli.main import main
from seed_multimodal.compat.lavit_programs import evaluate_script
from seed_multimodal.evaluation.annotations import Sample
from seed_multimodal.evaluation.answers import Run
from seed_multimodal.evaluation.tasks import TASKS, find_truth
from seed_multimodal.evaluation.vqa import Questions, vqa_accuracy
from seed_multimodal.models.lavit.evaluate import LavitQuestions

EVAL = ROOT / "MultiModalLLM" / "eval"
COUNT = 12


@pytest.fixture(autouse=True)
def alone(monkeypatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def data(tmp_path) -> Path:
    """Six COCO images with two VQA questions and two captions each, and lists in LaVIT's
    formats."""
    (tmp_path / "val2014").mkdir()
    rng = np.random.default_rng(0)
    image_ids = range(1, COUNT // 2 + 1)
    for image_id in image_ids:
        pixels = rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "val2014" / f"COCO_val2014_{image_id:012d}.jpg")
    questions = [
        {"question_id": 10 * image_id + k, "image_id": image_id, "question": f"What is {k}?"}
        for image_id in image_ids
        for k in range(2)
    ]
    write(tmp_path / "q.json", {"questions": questions})
    write(
        tmp_path / "a.json",
        {
            "annotations": [
                {
                    "question_id": question["question_id"],
                    "answer_type": "other" if k % 2 else "yes/no",
                    "question_type": "what is",
                    "answers": [{"answer": "yes"}] * 10,
                }
                for k, question in enumerate(questions)
            ]
        },
    )
    write(
        tmp_path / "c.json",
        {
            "images": [
                {"id": n, "file_name": f"val2014/COCO_val2014_{n:012d}.jpg"} for n in image_ids
            ],
            "annotations": [
                {"image_id": n, "caption": f"a {word} number {n}"}
                for n in image_ids
                for word in ("thing", "picture")
            ],
        },
    )
    write(
        tmp_path / "v.json",
        [
            {
                "image": f"val2014/COCO_val2014_{n:012d}.jpg",
                "question": f"What is No. {n}?",
                "question_id": n,
                "answer": "a fox",
            }
            for n in image_ids
        ],
    )
    write(
        tmp_path / "t.json",
        [
            {"image": f"val2014/COCO_val2014_{n:012d}.jpg", "text": f"a fox {'x' * n}"}
            for n in image_ids
        ],
    )
    return tmp_path


def write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value))


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def lines(folder: Path) -> list[dict[str, Any]]:
    return [
        json.loads(text)
        for path in sorted(folder.glob("samples-*.jsonl"))
        for text in path.read_text().splitlines()
        if text
    ]


def flags(data: Path, folder: Path, *more: str, out: str = "out") -> list[str]:
    return [*f"--model {folder} --device cpu --images {data} --out {data / out}".split(), *more]


def vqa(data: Path, tiny: Path, *more: str, out: str = "out") -> int:
    return eval_program(
        "eval_vqa.py",
        "",
        flags(
            data,
            tiny,
            *f"--questions {data / 'q.json'} --annotations {data / 'a.json'}".split(),
            "--batch-size",
            "2",
            *more,
            out=out,
        ),
    )


def test_eval_vqa_writes_the_official_formats(data, tiny_folder, capsys):
    assert vqa(data, tiny_folder) == 0
    results = read(data / "out" / "results.json")
    summary = read(data / "out" / "summary.json")
    assert [result["question_id"] for result in results] == [
        question["question_id"] for question in read(data / "q.json")["questions"]
    ]
    accuracies = [100 * vqa_accuracy(result["answer"], ["yes"] * 10) for result in results]
    assert summary["accuracy"] == round(sum(accuracies) / COUNT, 2)
    assert set(summary["per_answer_type"]) == {"other", "yes/no"} and set(
        summary["per_question_type"]
    ) == {"what is"}
    assert (summary["answered"], summary["bad"]) == (COUNT, 0)
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == summary


def test_eval_vqa_divides_samples_among_processes(data, tiny_folder, monkeypatch, capsys):
    assert vqa(data, tiny_folder) == 0
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("1", "0"):
        assert not (data / "two" / "summary.json").exists()
        monkeypatch.setenv("RANK", rank)
        assert vqa(data, tiny_folder, out="two") == 0
    assert "other processes still work" in capsys.readouterr().err
    shares = [
        [json.loads(line)["id"] for line in path.read_text().splitlines() if line]
        for path in sorted((data / "two").glob("samples-*.jsonl"))
    ]
    assert shares == [[10 * n for n in range(1, 7)], [10 * n + 1 for n in range(1, 7)]]
    assert read(data / "two" / "results.json") == read(data / "out" / "results.json")


@pytest.mark.process
@pytest.mark.slow
def test_eval_vqa_resumes_after_sigkill(data, tiny_folder, capsys):
    options = ["--batch-size", "1", "--max-new-tokens", "60"]
    assert vqa(data, tiny_folder, *options) == 0
    command = [
        sys.executable,
        str(EVAL / "eval_vqa.py"),
        *flags(
            data,
            tiny_folder,
            "--questions",
            str(data / "q.json"),
            "--annotations",
            str(data / "a.json"),
            *options,
            out="killed",
        ),
    ]
    variables = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(ROOT / "src"),
    }
    process = subprocess.Popen(
        command, env=variables, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    file = data / "killed" / "samples-0.jsonl"
    end = time.monotonic() + 120
    while not (file.is_file() and file.read_text().count("\n") >= 2) and time.monotonic() < end:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    before = file.read_text().count("\n")
    assert 2 <= before < COUNT and not (data / "killed" / "summary.json").exists()
    with open(file, "a") as torn:  # a line cut short by a kill
        torn.write('\n{"id": 60, "ans')
    assert vqa(data, tiny_folder, *options, out="killed") == 0
    assert f"{before} of {COUNT} samples have been answered before" in capsys.readouterr().err
    for name in ("results.json", "summary.json"):
        assert read(data / "killed" / name) == read(data / "out" / name)


def test_eval_vqa_counts_bad_samples_and_retries_them(data, tiny_folder, capsys):
    questions = read(data / "q.json")
    del questions["questions"][2]["question"]
    write(data / "q.json", questions)
    image = data / "val2014" / "COCO_val2014_000000000004.jpg"
    content = image.read_bytes()
    image.write_bytes(content[:200])
    (data / "val2014" / "COCO_val2014_000000000006.jpg").unlink()
    assert vqa(data, tiny_folder) == 1
    log = capsys.readouterr().err
    assert "q.json: item 2: has no question" in log and "000000000004.jpg" in log
    assert "item 10: its image was not found" in log and "5 samples of 12 could not be used" in log
    summary = read(data / "out" / "summary.json")
    assert (summary["answered"], summary["bad"], len(summary["bad_first"])) == (7, 5, 5)
    assert [result["answer"] for result in read(data / "out" / "results.json")].count(
        ""
    ) >= 4  # wrong answers
    image.write_bytes(content)
    assert vqa(data, tiny_folder) == 1
    assert read(data / "out" / "summary.json")["bad"] == 3


def test_eval_vqa_fails_after_many_bad_samples_in_a_row(data, tiny_folder, capsys):
    for image in (data / "val2014").iterdir():
        image.unlink()
    assert vqa(data, tiny_folder, "--max_bad", "3") == 2
    assert "3 samples in a row cannot be used, the last:" in capsys.readouterr().err


def test_eval_vqa_fails_in_the_folder_of_another_run(data, tiny_folder, capsys):
    assert vqa(data, tiny_folder, "--limit", "2") == 0
    for more, sentence in (
        (["--prompts", "plain"], "other settings (prompts: chat -> plain)"),
        (["--dtype", "bfloat16"], "(dtype: float32 -> bfloat16)"),
    ):
        assert vqa(data, tiny_folder, *more) == 2 and sentence in capsys.readouterr().err
    questions = (data / "q.json").read_text()
    (data / "q.json").write_text(questions.replace("What", "Whom"))
    assert (
        vqa(data, tiny_folder) == 2
        and "(the contents of the file of samples);" in capsys.readouterr().err
    )
    (data / "q.json").write_text(questions)
    assert vqa(data, tiny_folder, "--limit", "4") == 0 and len(lines(data / "out")) == 4


def test_eval_vqa_resumes_after_a_full_disk(data, tiny_folder, capsys):
    assert vqa(data, tiny_folder, "--limit", "1") == 0
    with file_size_limit(60):
        assert vqa(data, tiny_folder) == 2
    assert (
        "samples-0.jsonl: cannot be written (the disk or quota is full" in capsys.readouterr().err
    )
    assert vqa(data, tiny_folder) == 0 and read(data / "out" / "summary.json")["samples"] == COUNT


def test_eval_vqa_of_a_single_image(data, tiny_folder, capsys):
    arguments = (
        f"--model {tiny_folder} --device cpu --max-new-tokens 8 "
        f"--image {data / 'val2014' / 'COCO_val2014_000000000001.jpg'}"
    ).split()
    answers = []
    for more in ([], [], ["--keep_ratio"]):
        assert eval_program("eval_vqa.py", "", [*arguments, *more]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] and all(answer.endswith("\n") for answer in answers)


@pytest.mark.process
@pytest.mark.parametrize("prompts", ["chat", "plain"])
def test_eval_caption_scores_captions(data, tiny_folder, prompts, monkeypatch):
    monkeypatch.setenv("PATH", "")  # without Java
    assert (
        eval_program(
            "eval_caption.py",
            "",
            flags(
                data,
                tiny_folder,
                *f"--captions {data / 'c.json'} --prompts {prompts} --num-beams 2".split(),
            ),
        )
        == 0
    )
    summary = read(data / "out" / "summary.json")
    results = read(data / "out" / "results.json")
    assert {"Bleu_4", "ROUGE_L", "CIDEr"} <= set(summary)
    assert [result["image_id"] for result in results] == [1, 2, 3, 4, 5, 6]
    assert all(
        isinstance(result["caption"], str) and "\n" not in result["caption"] for result in results
    )


def test_eval_caption_to_images(data, tiny_folder, capsys):
    (data / "t.txt").write_text("a blue fish / or two\na red apple\n" + "long " * 60)
    arguments = flags(
        data, tiny_folder, *f"--captions {data / 't.txt'} --steps 1 --batch-size 2".split()
    )
    assert eval_program("eval_caption_to_images.py", "", arguments) == 0
    names = [result["image"] for result in read(data / "out" / "results.json")]
    assert names == [
        "000000_a_blue_fish___or_two.jpg",
        "000001_a_red_apple.jpg",
        f"000002_{'long_' * 11}long_.jpg",
    ]
    files = {path.name: path.stat().st_mtime_ns for path in (data / "out").glob("*.jpg")}
    assert set(files) == set(names) and all(
        Image.open(data / "out" / name).size[0] > 0 for name in names
    )
    assert eval_program("eval_caption_to_images.py", "", arguments) == 0
    assert {path.name: path.stat().st_mtime_ns for path in (data / "out").glob("*.jpg")} == files
    assert "3 of 3 samples have been answered before" in capsys.readouterr().err


@pytest.mark.parametrize("model", ["tiny_folder", "tiny_lavit_folder"])
def test_text2image_selects_by_clip(data, request, clip_folder, capsys, model):
    folder = request.getfixturevalue(model)
    assert (
        main(
            [
                "eval",
                "text2image",
                *flags(
                    data,
                    folder,
                    *(
                        f"--captions {data / 't.json'} --limit 3 --best-of 2 "
                        f"--clip {clip_folder} --steps 1 --inception {data / 'none.pth'}"
                    ).split(),
                ),
            ]
        )
        == 0
    )
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    answers = lines(data / "out")
    assert len(answers) == len(list((data / "out").glob("*.png"))) == 3
    assert summary["clip"] == pytest.approx(np.mean([line["clip"] for line in answers]), abs=1e-3)
    assert summary["notes"][0].startswith("FID is not computed (") and "fid" not in summary


def test_evaluate_of_vizwiz_asks_first_if_a_question_is_answerable(
    data, tiny_lavit_folder, tiny_lavit, capsys
):
    flags = (
        f"--model_path {tiny_lavit_folder} --model_dtype fp32 --device cpu "
        f"--imagepath {data} --annopath {data / 'v.json'} --out {data / 'out'}"
    ).split()
    assert (
        evaluate_script("evaluate.py", "", [*"--task_name vqa --dataset vizwiz".split(), *flags])
        == 0
    )
    assert [result["question_id"] for result in read(data / "out" / "results.json")] == [
        1,
        2,
        3,
        4,
        5,
        6,
    ]
    image = Image.open(data / "val2014" / "COCO_val2014_000000000003.jpg")
    answers = [
        tiny_lavit.ask(image, text, seed=42)
        for text in ('Is the question: "What is No. 3?" answerable?', "What is No. 3?")
    ]
    line = next(line for line in lines(data / "out") if line["id"] == 3)
    assert line["answerable"] == answers[0]
    assert line["answer"] == (
        "unanswerable" if "no" in answers[0].lower().split() else answers[1].removesuffix(".")
    )


def test_questions_of_each_system(data, tiny_lavit, tiny, tmp_path, monkeypatch):
    run = Run(TASKS["vqa"]["gqa"], data / "testdev.json", tmp_path)
    work = LavitQuestions(tiny_lavit, run, [])
    assert [
        work._accuracy(text, Sample(0, "", references=["Red"])) for text in ("It is red.", "blue")
    ] == [1.0, 0.0]
    assert (
        Questions(tiny, run, [])._accuracy("two dogs", Sample(0, "", references=["2 dogs"])) == 1.0
    )
    assert work.question("What is No. 3?") == "What is No. 3?"  # nano-lavit's training prompts
    monkeypatch.setattr(tiny_lavit, "config", replace(tiny_lavit.config, original="lavit"))
    assert LavitQuestions(tiny_lavit, run, []).question("What is No. 3?") == "what is no 3?"


def test_find_truth(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    task = TASKS["caption"]["coco"]
    notes = tmp_path / "annotations" / "val.json"
    notes.parent.mkdir()
    assert find_truth(task, notes) is None and find_truth(TASKS["vqa"]["gqa"], notes) is None
    plain = notes.with_name("vizwiz_val_annotations.json")
    plain.write_text("")
    assert find_truth(TASKS["vqa"]["vizwiz"], notes) == plain  # not lemmatised
    first = Path(task.truth)
    first.parent.mkdir(parents=True)
    first.write_text("")
    assert find_truth(task, notes) == first


@pytest.mark.slow
def test_nano_answers_questions(tmp_path):
    question = "What is in the picture?"  # of nano's training data
    write(
        tmp_path / "vqa.json",
        [
            {"image": image, "question": question, "question_id": image, "answer": [answer] * 10}
            for image, answer in (("fox.png", "fox"), ("cat.jpg", "cat"))
        ],
    )
    assert (
        eval_program(
            "eval_vqa.py",
            "",
            (
                f"--model {ROOT / 'pretrained' / 'nano'} --device cpu "
                f"--questions {tmp_path / 'vqa.json'} --images {ROOT / 'images'} "
                f"--out {tmp_path / 'out'}"
            ).split(),
        )
        == 0
    )
    assert read(tmp_path / "out" / "summary.json")["accuracy"] >= 50, read(
        tmp_path / "out" / "results.json"
    )


def test_eval_vqa_counts_bad_samples_in_their_order(data, tiny_folder):
    """Not those of a batch together: every second image is missing here."""
    for image in sorted((data / "val2014").iterdir())[::2]:
        image.unlink()
    assert vqa(data, tiny_folder, "--max_bad", "4", "--batch-size", "12") == 1
