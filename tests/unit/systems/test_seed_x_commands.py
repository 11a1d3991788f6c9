"""The `seed` commands with a SEED-X folder: as with any other, without a flag that says which system it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import get_args

import pytest
from PIL import Image

from seed_multimodal.cli import main
from seed_multimodal.commands.common import KEPT_RATIOS
from seed_multimodal.seed_x.views import Ratio

ROOT = Path(__file__).resolve().parents[3]
FEW = ("--max-new-tokens", "8")
pytestmark = pytest.mark.slow


@pytest.fixture
def shown(tmp_path: Path) -> str:
    file = tmp_path / "shown.png"
    Image.effect_noise((48, 30), 90).convert("RGB").save(file)
    return str(file)


def said(capsys: pytest.CaptureFixture[str]) -> list[dict]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_reading(tiny_x_folder: Path, shown: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    model = ("--model", str(tiny_x_folder), "--device", "cpu", "--json", *FEW)
    assert main(["describe", shown, *model]) == 0
    assert isinstance(said(capsys)[0]["description"], str)
    assert main(["ask", shown, "What is <image>?", *model]) == 0
    assert said(capsys)[0]["question"] == "What is <image>?"
    assert main(["ask", shown, "<image> or <image>?", *model]) == 1
    assert "2 <image> placeholders for 1 pictures" in capsys.readouterr().err
    assert main(["detect", shown, "the cat", *model, "--out", str(tmp_path / "found")]) == 0
    found = said(capsys)[0]
    assert isinstance(found["boxes"], list) and Image.open(found["drawn"]).size == (48, 30)


def test_drawing(tiny_x_folder: Path, shown: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    model = ("--model", str(tiny_x_folder), "--device", "cpu", "--json", "--out", f"{tmp_path}/out/")
    assert main(["draw", "a fish", *model, "--steps", "2"]) == 0
    assert Image.open(said(capsys)[0]["picture"]).size == (16, 16)
    assert main(["edit", shown, "Make it red.", *model]) == 0
    assert Image.open(said(capsys)[0]["edited"]).size == (20, 13)
    assert main(["reconstruct", shown, *model]) == 0
    plain = Image.open(said(capsys)[0]["rebuilt"]).copy()
    assert main(["reconstruct", shown, *model, "--condition", shown]) == 0
    beside = Image.open(said(capsys)[0]["rebuilt"])
    assert plain.size == (16, 16) and beside.size == (20, 13)


def test_conversations(tiny_x_folder: Path, shown: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["chat", "--model", str(tiny_x_folder), "--device", "cpu", "--json", "--image", shown, "--message",
                 "What is it?", "--message", "And now?", "--force-image", "--out", str(tmp_path)]) == 0
    answers = said(capsys)
    assert len(answers) == 2 and all(any("picture" in part for part in one["answer"]) for one in answers)
    assert not any("codes" in part for one in answers for part in one["answer"])  # there are none


def test_the_ratio_of_what_is_drawn_beside_a_picture(tiny_x_folder: Path, shown: str, tmp_path: Path,
                                                     capsys: pytest.CaptureFixture[str]) -> None:
    model = ["--model", str(tiny_x_folder), "--device", "cpu", "--json", "--out", str(tmp_path)]
    assert get_args(Ratio) == KEPT_RATIOS
    for ratio, size in (("square", (16, 16)), ("restore", (20, 13))):
        for command in (["edit", shown, "--ratio", ratio, "Make it red."],
                        ["reconstruct", shown, "--condition", shown, f"--ratio={ratio}"]):
            assert main([*command, *model, "--image-guidance-scale", "2"]) == 0
            done = said(capsys)[0]
            assert Image.open(done.get("edited") or done["rebuilt"]).size == size
    assert main(["edit", shown, "Make it red.", *model, "--image-guidance-scale", "nan"]) == 2


@pytest.mark.parametrize(("words", "sentence"), [
    (["tokenize", "PICTURE"], "they have no codes"),
    (["reconstruct", "PICTURE", "--codes", "2"], "they have no codes"),
    (["draw", "a fish", "--codes", "2"], "draws from features, not from codes"),
])
def test_what_needs_codes_is_refused(
    tiny_x_folder: Path, shown: str, capsys: pytest.CaptureFixture[str], words: list[str], sentence: str
) -> None:
    given = [shown if word == "PICTURE" else word for word in words]
    assert main([*given, "--model", str(tiny_x_folder), "--device", "cpu"]) == 2
    assert sentence in capsys.readouterr().err


def test_other_systems_find_nothing(tiny_folder: Path, shown: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["detect", shown, "the cat", "--model", str(tiny_folder), "--device", "cpu"]) == 2
    assert "SEED-X can" in capsys.readouterr().err
    assert main(["reconstruct", shown, "--condition", shown, "--model", str(tiny_folder), "--device", "cpu"]) == 2
    assert "second stage" in capsys.readouterr().err


def test_a_merged_agent_s_folder_by_its_name(tmp_path: Path, shown: str, monkeypatch: pytest.MonkeyPatch,
                                             capsys: pytest.CaptureFixture[str]) -> None:
    """`llm` and `agent` alone, as `merge_lora_weights.py` leaves them, beside the released parts."""
    import tiny_seed_x

    home = tiny_seed_x.build_released(tmp_path / "pretrained")
    (tmp_path / "mine").mkdir()
    for name in ("llm", "agent"):
        (home / "seed_x_i" / name).rename(tmp_path / "mine" / name)
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()  # what libraries say while the parts are made
    assert main(["ask", shown, "What is it?", "--model", "mine", "--device", "cpu", "--json", *FEW]) == 0
    assert isinstance(said(capsys)[0]["answer"], str)


@pytest.mark.parametrize(("name", "folder"), [
    ("seed-x", "seed_x"), ("seed-x-i", "seed_x_i"), ("seed-x-edit", "seed_x_edit"),
    ("AILab-CVC/SEED-X-17B", "seed_x_i")])
def test_without_the_weights_one_sentence_says_what_to_put_where(
    name: str, folder: str, shown: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if (ROOT / "pretrained" / folder).exists():
        pytest.skip("the released weights are on this disk")
    assert main(["describe", shown, "--model", name, "--device", "cpu"]) == 2
    told = capsys.readouterr()
    assert told.out == "" and told.err.count("\n") == 1
    for part in (f"pretrained/{folder}/llm", f"pretrained/{folder}/agent", "pretrained/QwenViT", "reload_qwen_vit.py",
                 "AILab-CVC/SEED-X-17B", "runs now"):
        assert part in told.err
