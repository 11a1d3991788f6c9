"""The model card: every stage's record is found, in the work folder or in the application's own folders."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from seed_multimodal.errors import DataError
from seed_multimodal.weights import save_state_dict
from seed_nano.report.card import write_card

DATA = Path(__file__).resolve().parents[3] / "data" / "nano"


def record(work: Path, place: str, **values: object) -> None:
    file = work / place
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"seconds": 7.0, **values}))


@pytest.mark.process
def test_records_of_both_places_are_rows(tmp_path: Path) -> None:
    work, model = tmp_path / "work", tmp_path / "model"
    save_state_dict({"weight": torch.zeros(3, 4)}, model / "part" / "model.safetensors")
    record(work, "vae.done.json", stage="vae", steps=4, batch_size=8, psnr=20.5)
    record(work, "stage2/stage2.done.json", stage="stage2", steps=10, batch_size=16, loss_embed=0.25,
           checkpoint="/somewhere/checkpoint_0.pth", bad_samples=0)
    record(work, "tokenizer.done.json", stage="tokenizer", parameters=1234, codes_used=31, codebook=32)
    text = write_card(model, work, DATA, "the command").read_text()
    assert "system: a picture of a scene" in text
    assert "Not run: clip, stage1, unet, unet2, pretrain, sft, judge." in text
    (model / "system.json").write_text('{"image_size": 96}')
    text = write_card(model, work, DATA, "the command").read_text()
    assert "system: a 96 px picture of a scene" in text
    assert "| vae | 4 × 8 | 7 | – | psnr 20.5 |" in text
    assert "| stage2 | 10 × 16 | 7 | – | loss_embed 0.25, bad_samples 0 |" in text
    assert "| tokenizer | – | 7 | 1,234 | codes_used 31, codebook 32 |" in text
    assert "| `part` | 12 |" in text
    assert "scenes of 162 things in the styles noto, twemoji, fluent" in text and "pairs 15%" in text
    assert "Twemoji, copyright Twitter, Inc and other contributors (CC-BY-4.0)" in text and "Knows 150 things" in text


@pytest.mark.process  # the card names the machine
def test_damaged_records_and_missing_folders_are_refused(tmp_path: Path) -> None:
    for content, sentence in (("[1]", "must hold a json object"), ('{"seconds": 1}', "it has no key 'stage'")):
        (tmp_path / "vae.done.json").write_text(content)
        with pytest.raises(DataError, match=sentence):
            write_card(tmp_path, tmp_path, DATA, "the command")
    record(tmp_path, "vae.done.json", stage="vae")
    with pytest.raises(DataError, match=r"nowhere/README\.md: cannot be written"):
        write_card(tmp_path / "nowhere", tmp_path, DATA, "the command")


@pytest.mark.process
def test_a_lavits_card_names_its_own_script_and_work_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = tmp_path / "pretrained" / "nano-lavit"
    save_state_dict({"weight": torch.zeros(3, 4)}, model / "llm" / "model.safetensors")
    (model / "system.json").write_text('{"system": "lavit"}')
    record(tmp_path / "runs" / "full", "tokenizer.done.json", stage="tokenizer", codes_used=31)  # nano's
    with pytest.raises(DataError, match=r"runs/nano_lavit-full: no stage has left a record"):
        write_card(Path("nano-lavit"), None, DATA)
    record(tmp_path / "runs" / "nano_lavit-full", "tokenizer.done.json", stage="tokenizer", cosine=0.19)
    assert write_card(Path("nano-lavit"), None, DATA).resolve() == model / "README.md"
    text = (model / "README.md").read_text()
    assert "`bash scripts/nano_lavit_speedrun.sh`" in text and "| cosine 0.19 |" in text and "| `llm` | 12 |" in text


def test_a_work_folder_without_records_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no stage has left a record"):
        write_card(tmp_path, tmp_path, DATA, "the command")
