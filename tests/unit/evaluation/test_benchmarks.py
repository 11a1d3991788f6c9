"""Every benchmark through its command: recorded answers are scored as the papers' programs do.

The answers lie in OUT/samples-0.jsonl as a stopped run leaves them, so that nothing is generated;
the scores are computed by hand.
"""

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from data_files import write_any
from random_images import noise
from tiny import read_json

from seed_multimodal.cli.main import main


@dataclass
class Recorded:
    """A command, its files, recorded lines, and what summary.json and results.json hold of them.

    n_images: drawings of each prompt, which are judged.
    """

    command: str
    files: dict
    lines: list[dict]
    summary: dict
    results: dict[str, list] = field(default_factory=dict)
    n_images: int = 0
    status: int = 0


def annotated(*answers: str) -> list[dict[str, str]]:
    return [{"answer": answer} for answer in answers]


def question(key: int, **fields) -> dict:
    return {"question_id": key, "image": "a.jpg", "question": "Which?", **fields}


def answer(key: int, text) -> dict:
    return {"id": key, "answer": text}


CHOICES = {f"choice_{letter}": f"no. {letter}" for letter in "abcd"}
BENCHMARKS = {
    # Three of ten annotators agree: each of them has two others (2/3), each other one three (1).
    "vqav2": Recorded(
        "vqa --questions q.json --annotations a.json",
        {
            "q.json": {"questions": [question(1), question(2), question(3), question(4)]},
            "a.json": {
                "annotations": [
                    {"question_id": 1, "answers": annotated(*["2 dogs"] * 10)},
                    {"question_id": 2, "answers": annotated(*["dogs"] * 3, *["cats"] * 7)},
                    {"question_id": 3, "answers": annotated("red", *["blue"] * 9)},
                    {"question_id": 4, "answers": annotated(*["yes"] * 10), "answer_type": "y/n"},
                ]
            },
        },
        # The fourth is not answered, and has no image: it counts as wrong.
        [answer(1, "Two dogs!"), answer(2, "the dogs"), answer(3, "red")],
        {"accuracy": 55.0, "per_answer_type": {"y/n": 0.0}, "answered": 3, "bad": 1},
        {"answer": ["Two dogs!", "the dogs", "red", ""], "question_id": [1, 2, 3, 4]},
        status=1,
    ),
    # One answer that is a number, or none, does not remove the accuracy of the others.
    "one's own list": Recorded(
        "vqa --questions q.jsonl",
        {
            "q.jsonl": [
                question(1, answer=2),
                question(2, answer=True),
                question(3, answers=[], answer=["A fox", "The fox"]),
                question(4),
            ]
        },
        [answer(1, "two"), answer(2, "No."), answer(3, "a fox"), answer(4, "x")],
        {"accuracy": 66.67, "answered": 3, "bad": 1},
        {"answer": ["two", "No.", "a fox"], "question_id": [1, 2, 3]},
        status=1,
    ),
    "gqa": Recorded(
        "vqa --dataset gqa --questions q.json",
        {"q.json": [question(1, answer="red"), question(2, answer="no")]},
        [answer(1, "Red."), answer(2, "not")],
        {"accuracy": 50.0},
        {"questionId": [1, 2], "prediction": ["Red.", "not"]},
    ),
    # An image without answer has an empty caption: BLEU's penalty is exp(1 - 8 words / 4 words).
    "captions": Recorded(
        "caption --captions c.json",
        {
            "c.json": [
                {"image": "1.jpg", "caption": ["two horses", "A man rides horses."]},
                {"image": "2.jpg", "caption": "two dogs play outside"},
            ]
        },
        [{"id": 1, "caption": "a man rides horses"}],
        {"Bleu_1": 0.3679, "Bleu_4": 0.3679, "ROUGE_L": 0.5, "bad": 1},
        {"image_id": [1, 2], "caption": ["a man rides horses", ""]},
        status=1,
    ),
    "seedbench": Recorded(
        "seedbench --questions q.json",
        {
            "q.json": {
                "questions": [
                    {**question(key, answer=letter), **CHOICES, "data_id": "a", **more}
                    for key, letter, more in (
                        (1, "A", {"question_type_id": 3}),
                        (2, "B", {}),
                        (3, "C", {"data_type": "video"}),
                    )
                ],
                "question_type": {"Scenes": 3},
            }
        },
        [answer(1, "A"), answer(2, "A")],
        {"accuracy": 50.0, "per_question_type": {"Scenes": 100.0}, "samples": 2},
        {"question_id": [1, 2], "prediction": ["A", "A"]},
    ),
    "geneval2": Recorded(
        "geneval2 --data p.jsonl --judge nano --num-images 1",
        {
            "p.jsonl": [
                {
                    "prompt": "two foxes",
                    "vqa_list": [["Fox?", "yes"], ["How many?", "two"]],
                    "skills": ["object", "count"],
                    "atom_count": 2,
                }
            ]
        },
        [{"id": 0, "probabilities": [[0.9, 0.4]]}],
        {
            "soft_tifa_am": {"value": 65.0, "low": 65.0, "high": 65.0, "n": 1},
            "soft_tifa_gm": {"value": 60.0, "low": 60.0, "high": 60.0, "n": 1},
            "am_per_skill": {"count": 40.0, "object": 90.0},
            "gm_per_atoms": {"2": 60.0},
        },
        n_images=1,
    ),
    # The red of a fox that is not there does not count, nor what depends on its red.
    "dpg": Recorded(
        "dpg --data d.csv --judge nano --num-images 1",
        {
            "d.csv": (
                "item_id,text,proposition_id,dependency,tuple,question_natural_language\n"
                "a,a fox,1,0,entity - whole (fox),Is there a fox?\n"
                'a,a fox,2,1,"attribute - color (fox, red)",Is it red?\n'
                'a,a fox,3,2,"attribute - other (red, dark)",Is the red dark?\n'
                "a,a fox,4,0,entity - whole (tree),Is there a tree?\n"
            )
        },
        [{"id": "a", "probabilities": [[0.5, 0.9, 0.9, 0.6]]}],
        {
            "dpg": {"value": 25.0, "low": 25.0, "high": 25.0, "n": 1},
            "per_category": {"attribute": 100.0, "entity": 50.0},
        },
        {"item_id": ["a"], "scores": [[0.25]]},
        n_images=1,
    ),
}


def evaluate(case: Recorded, lines: list[dict], model: Path) -> int:
    """The command with these answers, in the working folder."""
    for name, content in case.files.items():
        write_any(Path(name), content)
    out = Path("out")
    out.mkdir()
    write_any(out / "samples-0.jsonl", lines)
    # Drawings whose judgement is recorded are still there, as the two benchmarks name them.
    for index, line in enumerate(lines):
        for number in range(case.n_images):
            file = out / "images" / f"{index:05d}" / "samples" / f"{number:04d}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            noise(number, (8, 8)).save(file)
            shutil.copy(file, out / "images" / f"{line['id']}.png")
    argv = ["eval", *case.command.split(), "--out", "out", "--device", "cpu"]
    return main([*argv, "--model", str(model)])


@pytest.fixture(autouse=True)
def working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "")  # without Java


@pytest.mark.parametrize("case", BENCHMARKS.values(), ids=BENCHMARKS)
def test_eval_scores_recorded_answers(case, tiny_folder, capsys):
    # Figures next to the papers' must be computed as theirs.
    assert evaluate(case, case.lines, tiny_folder) == case.status
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    summary = read_json(Path("out/summary.json"))
    assert printed == summary
    assert {name: summary[name] for name in case.summary} == case.summary
    results = read_json(Path("out/results.json"))
    columns = {name: [result[name] for result in results] for name in case.results}
    assert columns == case.results


@pytest.mark.parametrize("case", BENCHMARKS.values(), ids=BENCHMARKS)
def test_eval_refuses_numbers_that_are_not_finite(case, tiny_folder, capsys):
    # NaN compares as nothing does: a diverged model would get some score, often a perfect one.
    lines = [{**line, "probabilities": [[float("nan")] * 4]} for line in case.lines]
    assert evaluate(case, lines, tiny_folder) == 2
    assert "not finite" in capsys.readouterr().err
    assert not Path("out/summary.json").exists()
