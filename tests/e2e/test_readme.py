"""The README's commands on its images: texts and boxes are compared, drawings are labelled by the
judge."""

import re
import runpy
import shlex
from pathlib import Path

import pytest
from PIL import Image
from repository import ROOT
from yaml_tables import read_tables

from seed_multimodal.cli.main import main
from seed_nano.world.scene import Scene, boxes
from seed_nano.world.words import normalise

BOTH = Scene("fluent", "meadow", "left of", ("fox", "snowman"))
SHOWN = read_tables(__file__)
# It fills the image more than the things of the training do: nano-x sees a magnet.
MISREAD = {"nano-x": ("alarm_clock.png",)}
SAID = {
    'seed ask images/fox_and_snowman.png "What is on the left?"': "a fox",
    "seed describe images/fox.png --model nano-lavit": SHOWN["fox.png"],
}
SWAP_COMMAND = (
    'seed edit images/fox_and_snowman.png "Swap the fox and the snowman." --out outputs/swapped.png'
)
DRAWN = {
    'seed draw "two noto pandas on a pink background" --out outputs/pandas.png': Scene(
        "noto", "pink", "many", ("panda",), (2,)
    ),
    SWAP_COMMAND: BOTH.with_changes(things=("snowman", "fox")),
    'seed edit images/fox.png "Put it at night." --model nano-x --out outputs/night.png': Scene(
        "twemoji", "night", "large", ("fox",)
    ),
}
pytestmark = pytest.mark.slow
MODELS = [
    "nano",
    *(pytest.param(name, marks=pytest.mark.nightly) for name in ("nano-x", "nano-lavit")),
]
DETECT_COMMAND = 'seed detect images/fox_and_snowman.png "the snowman" --model nano-x'


@pytest.fixture
def work_dir(tmp_path, monkeypatch) -> Path:
    (tmp_path / "images").symlink_to(ROOT / "images")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(command: str, capsys) -> str:
    """What a command of the README prints."""
    assert command in (ROOT / "README.md").read_text(encoding="utf-8"), command
    assert main(shlex.split(command)[1:]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("model", MODELS)
def test_describe_names_every_image_of_the_readme(model, work_dir, capsys):
    assert main(["describe", *(f"images/{name}" for name in SHOWN), "--model", model]) == 0
    lines = capsys.readouterr().out.strip().splitlines()
    descriptions = {
        line.split(": ")[0].removeprefix("images/"): normalise(line.split(": ")[1])
        for line in lines
    }
    descriptions |= {name: SHOWN[name] for name in MISREAD.get(model, ())}
    assert descriptions == SHOWN


@pytest.mark.parametrize("command", SAID)
def test_commands_of_the_readme_answer(command, work_dir, capsys):
    assert normalise(run(command, capsys).strip().split(": ")[-1]) == SAID[command]


@pytest.mark.parametrize("model", MODELS)
def test_ask_binds_names_to_places(model, work_dir, capsys):
    answers = {}
    for question in (
        "Where is the fox?",
        "Where is the snowman?",
        "Is there a snowman in the picture?",
        "Is there a whale in the picture?",
    ):
        assert main(["ask", "images/fox_and_snowman.png", question, "--model", model]) == 0
        answers[question] = normalise(capsys.readouterr().out.strip().split(": ")[-1])
    assert list(answers.values()) == ["on the left", "on the right", "yes", "no"]


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(command, marks=[pytest.mark.nightly] if "nano-x" in command else [])
        for command in DRAWN
    ],
)
def test_drawings_of_the_readme_show_what_was_asked_for(command, work_dir, capsys):
    from seed_nano.report.judge import Judge
    from seed_nano.report.scoring import image_labels, true_labels

    run(command, capsys)
    picture = Image.open(work_dir / command.rpartition("--out ")[2])
    judge = Judge.from_pretrained(ROOT / "pretrained/nano/judge")
    assert image_labels(judge, [picture]) == true_labels([DRAWN[command]])


def test_detect_boxes_the_named_thing_and_no_absent_one(work_dir, capsys):
    from seed_nano.report.scoring import count_matches

    corners = run(DETECT_COMMAND, capsys).split(": ")[1].split(" (")[0].split()
    true = next(box for name, box in boxes(BOTH) if name == "snowman")
    assert count_matches([[int(value) / 256 for value in corners]], [true])
    assert main(["detect", "images/fox_and_snowman.png", "the whale", "--model", "nano-x"]) == 0
    assert "there is no whale" in capsys.readouterr().out


def test_the_pipeline_of_transformers_draws(work_dir):
    (work_dir / "pretrained").symlink_to(ROOT / "pretrained")
    blocks = re.findall("```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    [code] = [block for block in blocks if "any-to-any" in block]
    (work_dir / "program.py").write_text(code)
    pipe = runpy.run_path("program.py")["pipe"]
    expected = pipe.model.system.draw("a noto fox in a meadow")
    assert Image.open("fox.png").tobytes() == expected.tobytes()
