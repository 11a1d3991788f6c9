"""The programs of MultiModalLLM/eval on files in the benchmarks' formats: answers, scores, kills, broken samples."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import warm_python
from PIL import Image

from seed_multimodal.commands.evaluate import caption_program, drawing_program, vqa_program
from seed_multimodal.evaluation.vqa_accuracy import vqa_accuracy

ROOT = Path(__file__).resolve().parents[2]
EVAL = ROOT / "MultiModalLLM" / "eval"
COUNT = 12


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def world(tmp_path: Path) -> Path:
    """COCO-style pictures 1 to 6, with two VQA questions about each, and captions."""
    (tmp_path / "val2014").mkdir()
    draw = np.random.default_rng(0)
    for number in range(1, COUNT // 2 + 1):
        pixels = draw.integers(0, 256, (24, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "val2014" / f"COCO_val2014_{number:012d}.jpg")
    questions = [{"question_id": 10 * number + k, "image_id": number, "question": f"What is {k}?"}
                 for number in range(1, COUNT // 2 + 1) for k in range(2)]
    write(tmp_path / "q.json", {"data_subtype": "val2014", "questions": questions})
    write(tmp_path / "a.json", {"annotations": [
        {"question_id": one["question_id"], "answer_type": "other" if k % 2 else "yes/no", "question_type": "what is",
         "answers": [{"answer": "yes", "answer_id": i} for i in range(10)]} for k, one in enumerate(questions)]})
    write(tmp_path / "c.json", {
        "images": [{"id": n, "file_name": f"COCO_val2014_{n:012d}.jpg"} for n in range(1, COUNT // 2 + 1)],
        "annotations": [{"image_id": n, "caption": f"a {word} number {n}"} for n in range(1, COUNT // 2 + 1)
                        for word in ("thing", "picture")]})
    return tmp_path


def write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value))


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for path in sorted(folder.glob("samples-*.jsonl"))
            for text in path.read_text().splitlines()]


def vqa(world: Path, tiny: Path, *more: str, out: str = "out") -> int:
    return vqa_program("eval_vqa.py", "", [
        "--model", str(tiny), "--device", "cpu", "--questions", str(world / "q.json"), "--annotations",
        str(world / "a.json"), "--images", str(world), "--out", str(world / out), "--batch-size", "2", *more])


def test_vqa_in_the_official_formats(world, tiny_folder, capsys):
    assert vqa(world, tiny_folder) == 0
    results, summary = read(world / "out" / "results.json"), read(world / "out" / "summary.json")
    asked = read(world / "q.json")["questions"]
    assert [one["question_id"] for one in results] == [one["question_id"] for one in asked]
    wanted = [100 * vqa_accuracy(one["answer"], ["yes"] * 10) for one in results]
    assert summary["accuracy"] == round(sum(wanted) / COUNT, 2)
    assert set(summary["per_answer_type"]) == {"other", "yes/no"} and set(summary["per_question_type"]) == {"what is"}
    assert summary["answered"] == COUNT and not summary["bad"]
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == summary


def test_batches_processes_and_one_at_a_time_give_the_same_answers(world, tiny_folder, monkeypatch, capsys):
    assert vqa(world, tiny_folder) == 0
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("1", "0"):
        assert not (world / "two" / "summary.json").exists()
        monkeypatch.setenv("RANK", rank)
        assert vqa(world, tiny_folder, out="two") == 0
    assert "other processes still work" in capsys.readouterr().err
    shares = [len(path.read_text().splitlines()) for path in sorted((world / "two").glob("samples-*.jsonl"))]
    assert shares == [COUNT // 2, COUNT // 2]
    assert read(world / "two" / "results.json") == read(world / "out" / "results.json")


@pytest.mark.process
@pytest.mark.slow
def test_a_killed_run_resumes_with_what_is_missing(world, tiny_folder):
    assert vqa(world, tiny_folder, "--max-new-tokens", "60") == 0
    command = [warm_python.PYTHON, str(EVAL / "eval_vqa.py"), "--model", str(tiny_folder), "--device", "cpu",
               "--questions", str(world / "q.json"), "--annotations", str(world / "a.json"), "--images", str(world),
               "--out", str(world / "killed"), "--batch-size", "1", "--max-new-tokens", "60"]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT / "src")}
    process = subprocess.Popen(command, env=variables, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    file = world / "killed" / "samples-0.jsonl"
    end = time.monotonic() + 60
    while not (file.is_file() and file.read_text().count("\n") >= 2) and time.monotonic() < end:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    before = file.read_text().count("\n")
    assert 2 <= before < COUNT and not (world / "killed" / "summary.json").exists()
    with open(file, "a") as torn:  # as a kill in the middle of a write leaves it
        torn.write('{"id": 60, "ans')
    done = subprocess.run(command, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"{before} of {COUNT} samples have been answered before" in done.stderr
    assert len(lines(world / "killed")) == COUNT
    assert read(world / "killed" / "results.json") == read(world / "out" / "results.json")
    assert read(world / "killed" / "summary.json") == read(world / "out" / "summary.json")


def test_bad_samples_are_named_counted_wrong_and_tried_again(world, tiny_folder, capsys):
    questions = read(world / "q.json")
    del questions["questions"][2]["question"]
    write(world / "q.json", questions)
    picture = world / "val2014" / "COCO_val2014_000000000004.jpg"
    whole = picture.read_bytes()
    picture.write_bytes(whole[:200])
    (world / "val2014" / "COCO_val2014_000000000006.jpg").unlink()
    assert vqa(world, tiny_folder) == 1
    said = capsys.readouterr().err
    assert "q.json: item 2: has no question" in said and "000000000004.jpg" in said
    assert "item 10: its picture is not there" in said and "5 samples of 12 could not be used" in said
    summary = read(world / "out" / "summary.json")
    assert (summary["answered"], summary["bad"]) == (7, 5) and len(summary["bad_first"]) == 5
    results = read(world / "out" / "results.json")
    assert len(results) == COUNT and [one["answer"] for one in results].count("") >= 5
    picture.write_bytes(whole)
    assert vqa(world, tiny_folder) == 1
    assert read(world / "out" / "summary.json")["bad"] == 3
    assert len(lines(world / "out")) == COUNT + 2 + 3  # two answers and three reasons more


def test_many_bad_samples_in_a_row_end_the_run(world, tiny_folder, capsys):
    for picture in (world / "val2014").iterdir():
        picture.unlink()
    assert vqa(world, tiny_folder, "--max_bad", "3") == 2
    assert "3 samples in a row cannot be used, the last:" in capsys.readouterr().err
    assert len(lines(world / "out")) == 3


def test_vizwiz_own_names_are_in_its_results_and_no_question_has_no_accuracy(world, tiny_folder):
    picture = world / "val2014" / "COCO_val2014_000000000001.jpg"
    picture.rename(world / "VizWiz_val_00000001.jpg")
    write(world / "q.json", [{"image": "VizWiz_val_00000001.jpg", "question": "What?",
                              "answers": [{"answer": "a fox"}] * 10}])
    write(world / "a.json", read(world / "q.json"))
    assert vqa(world, tiny_folder) == 0
    result, = read(world / "out" / "results.json")
    assert result["image"] == result["question_id"] == "VizWiz_val_00000001.jpg"
    assert read(world / "out" / "summary.json")["accuracy"] == 0
    write(world / "q.json", [1, 2])
    assert vqa(world, tiny_folder, out="none") == 1
    assert "accuracy" not in read(world / "none" / "summary.json")


def test_another_run_in_the_same_folder_is_refused(world, tiny_folder, capsys):
    assert vqa(world, tiny_folder, "--limit", "2") == 0
    assert read(world / "out" / "summary.json")["samples"] == 2
    assert vqa(world, tiny_folder, "--prompts", "plain") == 2
    assert "was begun with other settings (prompts: chat -> plain)" in capsys.readouterr().err
    assert vqa(world, tiny_folder, "--dtype", "bfloat16") == 2
    assert "(dtype: float32 -> bfloat16)" in capsys.readouterr().err
    asked = (world / "q.json").read_text()
    (world / "q.json").write_text(asked.replace("What", "Whom"))  # a file of the same size
    assert vqa(world, tiny_folder) == 2 and "questions.sha256" in capsys.readouterr().err
    (world / "q.json").write_text(asked)
    assert vqa(world, tiny_folder, "--limit", "4") == 0  # more of the same set goes on
    assert len(lines(world / "out")) == 4


def test_a_single_question_as_the_original_asked(world, tiny_folder, capsys):
    picture = str(world / "val2014" / "COCO_val2014_000000000001.jpg")
    arguments = ["--model", str(tiny_folder), "--device", "cpu", "--image", picture, "--max-new-tokens", "8"]
    assert vqa_program("eval_vqa.py", "", arguments) == 0
    said = capsys.readouterr().out
    assert vqa_program("eval_vqa.py", "", [*arguments, "--keep_ratio"]) == 0
    assert capsys.readouterr().out != ""
    assert vqa_program("eval_vqa.py", "", arguments) == 0 and capsys.readouterr().out == said
    assert vqa_program("eval_vqa.py", "", [*arguments, "--annotations", "a.json"]) == 2


def test_a_full_disk_is_one_sentence_and_the_run_goes_on(world, tiny_folder, capsys):
    for picture in (world / "val2014").iterdir():
        picture.unlink()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    assert vqa(world, tiny_folder, "--limit", "1") == 1  # the settings are written
    assert capsys.readouterr().err.count("skipped") == 1
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (700, limits[1]))
        assert vqa(world, tiny_folder) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    said = capsys.readouterr().err.splitlines()[-1]
    assert "samples-0.jsonl: cannot be written (the disk or quota is full" in said
    assert vqa(world, tiny_folder) == 1
    assert read(world / "out" / "summary.json")["samples"] == COUNT


@pytest.mark.parametrize(("rank", "count"), [("0", "0"), ("2", "2")])
def test_a_process_that_is_none_of_the_processes_is_refused(world, tiny_folder, monkeypatch, capsys, rank, count):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", count)
    assert vqa(world, tiny_folder) == 2 and not (world / "out").exists()
    assert f"RANK must be below WORLD_SIZE, but is {rank} of {count}" in capsys.readouterr().err


@pytest.mark.parametrize("prompts", ["chat", "plain"])
@pytest.mark.process
def test_captions_are_scored_against_the_file(world, tiny_folder, prompts):
    code = caption_program("eval_caption.py", "", [
        "--model", str(tiny_folder), "--device", "cpu", "--captions", str(world / "c.json"), "--images",
        str(world / "val2014"), "--out", str(world / "out"), "--prompts", prompts, "--num-beams", "2"])
    assert code == 0
    summary, results = read(world / "out" / "summary.json"), read(world / "out" / "results.json")
    assert {"Bleu_4", "ROUGE_L", "CIDEr"} <= set(summary) and [one["image_id"] for one in results] == [1, 2, 3, 4, 5, 6]
    assert all(isinstance(one["caption"], str) for one in results)


def test_pictures_of_captions(world, tiny_folder, capsys):
    (world / "t.txt").write_text("a blue fish / or two\na red apple\n" + "long " * 60)
    arguments = ["--model", str(tiny_folder), "--device", "cpu", "--captions", str(world / "t.txt"), "--out",
                 str(world / "out"), "--steps", "1", "--batch-size", "2"]
    assert drawing_program("eval_caption_to_images.py", "", arguments) == 0
    assert [one["picture"] for one in read(world / "out" / "results.json")] == [
        "000000_a_blue_fish___or_two.jpg", "000001_a_red_apple.jpg", f"000002_{'long_' * 11}long_.jpg"]
    pictures = {path.name: path.stat().st_mtime_ns for path in (world / "out").glob("*.jpg")}
    assert len(pictures) == 3 and all(Image.open(world / "out" / name).size[0] > 0 for name in pictures)
    assert drawing_program("eval_caption_to_images.py", "", arguments) == 0  # nothing is left to do
    assert {path.name: path.stat().st_mtime_ns for path in (world / "out").glob("*.jpg")} == pictures
    assert "3 of 3 samples have been answered before" in capsys.readouterr().err


@pytest.mark.process
def test_the_programs_explain_themselves_and_name_missing_weights():
    for name in ("eval_vqa.py", "eval_caption.py", "eval_caption_to_images.py"):
        done = subprocess.run([warm_python.PYTHON, str(EVAL / name), "--help"], capture_output=True, text=True)
        assert done.returncode == 0 and "--limit" in done.stdout and "resumes" in done.stdout
    if not (ROOT / "pretrained" / "seed_llama_8b_sft").exists():
        done = subprocess.run([warm_python.PYTHON, str(EVAL / "eval_vqa.py")], capture_output=True, text=True,
                              env={**os.environ, "HF_HUB_OFFLINE": "1"})
        assert done.returncode == 2 and "download" in done.stderr and "Traceback" not in done.stderr




@pytest.mark.slow
def test_nano_answers_in_the_official_formats(tmp_path):
    question = "What is in the picture?"  # as nano was taught to be asked
    asked = {"fox.png": (question, "fox"), "cat.jpg": (question, "cat")}
    write(tmp_path / "vqa.json", [
        {"image": picture, "question": question, "question_id": picture, "answer": [answer] * 10}
        for picture, (question, answer) in asked.items()])
    file, model = str(tmp_path / "vqa.json"), str(ROOT / "pretrained" / "nano")
    assert vqa_program("eval_vqa.py", "", [
        "--model", model, "--device", "cpu", "--questions", file, "--annotations", file, "--images",
        str(ROOT / "images"), "--out", str(tmp_path / "out")]) == 0
    summary = read(tmp_path / "out" / "summary.json")
    assert summary["accuracy"] >= 50, read(tmp_path / "out" / "results.json")
