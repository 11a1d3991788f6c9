"""Export of SEED-1: its stages become the released layout and our folder, with the training modules' codes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import tiny_seed1
import torch
from PIL import Image
from torch import Tensor, nn

from seed_multimodal.cli import main
from seed_multimodal.errors import CheckpointError, ConfigError
from seed_multimodal.images.transforms import seed_image_processor
from seed_multimodal.nn.eva import EvaVit
from seed_multimodal.tokenizers.export import export_tokenizer
from seed_multimodal.tokenizers.seed1 import Seed1Config, Seed1Tokenizer
from seed_multimodal.tokenizers.seed1_stage2 import Seed1Stage2Model
from seed_multimodal.tokenizers.seed2 import Seed2Config
from seed_multimodal.tokenizers.stage1 import Stage1Model
from seed_multimodal.tokenizers.stage2 import Stage2Model
from seed_multimodal.weights import load_state_dict

RELEASED = ["causal_qformer.pth", "config.json", "eva_vit_g.pth", "model.safetensors", "seed_tokenizer.pth"]


def _lavis(model: nn.Module, file: Path) -> Path:
    """As LAVIS saves: without parameters that are frozen; buffers stay."""
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    state = {name: value for name, value in model.state_dict().items() if name not in frozen}
    torch.save({"model": state, "optimizer": {"state": {}}, "epoch": 0}, file)
    return file


@dataclasses.dataclass
class Trained:
    """Files of a training, and what its modules make of a picture."""

    config: Seed1Config
    stage1: Path
    stage2: Path
    vision: Path
    picture: Path
    codes: Tensor
    embeds: Tensor


@pytest.fixture
def trained(tmp_path: Path) -> Trained:
    folder, config = tmp_path / "run", tiny_seed1.config()
    folder.mkdir()
    first = tiny_seed1.loud(Stage1Model(Seed2Config(vit=config.vit, qformer=config.qformer), vocab_size=30,
                                        embed_dim=8, embedding_dim=5))
    second = tiny_seed1.loud(Seed1Stage2Model(config, text_encoder=tiny_seed1.text_encoder()))
    second.load_stage1(first.state_dict())
    picture = folder / "picture.png"
    Image.fromarray(torch.randint(256, (30, 40, 3), dtype=torch.uint8).numpy()).save(picture)
    pixels = seed_image_processor(16)(Image.open(picture))[None]
    with torch.no_grad():  # codes that lie at the picture's own features, so that it has many different ones
        second.quantize.embedding.weight[:config.num_query] = second.eval().pre_quant(pixels)[0]
    deeper = EvaVit(dataclasses.replace(config.vit, depth=3)).state_dict() | first.visual_encoder.state_dict()
    torch.save(deeper, folder / "eva_vit_g.pth")
    codes = second.encode(pixels)
    return Trained(config, _lavis(first, folder / "stage1.pth"), _lavis(second, folder / "stage2.pth"),
                   folder / "eva_vit_g.pth", picture, codes, second.decode(codes))


def _export(trained: Trained, out: Path, **options):
    given = {"stage1": trained.stage1, "vision": trained.vision, "config": trained.config, "picture": trained.picture}
    return export_tokenizer(trained.stage2, out, **{**given, **options})


def test_stages_become_the_released_layout_and_our_folder(trained: Trained, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = _export(trained, out, released=True)
    assert report.kind == "seed1" and report.codes == trained.codes[0].tolist() and len(set(report.codes)) > 5
    assert report.verified == ["model.safetensors", "seed_tokenizer.pth"]
    assert sorted(path.name for path in out.iterdir()) == RELEASED
    pixels = seed_image_processor(16)(Image.open(trained.picture))[None]
    (tmp_path / "released").mkdir()
    for name in RELEASED[:3] + RELEASED[4:]:
        (tmp_path / "released" / name).write_bytes((out / name).read_bytes())
    for source in (out, tmp_path / "released"):
        codes, embeds = Seed1Tokenizer.from_pretrained(source).predict(pixels)
        assert torch.equal(codes, trained.codes)
        torch.testing.assert_close(embeds, trained.embeds, atol=1e-4, rtol=1e-4)
    # The original lays both files over its whole module: together they are all of it but the tower.
    whole = torch.load(out / "causal_qformer.pth", weights_only=True)["model"]
    assert {name.split(".")[0] for name in whole} == {"query_tokens", "ln_vision", "Qformer"}
    whole |= torch.load(out / "seed_tokenizer.pth", weights_only=True)["model"]
    own = Seed1Tokenizer(trained.config).state_dict()
    assert set(whole) == {name for name in own if not name.startswith("visual_encoder.")}
    assert set(load_state_dict(out / "eva_vit_g.pth")) == set(EvaVit(trained.config.vit).state_dict())


def test_what_training_alone_uses_is_left_out_and_told(trained: Trained, tmp_path: Path) -> None:
    report = _export(trained, tmp_path / "out")
    assert {report.parts[part] for part in ("Qformer", "query_tokens", "ln_vision")} == {str(trained.stage1)}
    assert {report.parts[part] for part in ("quantize", "blocks_text", "reverse_tokens", "distill_text_proj")} == {
        str(trained.stage2)}
    left = {name.split(".")[0] for name in report.ignored[str(trained.stage2)]}
    assert left == {"pos_embed", "blocks", "Qformer"}  # of the frozen Q-Former its buffer
    assert {"temp", "text_proj.weight", "embedding_head.bias"} <= set(report.ignored[str(trained.stage1)])
    state = load_state_dict(trained.stage2)
    theirs = {tiny_seed1.training_name(name): value for name, value in state.items()}
    theirs |= {"reverse_tokens": torch.zeros(1, 1, 24), "distill_image_proj.weight": torch.zeros(10, 24)}
    torch.save({"model": theirs}, tmp_path / "both.pth")
    both = export_tokenizer(tmp_path / "both.pth", tmp_path / "both", stage1=trained.stage1, vision=trained.vision,
                            config=trained.config, picture=trained.picture, kind="seed1")
    assert both.codes == report.codes
    assert {"reverse_tokens", "distill_image_proj.weight"} <= set(both.ignored[str(tmp_path / "both.pth")])


def test_the_kind_is_told_by_the_decode_side(trained: Trained, tiny: Seed2Config, tmp_path: Path) -> None:
    seed2 = _lavis(Stage2Model(tiny), tmp_path / "seed2.pth")
    out = tmp_path / "out"
    with pytest.raises(CheckpointError, match=r"stage2\.pth: stage 2 of SEED-1 .*; export it as seed1 or auto"):
        _export(trained, out, kind="seed2")
    with pytest.raises(CheckpointError, match=r"seed2\.pth: stage 2 of SEED-2 .*; export it as seed2 or auto"):
        export_tokenizer(seed2, out, stage1=trained.stage1, vision=trained.vision, config=trained.config, kind="seed1")
    with pytest.raises(ConfigError, match="Unknown kind of tokenizer 'seed3': use auto, seed2, seed1"):
        _export(trained, out, kind="seed3")
    with pytest.raises(ConfigError, match="sizes given are a SEED-2 tokenizer's, .* is a SEED-1 one's"):
        _export(trained, out, config=tiny)
    assert not out.exists()


def test_refusals_leave_nothing(trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    with pytest.raises(CheckpointError, match=r"stage2\.pth does not hold 'ln_vision'; give the stage-1 checkpoint"):
        _export(trained, out, stage1=None)
    with pytest.raises(CheckpointError, match="no stage holds the frozen vision tower"):
        _export(trained, out, vision=None)
    with pytest.raises(CheckpointError, match="number of attention heads"):
        _export(trained, out, config=None)
    with pytest.raises(CheckpointError, match=r"'quantize.embedding.weight': the file has \(50, 6\)"):
        _export(trained, out, config=dataclasses.replace(trained.config, codebook_size=60))
    state = load_state_dict(trained.stage2)
    torch.save({"model": {n: v for n, v in state.items() if n != "pos_embed_text"}}, tmp_path / "less.pth")
    with pytest.raises(CheckpointError, match="missing from the file: 'pos_embed_text'"):
        export_tokenizer(tmp_path / "less.pth", out, stage1=trained.stage1, vision=trained.vision,
                         config=trained.config)
    save = Seed1Tokenizer.save_pretrained

    def damaged(model: Seed1Tokenizer, folder: Path) -> Path:
        model.quantize.embedding.weight.data = model.quantize.embedding.weight.data.flip(0)
        return save(model, folder)

    monkeypatch.setattr(Seed1Tokenizer, "save_pretrained", damaged)
    with pytest.raises(CheckpointError, match="codes differ from the training modules'; nothing was kept"):
        _export(trained, out, released=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["less.pth", "run"]


def test_command(trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (trained.stage2.parent / "config.json").write_text(json.dumps(trained.config.to_dict()))
    files = ["--stage1", trained.stage1, "--stage2", trained.stage2, "--vision", trained.vision, "--out"]
    assert main(["export-tokenizer", *map(str, files), str(tmp_path / "a"), "--released", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["kind"] == "seed1" and record["verified"] == ["model.safetensors", "seed_tokenizer.pth"]
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == RELEASED
    assert main(["export-tokenizer", *map(str, files), str(tmp_path / "b"), "--kind", "seed2"]) == 2
    assert "stage 2 of SEED-1" in capsys.readouterr().err and not (tmp_path / "b").exists()
