"""`seed` commands with a SEED-X folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import get_args

import pytest
from PIL import Image
from tiny.seed_x import build_released_seed_x

from seed_multimodal.cli.common import RATIO_MODES
from seed_multimodal.cli.main import main
from seed_multimodal.errors import ConfigError
from seed_multimodal.images.views import Ratio

pytestmark = pytest.mark.slow


@pytest.fixture
def image(tmp_path) -> str:
    Image.effect_noise((48, 30), 90).convert("RGB").save(tmp_path / "image.png")
    return str(tmp_path / "image.png")


@pytest.fixture
def seed(tiny_x_folder, tmp_path, capsys):
    """Runs a `seed` command and returns its exit code, its records and stderr."""

    def run(*argv: str, model: Path | str = tiny_x_folder) -> tuple[int, list[dict], str]:
        out = () if argv[0] in ("tokenize", "describe", "ask") else ("--out", f"{tmp_path}/out/")
        capsys.readouterr()
        code = main([*argv, *out, *f"--model {model} --device cpu --json".split()])
        captured = capsys.readouterr()
        return code, [json.loads(line) for line in captured.out.splitlines()], captured.err

    return run


def test_describe_ask_and_detect(seed, image):
    short = ("--max-new-tokens", "8")
    assert isinstance(seed("describe", image, *short)[1][0]["description"], str)
    assert (
        seed("ask", image, image, "What is <image>?", *short)[1][1]["question"]
        == "What is <image>?"
    )
    code, _, errors = seed("ask", image, "<image> or <image>?", *short)
    assert code == 1 and "2 <image> placeholders for 1 images" in errors
    code, records, _ = seed("detect", image, "the cat", *short)
    assert code == 0 and bool(records[0]["boxes"]) == (records[0]["drawn"] is not None)


def test_draw_edit_and_reconstruct(seed, image):
    assert get_args(Ratio) == RATIO_MODES
    assert Image.open(seed("draw", "a fish", "--steps", "2")[1][0]["image"]).size == (16, 16)
    for more, size in (((), (20, 13)), (("--ratio", "square"), (16, 16))):
        assert Image.open(seed("edit", image, "Make it red.", *more)[1][0]["edited"]).size == size
        record = seed(
            "reconstruct", image, "--condition", image, "--image-guidance-scale", "2", *more
        )[1][0]
        assert Image.open(record["rebuilt"]).size == size
    assert Image.open(seed("reconstruct", image)[1][0]["rebuilt"]).size == (16, 16)


def test_chat_with_images(seed, image):
    code, answers, _ = seed(
        "chat",
        "--image",
        image,
        "--message",
        "What is it?",
        "--message",
        "And now?",
        "--force-image",
    )
    assert code == 0 and len(answers) == 2
    assert all(any("image" in part for part in answer["answer"]) for answer in answers)
    assert not any("codes" in part for answer in answers for part in answer["answer"])


def test_tokenize_with_a_system_without_codes(seed, image):
    code, _, errors = seed("tokenize", image)
    assert code == 2 and "they have no codes" in errors


def test_ask_a_merged_agent(seed, image, tmp_path, monkeypatch):
    """`llm` and `agent` alone, as `merge_lora_weights.py` writes them, with the original parts in
    `pretrained/`.
    """
    weights = build_released_seed_x(tmp_path / "pretrained")
    (tmp_path / "merged").mkdir()
    for name in ("llm", "agent"):
        (weights / "seed_x_i" / name).rename(tmp_path / "merged" / name)
    monkeypatch.chdir(tmp_path)
    code, answers, _ = seed("ask", image, "What is it?", "--max-new-tokens", "8", model="merged")
    assert code == 0 and isinstance(answers[0]["answer"], str)


def test_encode_of_a_number_of_embeddings(tiny_x, image):
    file = Path(image)
    n = tiny_x.images.encode([file]).shape[1]
    assert tiny_x.images.encode([file], n // 2).shape[1] == n // 2
    for wrong in (0, n + 1):
        with pytest.raises(ConfigError, match="embeddings"):
            tiny_x.images.encode([file], wrong)
