"""LaVIT's published evaluation, with a tiny LaVIT and with another system: files, rules, processes, drawings."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import warm_python
from PIL import Image

from seed_multimodal.cli import main
from seed_multimodal.data.formats.benchmark_files import Annotation, Annotations
from seed_multimodal.data.formats.caption_files import read_captions
from seed_multimodal.errors import CheckpointError, ConfigError, ImageError
from seed_multimodal.evaluation.asking import AnySystem, model_facts
from seed_multimodal.evaluation.benchmark_work import ANSWERABLE, QuestionRules, unreachable
from seed_multimodal.evaluation.drawing_work import BestOf
from seed_multimodal.evaluation.lavit_tasks import Task, find_truth, question_rules, question_words, run_task, task_work
from seed_multimodal.evaluation.picture_scores import Distance
from seed_multimodal.language.lavit import QuestionProcessor
from seed_multimodal.systems.lavit_files import find_lavit

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
    asked = [tiny_lavit.ask(picture, text, seed=42) for text in ('Is the question: "What is No. 3?" answerable?',
                                                                 "What is No. 3?")]
    line = next(line for line in lines(world / "out") if line["id"] == 3)
    assert (line["answerable"], line["answer"]) == (
        asked[0], "unanswerable" if rules.refuses(asked[0]) else asked[1].removesuffix("."))


def test_only_the_published_lavit_is_asked_in_the_words_of_its_evaluation(tiny_lavit, monkeypatch):
    """nano-lavit learnt questions as they are written: in lower case it got 0.58 of its questions right, not 0.88."""
    assert question_words(tiny_lavit)("What is No. 3?") == "What is No. 3?"
    monkeypatch.setattr(tiny_lavit, "spec", replace(tiny_lavit.spec, released=True))
    assert question_words(tiny_lavit)("What is No. 3?") == "what is no 3?"


def test_the_request_around_a_question_is_not_made_plain(tiny_lavit):
    """The set's rules for questions hold for the question, and so does their limit of 50 words."""
    class Echo:
        spec, llm = tiny_lavit.spec, tiny_lavit.llm

        def ask_all(self, seen, texts):
            return texts

    asked = AnySystem(Echo(), question=QuestionProcessor())
    said, = asked.ask(["picture"], ["What: " + "so " * 60], ANSWERABLE)
    assert said == f'Is the question: "what {"so " * 48}so" answerable?'


def test_questions_that_no_answer_gets_right_are_told(tmp_path):
    answers = {0: ["a red fox"] * 10, 1: ["fox"], 2: ["fox"] * 10, 3: ["Yes"] * 10}
    write(tmp_path / "a.json", [{"image": "x.jpg", "question": "What?", "question_id": key, "answers": several}
                               for key, several in answers.items()])
    annotated = Annotations(tmp_path / "a.json")
    few, lost = unreachable(list(answers), annotated, QuestionRules())
    assert few.startswith("1 question of 4 (first 1) have fewer than 4 annotated answers")
    assert lost.startswith("No answer can be right for 2 questions of 4 (first 0)")
    assert unreachable([2], annotated, QuestionRules()) == []
    assert unreachable([1, 2], annotated, QuestionRules(exact=True)) == []  # one right answer is enough there
    lower, = unreachable([0, 2, 3], annotated, QuestionRules(lavit=True, lemmas=str))  # lemmas are in lower case
    assert lower.startswith("No answer can be right for 1 question of 3")


def test_a_model_that_was_trained_again_in_its_folder_is_another(tiny_lavit, tiny_lavit_folder, tmp_path):
    copy = Path(shutil.copytree(tiny_lavit_folder, tmp_path / "copy"))
    system = SimpleNamespace(llm=tiny_lavit.llm, spec=find_lavit(copy))
    before = model_facts(system)
    assert model_facts(system) == before
    for part in ("llm", "decoder", "pixels/unet"):
        file = next((copy / part).glob("*.safetensors"))
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
        again = model_facts(system)
        assert {key for key in again if again[key] != before[key]} == {"weights"}, part
        before = again


def test_a_real_picture_that_cannot_be_read_is_told_before_drawing(world, tiny_lavit):
    """FID needs it when all is drawn; then nothing could be summed up."""
    texts = read_captions(world / "coco_t2i_eval.json")
    broken = world / "VizWiz_val_00000001.jpg"
    broken.write_bytes(broken.read_bytes()[:200])
    best = BestOf(AnySystem(tiny_lavit), world / "coco_t2i_eval.json", texts, world, count=1, distance=Distance())
    assert best.read(0) == (0, "a fox")
    with pytest.raises(ImageError, match="VizWiz_val_00000001"):
        best.read(1)


def test_each_text_of_a_list_is_drawn(world, tiny_lavit):
    """COCO's prompts name some pictures twice; PartiPrompts names none."""
    picture = "VizWiz_val_00000001.jpg"
    write(world / "list.json", [{"image": picture, "text": "a"}, {"image": picture, "text": "b"}, {"text": "c"},
                                {"image": picture, "text": " "}])
    texts = read_captions(world / "list.json", drawn=True)
    assert [(one.key, one.picture, one.captions) for one in texts if not one.problem] == [
        (1, picture, ["a"]), ("item 1", picture, ["b"]), ("item 2", "", ["c"])]
    assert [one.key for one in texts if one.problem] == ["item 3"]
    assert [one.captions for one in read_captions(world / "list.json") if not one.problem] == [["a", "b"]]
    write(world / "several.json", [{"image": picture, "caption": text} for text in "ab"])
    assert [one.captions for one in read_captions(world / "several.json", drawn=True)] == [["a", "b"]]
    network = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    network.num_features = 3
    best = BestOf(AnySystem(tiny_lavit), world / "list.json", texts, world, 1, distance=Distance(8, None, network))
    drawn = [{"id": key, "picture": picture} for key in (1, "item 1", "item 2")]
    bad = {"id": "item 3", "bad": "empty"}
    assert best.numbers([*drawn, bad])["notes"] == [
        f"FID is not computed: {world / 'list.json'} names no picture for 1 of 3 captions."]
    assert best.numbers([*drawn[:2], bad])["fid"] == pytest.approx(0, abs=1e-2)  # the text that is bad needs none


def test_gqas_answers_are_right_or_wrong_and_missing_spacy_is_told(world, tiny_lavit, capsys):
    names = sorted(path.stem for path in world.glob("*.jpg"))
    said = [tiny_lavit.ask(Image.open(world / f"{name}.jpg"), "Is it?", seed=42) for name in names]
    write(world / "gqa.json", {str(number): {"imageId": name, "question": "Is it?", "answer": answer, "types": {}}
                               for number, (name, answer) in enumerate(zip(names, [*said[:2], "x", "y", "z"],
                                                                           strict=True))})
    summary = run_task(tiny_lavit, Task("vqa", "gqa", world / "gqa.json", out=world / "out", batch=3))
    assert summary is not None
    spaced = all(" " not in one and one for one in said[:2])
    assert summary["accuracy"] >= (40.0 if spaced else 0.0) and [one["answer"] for one in
                                                                 read(world / "out" / "gqa.json")] == said
    assert read(world / "out" / "gqa.json")[0].items() >= {"questionId": "0", "prediction": said[0]}.items()
    if "notes" in summary:
        assert "spaCy or its model" in summary["notes"][0] and summary["notes"][0] in capsys.readouterr().err


@pytest.mark.process
def test_captions_as_published_with_the_truth_beside_them(world, tiny_lavit):
    summary = run_task(tiny_lavit, Task("caption", "nocaps", world / "nocaps_val.json", out=world / "out"))
    assert summary is not None and {"CIDEr", "Bleu_4", "ROUGE_L"} <= set(summary)
    found = read(world / "out" / "nocaps.json")
    assert [one["image_id"] for one in found] == list(range(COUNT))
    alone = tiny_lavit.describe(world / "VizWiz_val_00000002.jpg", seed=42)
    assert found[2]["caption"] == alone  # neighbours change nothing
    assert ("METEOR" in summary) or any("METEOR" in note and "Java" in note for note in summary["notes"])
    first = run_task(tiny_lavit, Task("caption", "nocaps", world / "nocaps_val.json", out=world / "out", limit=1))
    assert first is not None and first["CIDEr"] == 0 and first["notes"][0].startswith("CIDEr of a single picture is 0")


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
