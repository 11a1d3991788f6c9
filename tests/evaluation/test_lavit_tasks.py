"""LaVIT's published evaluation, with a tiny LaVIT and with another system: files, rules, processes, drawings."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import warm_python
from PIL import Image

from seed_multimodal.cli import main
from seed_multimodal.data.formats.benchmark_files import Annotation
from seed_multimodal.data.formats.caption_files import read_captions
from seed_multimodal.errors import CheckpointError, ConfigError
from seed_multimodal.evaluation.asking import AnySystem
from seed_multimodal.evaluation.benchmark_work import QuestionRules
from seed_multimodal.evaluation.drawing_work import BestOf
from seed_multimodal.evaluation.lavit_tasks import Task, find_truth, question_rules, run_task, task_work
from seed_multimodal.language.lavit import QuestionProcessor

ROOT = Path(__file__).resolve().parents[2]
COUNT = 5
TRUTH = "vizwiz_val_annotations_lemm.json"


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def world(tmp_path: Path) -> Path:
    """Five pictures with a question and a caption each, in LaVIT's lists, and the official files beside them."""
    draw = np.random.default_rng(0)
    names = [f"VizWiz_val_{number:08d}.jpg" for number in range(COUNT)]
    for name in names:
        Image.fromarray(draw.integers(0, 256, (24, 32, 3), dtype=np.uint8)).save(tmp_path / name)
    write(tmp_path / "val_answerable.json", [
        {"image": name, "question": f"What is No. {number}?", "question_id": number, "answers": [{"answer": "a"}] * 10}
        for number, name in enumerate(names)])
    write(tmp_path / TRUTH, {"annotations": [
        {"question_id": number, "answer_type": "other", "answers": [{"answer": "unanswerable"}] * 10}
        for number in range(COUNT)]})
    write(tmp_path / "nocaps_val.json", [{"image": name, "img_id": number} for number, name in enumerate(names)])
    write(tmp_path / "nocaps_val_4500_captions.json", {"images": [], "annotations": [
        {"image_id": number, "caption": "a fox"} for number in range(COUNT)]})
    write(tmp_path / "coco_t2i_eval.json", [{"image": name, "text": f"a fox {'x ' * number}"}
                                           for number, name in enumerate(names)])
    return tmp_path


def write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value))


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for path in folder.glob("samples-*.jsonl") for text in path.read_text().splitlines()]


@pytest.mark.parametrize(("said", "refused", "released"), [
    ("no", True, True), ("No.", True, False), ("it is no question", True, True), ("not", False, True),
    ("unknown", False, True), ("nothing", False, True), ("yes", False, False), ("", False, False)])
def test_no_is_a_word(said, refused, released):
    assert QuestionRules().refuses(said) is refused
    assert QuestionRules(legacy=True).refuses(said) is released


def test_rules_of_the_sets(tmp_path, tiny_lavit, tiny):
    found = question_rules("gqa", tmp_path / "testdev.json", tiny_lavit)
    assert found.exact and found.lavit and found.lemmas is not None and not found.answerable
    assert [found.accuracy(said, Annotation(["Red"])) for said in ("It is red.", "blue")] == [1.0, 0.0]
    found = question_rules("vizwiz", tmp_path / TRUTH, tiny_lavit, legacy=True)
    assert found.answerable and found.legacy and found.lemmas is None
    assert found.accuracy("to go to school", Annotation(["school"] * 10)) == 1.0
    assert question_rules("vqav2", tmp_path / "a.json", tiny) == QuestionRules()
    assert question_rules("gqa", tmp_path / "a.json", tiny).accuracy("two dogs", Annotation(["2 dogs"])) == 1.0


def test_ground_truth_is_found_where_the_released_programs_had_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    notes = tmp_path / "annotations" / "val.json"
    notes.parent.mkdir()
    assert find_truth("data/gt/a_annotations_lemm.json", notes) is None and find_truth("", notes) is None
    plain = notes.with_name("a_annotations.json")
    plain.write_text("")
    assert find_truth("data/gt/a_annotations_lemm.json", notes) == plain
    first = Path("data/gt/a_annotations_lemm.json")
    first.parent.mkdir(parents=True)
    first.write_text("")
    assert find_truth(str(first), notes) == first


def test_vizwiz_asks_first_whether_there_is_an_answer(world, tiny_lavit):
    task = Task("vqa", "vizwiz", world / "val_answerable.json", out=world / "out")
    summary = run_task(tiny_lavit, task)
    assert summary is not None and summary["answered"] == COUNT
    results = read(world / "out" / "vizwiz.json")
    assert [one["question_id"] for one in results] == list(range(COUNT))
    rules = QuestionRules()
    for line in lines(world / "out"):
        assert rules.refuses(line["answerable"]) <= (line["answer"] == "unanswerable")
    picture = Image.open(world / "VizWiz_val_00000003.jpg")
    asked = [tiny_lavit.ask(picture, text, seed=42) for text in ('is the question what is no 3? answerable?',
                                                                 "what is no 3?")]
    line = next(line for line in lines(world / "out") if line["id"] == 3)
    assert QuestionProcessor()('Is the question: "What is No. 3?" answerable?') == \
        'is the question what is no 3? answerable?'
    assert (line["answerable"], line["answer"]) == (
        asked[0], "unanswerable" if rules.refuses(asked[0]) else asked[1].removesuffix("."))


def test_gqas_answers_are_right_or_wrong_and_missing_spacy_is_told(world, tiny_lavit, capsys):
    names = sorted(path.stem for path in world.glob("*.jpg"))
    said = [tiny_lavit.ask(Image.open(world / f"{name}.jpg"), "is it?", seed=42) for name in names]
    write(world / "gqa.json", {str(number): {"imageId": name, "question": "Is it?", "answer": answer, "types": {}}
                               for number, (name, answer) in enumerate(zip(names, [*said[:2], "x", "y", "z"],
                                                                           strict=True))})
    summary = run_task(tiny_lavit, Task("vqa", "gqa", world / "gqa.json", out=world / "out", batch=3))
    assert summary is not None
    spaced = all(" " not in one and one for one in said[:2])
    assert summary["accuracy"] >= (40.0 if spaced else 0.0) and [one["answer"] for one in
                                                                 read(world / "out" / "gqa.json")] == said
    if "notes" in summary:
        assert "spaCy or its model" in summary["notes"][0] and summary["notes"][0] in capsys.readouterr().err


def test_captions_as_published_with_the_truth_beside_them(world, tiny_lavit):
    summary = run_task(tiny_lavit, Task("caption", "nocaps", world / "nocaps_val.json", out=world / "out"))
    assert summary is not None and {"CIDEr", "Bleu_4", "ROUGE_L"} <= set(summary)
    found = read(world / "out" / "nocaps.json")
    assert [one["image_id"] for one in found] == list(range(COUNT))
    alone = tiny_lavit.describe(world / "VizWiz_val_00000002.jpg", seed=42)
    assert found[2]["caption"] == alone  # neighbours change nothing
    assert ("METEOR" in summary) or any("METEOR" in note and "Java" in note for note in summary["notes"])


@pytest.mark.parametrize(("name", "dataset", "sentence"), [
    ("vqa", "coco", "The task vqa has no dataset 'coco'; use vqav2, okvqa, vizwiz, gqa"),
    ("caption", "flikr", r"no dataset 'flikr' \(did you mean 'flickr'\?\)"), ("vqq", "coco", "task_name")])
def test_unknown_tasks_and_sets_are_refused(name, dataset, sentence):
    with pytest.raises(ConfigError, match=sentence):
        Task(name, dataset, "x.json")


def test_drawings_have_seeds_of_their_own(world, tiny_lavit):
    texts = read_captions(world / "coco_t2i_eval.json")
    asked = AnySystem(tiny_lavit, drawing={"num_inference_steps": 1, "top_k": 300, "guidance": 1.5})
    (world / "out").mkdir()
    work, _ = BestOf(asked, world / "coco_t2i_eval.json", texts, world / "out", count=1).work(2)
    made = work.answer([work.samples.read(number) for number in (0, 1)])
    assert [line["picture"] for line in made] == ["000000_a_fox.png", "000001_a_fox_x.png"]
    wanted = tiny_lavit.draw("a fox x", seed=1, num_inference_steps=1, top_k=300, guidance=1.5)
    assert np.array_equal(np.array(Image.open(world / "out" / "000001_a_fox_x.png")), np.array(wanted))
    with pytest.raises(ConfigError, match="The best of 4 drawings is chosen by a CLIP"):
        BestOf(asked, world / "coco_t2i_eval.json", texts, world / "out").work()
    with pytest.raises(CheckpointError, match="none"):
        task_work(tiny_lavit, Task("text2image", "coco", world / "coco_t2i_eval.json", clip=world / "none"))


def test_text2image_keeps_what_clip_finds_best(world, tiny_folder, clip_folder, capsys):
    command = ["eval", "text2image", "--model", str(tiny_folder), "--device", "cpu", "--captions",
               str(world / "coco_t2i_eval.json"), "--best-of", "2", "--clip", str(clip_folder), "--steps", "1", "--out",
               str(world / "out"), "--batch-size", "2", "--inception", str(world / "none.pth")]
    assert main(command) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    drawn = lines(world / "out")
    assert len(drawn) == COUNT and len(list((world / "out").glob("*.png"))) == COUNT
    assert summary["clip"] == pytest.approx(np.mean([line["clip"] for line in drawn]), abs=1e-3)
    cut = sum(line["cut"] for line in drawn)
    assert cut == 2 and summary["notes"][0] == ("2 captions of 5 had more than the 8 tokens that CLIP reads, and were "
                                                "cut for the choice.")
    assert summary["notes"][1].startswith("FID is not computed (") and "fid" not in summary


@pytest.mark.process
@pytest.mark.slow
def test_two_processes_leave_each_sample_once(world, tiny_lavit_folder):
    """Five samples, two at a time, of two processes: a sampler would have repeated some to make shares even."""
    program = world / "run.py"
    program.write_text("import sys; from seed_multimodal.cli import main; sys.exit(main(sys.argv[1:]))\n")
    arguments = [str(program), "eval", "vqa", "--model", str(tiny_lavit_folder), "--device", "cpu", "--questions",
                 str(world / "val_answerable.json"), "--annotations", str(world / TRUTH), "--dataset", "vizwiz",
                 "--batch-size", "2"]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT / "src")}
    for out, launcher in (("two", ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]), ("one", [])):
        done = subprocess.run([warm_python.PYTHON, *launcher, *arguments, "--out", str(world / out)], env=variables,
                              capture_output=True, text=True, timeout=170)
        assert done.returncode == 0, done.stderr
    whole = read(world / "two" / "results.json")
    assert whole == read(world / "one" / "results.json")
    assert [one["question_id"] for one in whole] == list(range(COUNT))
    shares = [read(world / "two" / f"results_rank{rank}.json") for rank in (0, 1)]
    assert [[one["question_id"] for one in share] for share in shares] == [[0, 1, 4], [2, 3]]
    assert sorted(shares[0] + shares[1], key=lambda one: one["question_id"]) == whole
    assert read(world / "two" / "summary.json") == read(world / "one" / "summary.json")
