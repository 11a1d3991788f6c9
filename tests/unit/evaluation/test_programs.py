"""`seed eval` and the evaluation programs of MultiModalLLM and LaVIT: runs that are shared, stopped
or damaged, and the originals' flags."""

import json
import shutil
from pathlib import Path

import pytest
from full_disk import file_size_limit
from PIL import Image
from random_images import noise
from tiny import read_json, write_json

from seed_multimodal.cli.evaluate import eval_program
from seed_multimodal.cli.main import main
from seed_multimodal.compat.lavit_evaluate import evaluate_script
from seed_multimodal.evaluation import benchmark

N_IMAGES = 3


def image_name(number) -> str:
    return f"COCO_val2014_{number:012d}.jpg"


@pytest.fixture(autouse=True)
def data(tmp_path, monkeypatch):
    """Three COCO images in the working folder, two questions about each, and captions."""
    monkeypatch.chdir(tmp_path)
    questions = []
    answers = []
    captions = []
    for number in range(1, N_IMAGES + 1):
        noise(number, (32, 24)).save(image_name(number))
        captions.append({"image": image_name(number), "caption": f"a fox {number}"})
        for key in (10 * number, 10 * number + 1):
            questions.append(
                {"question_id": key, "image_id": number, "question": f"What is {key}?"}
            )
            answers.append({"question_id": key, "answers": [{"answer": "yes"}] * 10})
    write("q.json", {"questions": questions})
    write("a.json", {"annotations": answers})
    write("c.json", captions)


def write(name, value):
    write_json(Path(name), value)


def read(name):
    return read_json(Path(name))


def answered(file) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines() if line]


def vqa(model: Path, *more: str, out: str = "out") -> int:
    flags = "--questions q.json --annotations a.json --images . --device cpu --batch-size 2"
    argv = [*flags.split(), "--model", str(model), "--out", out, *more]
    return eval_program("eval_vqa.py", "", argv)


def test_eval_vqa_by_two_processes_equals_one(tiny_folder, monkeypatch):
    # A run that is shared by processes would score some questions twice, or not.
    assert vqa(tiny_folder) == 0
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("1", "0"):
        # Only the last process writes results.
        assert not Path("two/summary.json").exists()
        monkeypatch.setenv("RANK", rank)
        assert vqa(tiny_folder, out="two") == 0
    shares = [answered(file) for file in sorted(Path("two").glob("samples-*.jsonl"))]
    assert [[line["id"] for line in share] for share in shares] == [[10, 20, 30], [11, 21, 31]]
    results = read("out/results.json")
    assert [result["question_id"] for result in results] == [10, 11, 20, 21, 30, 31]
    assert read("two/results.json") == results


def test_eval_vqa_resumes_after_a_full_disk(tiny_folder, capsys):
    # Hours of answers would be lost, or counted twice.
    assert vqa(tiny_folder) == 0
    # The disk is full within the lines of the second batch.
    assert vqa(tiny_folder, "--limit", "2", out="torn") == 0
    with file_size_limit(Path("torn/samples-0.jsonl").stat().st_size + 10):
        assert vqa(tiny_folder, out="torn") == 2
    assert "torn/samples-0.jsonl" in capsys.readouterr().err
    assert vqa(tiny_folder, out="torn") == 0
    for name in ("results.json", "summary.json"):
        assert read(f"torn/{name}") == read(f"out/{name}")
    # What was answered is not answered again.
    lines = Path("torn/samples-0.jsonl").read_text()
    assert [lines.count(f'"id": {key},') for key in (10, 11)] == [1, 1]


def test_answers_are_made_again_where_what_they_were_made_from_changed(tiny_folder, tmp_path):
    # Else scores mix answers about two images, or to two questions.
    Path("questions").mkdir()
    items = read("q.json")["questions"]
    for item in items:
        write(f"questions/{item['question_id']}.json", [item])
    command = "eval vqa --questions questions/*.json --images . --device cpu --out out"
    command += f" --model {tiny_folder}"

    def lines() -> list[int]:
        assert main(command.split()) == 0
        return [line["id"] for line in answered(Path("out/samples-0.jsonl"))]

    assert lines() == lines() == [10, 11, 20, 21, 30, 31]
    noise(9, (32, 24)).save(image_name(2))
    assert lines()[6:] == [20, 21]
    write("questions/31.json", [{**items[5], "question": "What is new?"}])
    assert lines()[8:] == [31]
    assert lines()[9:] == []


def test_images_of_a_tar_are_read_once_for_their_digests(tiny_folder, monkeypatch):
    # Answers are read before and after those that are missing are made.
    reads: list[str] = []
    read_image = benchmark.sample_image

    def counted(sample, *where):
        reads.append(sample.key)
        return read_image(sample, *where)

    assert vqa(tiny_folder) == 0
    monkeypatch.setattr(benchmark, "sample_image", counted)
    assert vqa(tiny_folder) == 0
    assert sorted(reads) == [10, 11, 20, 21, 30, 31]


def test_another_prompt_of_the_model_is_refused(tiny_folder, tmp_path, capsys):
    copy = shutil.copytree(tiny_folder, tmp_path / "copy", copy_function=shutil.copy2)
    assert vqa(copy) == 0
    values = read_json(copy / "system.json")
    write_json(copy / "system.json", {**values, "template": "plain"})
    assert vqa(copy) == 2
    assert "settings of the model" in capsys.readouterr().err


def test_eval_vqa_counts_bad_samples_and_retries_them(tiny_folder, capsys):
    # A damaged image would end a run of days, or go unnoticed in the score.
    questions = read("q.json")
    del questions["questions"][2]["question"]
    write("q.json", questions)
    image = Path(image_name(1))
    content = image.read_bytes()
    image.write_bytes(content[:200])
    Path(image_name(3)).unlink()
    assert vqa(tiny_folder) == 1
    # Each bad sample is named; those of a batch with it are answered.
    log = capsys.readouterr().err
    for name in ("q.json: item 2", image_name(1), "item 4", image_name(3)):
        assert name in log
    summary = read("out/summary.json")
    assert (summary["answered"], summary["bad"], len(summary["bad_first"])) == (1, 5, 5)
    image.write_bytes(content)
    assert vqa(tiny_folder) == 1
    assert read("out/summary.json")["bad"] == 3


@pytest.mark.parametrize("missing, status", [((1, 2, 3), 2), ((1, 3), 1)])
def test_eval_vqa_ends_after_many_bad_samples_in_a_row(missing, status, tiny_folder):
    # Two images with two questions each are missing; the one between them ends the row.
    for number in missing:
        Path(image_name(number)).unlink()
    assert vqa(tiny_folder, "--max_bad", "3", "--batch-size", "12") == status


@pytest.mark.parametrize(
    "change, name",
    [("--prompts plain", "prompts"), ("", "samples")],
)
def test_eval_vqa_refuses_the_folder_of_another_run(change, name, tiny_folder, capsys):
    """Answers of two settings, or to other questions, would be scored together."""
    assert vqa(tiny_folder, "--limit", "2") == 0
    assert vqa(tiny_folder, "--limit", "3") == 0  # more samples are the same run
    if not change:
        Path("q.json").write_text(Path("q.json").read_text().replace("What", "Whom"))
    assert vqa(tiny_folder, *change.split()) == 2
    assert name in capsys.readouterr().err
    assert len(answered(Path("out/samples-0.jsonl"))) == 3


def test_eval_caption_of_the_pretrained_model(tiny_folder, monkeypatch):
    # The original's program with its flags.
    monkeypatch.setenv("PATH", "")  # without Java
    flags = f"--model {tiny_folder} --captions c.json --prompts plain --num-beams 2 --device cpu"
    assert eval_program("eval_caption.py", "", [*flags.split(), "--out", "out"]) == 0
    assert {"Bleu_4", "ROUGE_L", "CIDEr"} <= set(read("out/summary.json"))
    results = read("out/results.json")
    assert [result["image_id"] for result in results] == [1, 2, 3]
    # It continues with a question of its own, which is no part of the caption.
    assert not any("\n" in result["caption"] for result in results)


def test_eval_caption_to_images_names_files_by_their_texts(tiny_folder):
    # The original's program; texts with slashes or of any length are file names.
    Path("t.txt").write_text("a blue fish / or two\na red apple\n" + "long " * 60)
    argv = f"--model {tiny_folder} --device cpu --captions t.txt --steps 1 --out out".split()
    assert eval_program("eval_caption_to_images.py", "", argv) == 0
    names = [result["image"] for result in read("out/results.json")]
    assert names == [
        "000000_a_blue_fish___or_two.jpg",
        "000001_a_red_apple.jpg",
        f"000002_{'long_' * 11}long_.jpg",
    ]
    assert all(Image.open(f"out/{name}").width for name in names)


def test_text2image_selects_by_clip(tiny_folder, clip_folder):
    # One drawing of each text is kept, and scored.
    argv = (
        f"eval text2image --model {tiny_folder} --device cpu --captions c.json --steps 1 --out out "
        f"--best-of 2 --clip {clip_folder} --inception none.pth"
    )
    assert main(argv.split()) == 0
    summary = read("out/summary.json")
    lines = answered(Path("out/samples-0.jsonl"))
    assert len(list(Path("out").glob("*.png"))) == N_IMAGES
    assert summary["clip"] == pytest.approx(sum(line["clip"] for line in lines) / 3, abs=1e-3)
    assert summary["clip_image"] <= 1
    # Without Inception's weights there is no FID, and a note about them.
    assert "fid" not in summary
    assert "none.pth" in summary["notes"][0]


def test_evaluate_of_vizwiz_asks_first_if_a_question_is_answerable(tiny_lavit_folder, tiny_lavit):
    # LaVIT's program with its flags; without the first question its published scores are not met.
    asked = {"image": image_name(3), "question": "What?", "question_id": 3, "answer": "a fox"}
    write("v.json", [asked])
    flags = (
        f"--task_name vqa --dataset vizwiz --model_path {tiny_lavit_folder} --model_dtype fp32 "
        "--device cpu --imagepath . --annopath v.json --out out"
    )
    assert evaluate_script("", flags.split()) == 0
    [line] = answered(Path("out/samples-0.jsonl"))
    image = Image.open(image_name(3))
    first = tiny_lavit.ask(image, 'Is the question: "What?" answerable?', seed=42)
    assert (line["id"], line["answerable"]) == (3, first)
