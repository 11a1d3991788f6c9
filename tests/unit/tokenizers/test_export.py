"""Export: stage checkpoints as training writes them become a tokenizer that gives the training modules' codes."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from seed_multimodal.cli import main
from seed_multimodal.errors import CheckpointError, ConfigError, SeedWarning
from seed_multimodal.images.transforms import seed_image_processor
from seed_multimodal.language.tokenizer import MODEL, read_files, write_files
from seed_multimodal.nn.eva import EvaVit
from seed_multimodal.tokenizers.export import export_tokenizer
from seed_multimodal.tokenizers.seed2 import Seed2Config, Seed2Tokenizer
from seed_multimodal.tokenizers.stage1 import Stage1Model
from seed_multimodal.tokenizers.stage2 import Stage2Model
from seed_multimodal.weights import load_state_dict

NANO = Path(__file__).parents[3] / "pretrained" / "nano"
SRC = Path(__file__).parents[3] / "src"


def _randomise(model: nn.Module) -> None:
    """Nothing zero or one as at the start, and queries that differ more than what they read."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(torch.randn_like(parameter), alpha=1.0 if name == "query_tokens" else 0.05)


def _lavis(model: nn.Module, file: Path) -> Path:
    """As LAVIS saves: without parameters that are frozen; buffers and tied copies stay."""
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    state = {name: value for name, value in model.state_dict().items() if name not in frozen}
    torch.save({"model": state, "optimizer": {"state": {}}, "config": {"run": {"max_epoch": 1}}, "scaler": None,
                "epoch": 0}, file)
    return file


@dataclasses.dataclass
class Trained:
    """Files of a training, and what its modules make of a picture."""

    config: Seed2Config
    stage1: Path
    stage2: Path
    vision: Path
    picture: Path
    codes: Tensor
    embedding: Tensor


def _train(config: Seed2Config, folder: Path, **stage2_options) -> Trained:
    first = Stage1Model(config, vocab_size=40, embed_dim=8, embedding_dim=5)
    _randomise(first)
    second = Stage2Model(config, clip_model=nn.Linear(3, 3), **stage2_options)
    _randomise(second)
    if second.freeze_qformer:
        second.load_stage1(first.state_dict())
    else:
        second.visual_encoder.load_state_dict(first.visual_encoder.state_dict())
    with torch.no_grad():  # codes that lie among the features, so that a picture has many different ones
        features = second.eval().pre_quant(torch.randn(5, 3, 16, 16)).flatten(0, 1)
        second.quantize.embedding.weight.copy_(features[torch.randperm(len(features))[:config.codebook_size]])
    tower = EvaVit(dataclasses.replace(config.vit, depth=3)).state_dict() | first.visual_encoder.state_dict()
    torch.save(tower, folder / "eva_vit_g.pth")
    picture = folder / "picture.png"
    Image.effect_noise((40, 30), 90).convert("RGB").save(picture)
    pixels = seed_image_processor(config.vit.image_size)(Image.open(picture))[None]
    codes = second.encode(pixels)
    return Trained(config, _lavis(first, folder / "stage1.pth"), _lavis(second, folder / "stage2.pth"),
                   folder / "eva_vit_g.pth", picture, codes, second.decode(codes))


@pytest.fixture
def trained(tiny: Seed2Config, tmp_path: Path) -> Trained:
    (tmp_path / "run").mkdir()
    return _train(tiny, tmp_path / "run")


def _export(trained: Trained, out: Path, **options):
    given = {"stage1": trained.stage1, "vision": trained.vision, "config": trained.config, "picture": trained.picture}
    return export_tokenizer(trained.stage2, out, **{**given, **options})


def _leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


@pytest.mark.parametrize("reverse", [False, True])
def test_stages_become_the_training_modules_tokenizer(tiny: Seed2Config, tmp_path: Path, reverse: bool) -> None:
    trained = _train(dataclasses.replace(tiny, use_qformer_image=reverse), tmp_path)
    lines: list[str] = []
    report = _export(trained, tmp_path / "out", released=True, log=lines.append)
    assert report.codes == trained.codes[0].tolist() and len(set(report.codes)) > 5
    assert report.verified == ["model.safetensors", "seed_quantizer.pt"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "config.json", "eva_vit_g.pth", "model.safetensors", "seed_quantizer.pt"]
    pixels = seed_image_processor(16)(Image.open(trained.picture))[None]
    for source in ("out", "out/seed_quantizer.pt"):
        loaded = Seed2Tokenizer.from_pretrained(tmp_path / source)
        assert torch.equal(loaded.encode(pixels), trained.codes)
        assert torch.allclose(loaded.decode(trained.codes), trained.embedding, atol=1e-5)
    flat = load_state_dict(tmp_path / "out" / "seed_quantizer.pt")
    assert set(flat) == {n for n in Seed2Tokenizer(trained.config).state_dict() if not n.startswith("visual_encoder.")}
    assert set(load_state_dict(tmp_path / "out" / "eva_vit_g.pth")) == set(EvaVit(tiny.vit).state_dict())
    assert not _leftovers(tmp_path) and lines[-1].endswith(" ".join(map(str, report.codes)))


def test_every_name_of_every_file_is_accounted_for(trained: Trained, tmp_path: Path) -> None:
    report = _export(trained, tmp_path / "out")
    files = {str(f): load_state_dict(f) for f in (trained.stage1, trained.stage2)}
    assert report.parts["Qformer"] == report.parts["query_tokens"] == report.parts["ln_vision"] == str(trained.stage1)
    assert report.parts["visual_encoder"] == str(trained.vision)
    assert {report.parts[p] for p in ("quantize", "blocks", "pos_embed_image", "image_down")} == {str(trained.stage2)}
    used = set(Seed2Tokenizer(trained.config).state_dict())
    left = report.ignored[str(trained.stage1)]
    assert set(left) == set(files[str(trained.stage1)]) - used
    assert {"temp", "text_proj.weight", "embedding_head.bias", "Qformer.cls.predictions.decoder.weight",
            "Qformer.bert.embeddings.word_embeddings.weight",
            "Qformer.bert.encoder.layer.0.intermediate.dense.weight"} <= set(left)
    # Frozen parts are not in the stage-2 file, but their buffers are.
    assert report.ignored[str(trained.stage2)] == ["Qformer.bert.embeddings.position_ids"]
    assert {name.rpartition(".blocks.2.")[0] for name in report.ignored[str(trained.vision)]} == {"visual_encoder"}
    assert f"{trained.stage2}: 1 tensor left out: Qformer (1)." in report.lines()
    assert "Qformer (" in "\n".join(report.lines()) and "temp (1)" in "\n".join(report.lines())


def test_encoder_trained_on_in_stage_2_wins(tiny: Seed2Config, tmp_path: Path) -> None:
    trained = _train(tiny, tmp_path, freeze_qformer=False)
    report = _export(trained, tmp_path / "out")
    assert report.codes == trained.codes[0].tolist()
    assert report.parts["Qformer"] == report.parts["ln_vision"] == str(trained.stage2)
    alone = _export(trained, tmp_path / "alone", stage1=None)
    assert alone.codes == report.codes


def test_trained_tower_comes_from_its_stage(tiny: Seed2Config, tmp_path: Path) -> None:
    first = Stage1Model(tiny, vocab_size=40, embed_dim=8, freeze_vit=False)
    _randomise(first)
    second = Stage2Model(tiny)
    _randomise(second)
    second.load_stage1(first.state_dict())
    stage1, stage2 = _lavis(first, tmp_path / "stage1.pth"), _lavis(second, tmp_path / "stage2.pth")
    report = export_tokenizer(stage2, tmp_path / "out", stage1=stage1, config=tiny)
    assert report.parts["visual_encoder"] == str(stage1)
    torch.save(first.visual_encoder.state_dict(), tmp_path / "same.pth")
    assert export_tokenizer(stage2, tmp_path / "same", stage1=stage1, config=tiny, vision=tmp_path / "same.pth"
                            ).codes == report.codes
    torch.save(EvaVit(tiny.vit).state_dict(), tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match=r"other\.pth: not the vision tower that .*stage1\.pth was trained with"):
        export_tokenizer(stage2, tmp_path / "no", stage1=stage1, config=tiny, vision=tmp_path / "other.pth")
    assert not (tmp_path / "no").exists()


def test_sizes_come_from_a_config_beside_the_checkpoint(trained: Trained, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="number of attention heads"):
        _export(trained, tmp_path / "out", config=None)
    (trained.stage2.parent / "config.json").write_text(json.dumps(trained.config.to_dict()))
    assert _export(trained, tmp_path / "out", config=None).config == trained.config
    assert _export(trained, tmp_path / "b", config=trained.stage2.parent / "config.json").config == trained.config


def test_missing_parts_are_named(trained: Trained, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(CheckpointError, match=r"stage2\.pth does not hold 'ln_vision'; give the stage-1 checkpoint"):
        _export(trained, out, stage1=None)
    with pytest.raises(CheckpointError, match=r"no stage holds the frozen vision tower; download it from https"):
        _export(trained, out, vision=None)
    with pytest.raises(CheckpointError, match=r"stage1\.pth: not a stage-2 checkpoint.*the two stages were swapped"):
        export_tokenizer(trained.stage1, out, stage1=trained.stage2, vision=trained.vision, config=trained.config)
    state = load_state_dict(trained.stage2)
    torch.save({"model": {n: v for n, v in state.items() if n != "image_down.2.weight"}}, tmp_path / "less.pth")
    with pytest.raises(CheckpointError, match="missing from the file: 'image_down.2.weight'"):
        export_tokenizer(tmp_path / "less.pth", out, stage1=trained.stage1, vision=trained.vision,
                         config=trained.config)
    torch.save({"model": state | {"extra.weight": torch.zeros(1)}}, tmp_path / "more.pth")
    with pytest.warns(SeedWarning, match="1 tensor that the model does not know was left out: 'extra.weight'"):
        export_tokenizer(tmp_path / "more.pth", tmp_path / "extra", stage1=trained.stage1, vision=trained.vision,
                         config=trained.config)
    wider = dataclasses.replace(trained.config, codebook_size=60)
    with pytest.raises(CheckpointError, match=r"'quantize.embedding.weight': the file has \(50, 6\)"):
        _export(trained, out, config=wider)
    assert not out.exists() and not _leftovers(tmp_path)


def test_what_reads_back_differently_is_not_kept(trained: Trained, tmp_path: Path,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    save = Seed2Tokenizer.save_pretrained

    def damaged(model: Seed2Tokenizer, folder: Path) -> Path:
        model.quantize.embedding.weight.data = model.quantize.embedding.weight.data.flip(0)
        return save(model, folder)

    monkeypatch.setattr(Seed2Tokenizer, "save_pretrained", damaged)
    with pytest.raises(CheckpointError, match="codes differ from the training modules'; nothing was kept"):
        _export(trained, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not _leftovers(tmp_path)


def test_a_full_folder_needs_force(trained: Trained, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    _export(trained, out)  # an empty one does not
    (out / "old.txt").write_text("old")
    with pytest.raises(ConfigError, match=r"out: exists already and is not empty \(--force replaces it\)"):
        _export(trained, out)
    assert (out / "old.txt").exists()
    _export(trained, out, force=True)
    assert sorted(p.name for p in out.iterdir()) == ["config.json", "model.safetensors"] and not _leftovers(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="file: is a file"):
        _export(trained, tmp_path / "file")
    with pytest.raises(ConfigError, match="cannot be written"):
        _export(trained, tmp_path / "file" / "out")


def test_a_linked_folder_stays_a_link(trained: Trained, tmp_path: Path) -> None:
    real, link = tmp_path / "real", tmp_path / "link"
    real.mkdir()
    link.symlink_to(real)
    assert _export(trained, link).folder == link
    (real / "old.txt").write_text("old")
    _export(trained, link, force=True)
    (tmp_path / "ahead").symlink_to(tmp_path / "disk" / "later")
    _export(trained, tmp_path / "ahead")
    for folder in (real, tmp_path / "disk" / "later"):
        assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert link.is_symlink() and (tmp_path / "ahead").is_symlink()
    assert not _leftovers(tmp_path) and not _leftovers(tmp_path / "disk")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    with pytest.raises(ConfigError, match="circle: cannot be written"):
        _export(trained, tmp_path / "circle")


def test_the_current_folder_and_the_stages_own_are_not_replaced(trained: Trained, tmp_path: Path,
                                                                monkeypatch: pytest.MonkeyPatch) -> None:
    here = tmp_path / "here" / "below"
    here.mkdir(parents=True)
    monkeypatch.chdir(here)
    _export(trained, ".")
    assert sorted(path.name for path in here.iterdir()) == ["config.json", "model.safetensors"]
    monkeypatch.chdir(here)
    for out in (".", "..", str(here)):
        with pytest.raises(ConfigError, match="is the current folder or holds it"):
            _export(trained, out, force=True)
    run = trained.stage2.parent
    before = sorted(path.name for path in run.iterdir())
    with pytest.raises(ConfigError, match=r"run: holds stage1\.pth, which is read here and would be gone"):
        _export(trained, run, force=True)
    (tmp_path / "tower").mkdir()
    vision = trained.vision.rename(tmp_path / "tower" / "eva_vit_g.pth")
    with pytest.raises(ConfigError, match=r"tower: holds eva_vit_g\.pth"):
        _export(trained, tmp_path / "tower", force=True, vision=vision)
    assert vision.is_file() and sorted({*before} - {"eva_vit_g.pth"}) == sorted(path.name for path in run.iterdir())


@pytest.mark.parametrize(("name", "number"), [("encode_task_layer.0.weight", float("nan")),
                                              ("image_down.2.weight", float("inf"))])
def test_a_diverged_training_is_not_exported(trained: Trained, tmp_path: Path, name: str, number: float) -> None:
    state = load_state_dict(trained.stage2)
    state[name][0, 0] = number
    torch.save({"model": state}, tmp_path / "diverged.pth")
    with pytest.raises(CheckpointError, match=rf"diverged\.pth: '{name}' holds numbers that are not finite"):
        export_tokenizer(tmp_path / "diverged.pth", tmp_path / "out", stage1=trained.stage1, vision=trained.vision,
                         config=trained.config)
    assert not (tmp_path / "out").exists()


KILLED = """
import sys, time
from pathlib import Path
from seed_multimodal.tokenizers import export
verify = export._verify
def slow(*arguments):
    Path(sys.argv[5]).touch()
    time.sleep(60)
    return verify(*arguments)
export._verify = slow
export.export_tokenizer(sys.argv[1], sys.argv[4], stage1=sys.argv[2], vision=sys.argv[3])
"""


@pytest.mark.process
def test_a_killed_export_leaves_no_folder(trained: Trained, tmp_path: Path) -> None:
    (trained.stage2.parent / "config.json").write_text(json.dumps(trained.config.to_dict()))
    arguments = [trained.stage2, trained.stage1, trained.vision, tmp_path / "out", tmp_path / "mark"]
    process = subprocess.Popen([sys.executable, "-c", KILLED, *map(str, arguments)],
                               env={**os.environ, "PYTHONPATH": str(SRC)})
    while not (tmp_path / "mark").exists():
        assert process.poll() is None, "the export ended before it was killed"
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out").exists()
    _export(trained, tmp_path / "out")
    assert not list(tmp_path.glob(".out.*"))
    assert Seed2Tokenizer.from_pretrained(tmp_path / "out").config == trained.config


def _command(capsys: pytest.CaptureFixture, *arguments: object) -> tuple[int, str, str]:
    code = main(["export-tokenizer", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_command(trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    config = tmp_path / "sizes.json"
    config.write_text(json.dumps(trained.config.to_dict()))
    files = ["--stage1", trained.stage1, "--stage2", trained.stage2, "--config", config]
    code, out, _ = _command(capsys, *files, "--vision", trained.vision, "--image", trained.picture, "--out",
                            tmp_path / "a")
    assert code == 0 and "temp (1)" in out and " ".join(map(str, trained.codes[0].tolist())) in out
    write_files(tmp_path / "words", (NANO / "seed_tokenizer" / MODEL).read_bytes(), trained.config.codebook_size, 32)
    code, out, _ = _command(capsys, *files, "--vision", trained.vision, "--out", tmp_path / "b", "--json", "--released",
                            "--text-tokenizer", tmp_path / "words")
    record = json.loads(out)
    assert code == 0 and record["verified"] == ["model.safetensors", "seed_quantizer.pt"] and record["tensors"] == len(
        Seed2Tokenizer(trained.config).state_dict())
    assert "temp" in record["ignored"][str(trained.stage1)] and record["picture"].endswith("cat.jpg")
    assert (tmp_path / "b" / "tokenizer.model").is_file() and (tmp_path / "b" / "added_tokens.json").is_file()
    code, out, errors = _command(capsys, *files, "--out", tmp_path / "c")
    assert code == 2 and not out and errors.count("\n") == 1 and "vision tower" in errors
    code, _, errors = _command(capsys, *files, "--out", tmp_path / "c", "--text-tokenizer", tmp_path)
    assert code == 2 and f"{tmp_path / MODEL}: this tokenizer file is missing" in errors
    code, _, errors = _command(capsys, *files, "--vision", trained.vision, "--out", tmp_path / "c", "--text-tokenizer",
                               NANO / "seed_tokenizer")
    assert code == 2 and "has words for 1024 codes, 32 to a" in errors and "has 50, 32 to a picture" in errors
    assert not (tmp_path / "c").exists()


def test_exported_tokenizer_serves_seed_llama(tmp_path: Path, tiny_folder: Path) -> None:
    """Stages made from a system's own tokenizer: exported, it sees exactly as the system did."""
    from seed_multimodal.systems.seed_llama import SeedLlama

    source = tiny_folder / "seed_tokenizer"
    tokenizer = Seed2Tokenizer.from_pretrained(source)
    first = Stage1Model(tokenizer.config, vocab_size=40, embed_dim=8, freeze_vit=False)
    second = Stage2Model(tokenizer.config)
    state = tokenizer.state_dict()
    first.load_state_dict(state, strict=False)
    second.load_state_dict(state, strict=False)
    export_tokenizer(_lavis(second, tmp_path / "2.pth"), tmp_path / "out", stage1=_lavis(first, tmp_path / "1.pth"),
                     config=tokenizer.config, beside=read_files(source).raw)
    picture = Path(__file__).parents[3] / "images" / "fox.png"
    before = SeedLlama.from_pretrained(tiny_folder, device="cpu", log=None)
    after = SeedLlama.from_pretrained(tiny_folder, tokenizer=tmp_path / "out", device="cpu", log=None)
    assert torch.equal(after.tokenize(picture), before.tokenize(picture))
    assert after.describe(picture) == before.describe(picture)
