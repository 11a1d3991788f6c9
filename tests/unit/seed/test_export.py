"""Export of training checkpoints to a tokenizer that gives the same codes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import tiny_seed1
import torch
from PIL import Image
from repository import NANO
from torch import Tensor, nn

from seed_multimodal.cli.main import main
from seed_multimodal.errors import CheckpointError
from seed_multimodal.images.transforms import seed_image_processor
from seed_multimodal.language.tokenizer import MODEL
from seed_multimodal.models.seed.configuration import Seed2Config, TokenizerConfig
from seed_multimodal.models.seed.export import Export, export_tokenizer
from seed_multimodal.models.seed.losses import Seed1Stage2Model, Stage1Model, Stage2Model
from seed_multimodal.models.seed.modeling import Seed1Tokenizer, Seed2Tokenizer
from seed_multimodal.nn.vision.eva import EvaVit
from seed_multimodal.weights import load_state_dict
from seed_nano.train.words import write_files


def _lavis(model: nn.Module, file: Path) -> Path:
    """A checkpoint as LAVIS saves it: without frozen parameters, with buffers and tied copies."""
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    state = {name: value for name, value in model.state_dict().items() if name not in frozen}
    torch.save(
        {
            "model": state,
            "optimizer": {"state": {}},
            "config": {"run": {"max_epoch": 1}},
            "epoch": 0,
        },
        file,
    )
    return file


@dataclasses.dataclass
class Trained:
    """Checkpoints of both stages; codes and embedding of an image by the trained modules."""

    config: TokenizerConfig
    stage1: Path
    stage2: Path
    vision: Path
    image: Path
    codes: Tensor
    embedding: Tensor

    def export(self, out: Path, **options: Any) -> Export:
        files = {
            "stage1": self.stage1,
            "vision": self.vision,
            "config": self.config,
            "image": self.image,
        }
        return export_tokenizer(self.stage2, out, **{**files, **options})


def _train(config: Any, folder: Path, *, freeze_vit: bool = True, **options: Any) -> Trained:
    folder.mkdir(exist_ok=True)
    sizes = Seed2Config(vit=config.vit, qformer=config.qformer)
    first = tiny_seed1.loud(
        Stage1Model(sizes, vocab_size=40, embed_dim=8, embedding_dim=5, freeze_vit=freeze_vit)
    )
    second: Any = tiny_seed1.loud(
        (Stage2Model if isinstance(config, Seed2Config) else Seed1Stage2Model)(config, **options)
    )
    if second.freeze_qformer:
        second.load_stage1(first.state_dict())
    else:
        second.visual_encoder.load_state_dict(first.visual_encoder.state_dict())  # type: ignore[union-attr]
    image = folder / "image.png"
    Image.fromarray(torch.randint(256, (30, 40, 3), dtype=torch.uint8).numpy()).save(image)
    pixels = seed_image_processor(config.vit.image_size)(Image.open(image))[None]
    with (
        torch.no_grad()
    ):  # rows of the codebook at the features of the image, so that its codes differ
        second.quantize.embedding.weight[: config.num_query] = second.eval().pre_quant(pixels)[0]
    deeper = EvaVit(dataclasses.replace(config.vit, depth=3)).state_dict()
    torch.save(deeper | first.visual_encoder.state_dict(), folder / "eva_vit_g.pth")  # type: ignore[union-attr]
    codes = second.encode(pixels)
    return Trained(
        config,
        _lavis(first, folder / "stage1.pth"),
        _lavis(second, folder / "stage2.pth"),
        folder / "eva_vit_g.pth",
        image,
        codes,
        second.decode(codes),
    )


@pytest.fixture
def trained(tiny: Seed2Config, tmp_path) -> Trained:
    return _train(tiny, tmp_path / "run")


@pytest.mark.parametrize("kind", ["seed2", "seed2-reverse", "seed1"])
def test_export_gives_the_codes_of_the_trained_modules(tiny: Seed2Config, tmp_path, kind):
    config = {
        "seed2": tiny,
        "seed2-reverse": dataclasses.replace(tiny, use_qformer_image=True),
        "seed1": tiny_seed1.config(),
    }[kind]
    trained = _train(config, tmp_path / "run")
    out = tmp_path / "out"
    report = trained.export(out, write_original=True)
    tokenizer: Any = Seed1Tokenizer if kind == "seed1" else Seed2Tokenizer
    assert (
        report.kind == kind[:5]
        and report.codes == trained.codes[0].tolist()
        and len(set(report.codes)) > 5
    )
    files = tokenizer.layout.files
    assert sorted(path.name for path in out.iterdir()) == sorted(
        ["config.json", "model.safetensors", "eva_vit_g.pth", *files]
    )
    (tmp_path / "released").mkdir()
    for name in (*files, "eva_vit_g.pth"):
        (tmp_path / "released" / name).write_bytes((out / name).read_bytes())
    pixels = seed_image_processor(16)(Image.open(trained.image))[None]
    for source in (out, tmp_path / "released"):
        loaded = tokenizer.from_pretrained(source, config=config)
        assert torch.equal(loaded.encode(pixels), trained.codes)
        torch.testing.assert_close(
            loaded.decode(trained.codes), trained.embedding, atol=1e-4, rtol=1e-4
        )


def test_export_reads_each_part_from_the_last_stage_that_trained_it(
    trained: Trained, tiny: Seed2Config, tmp_path
):
    report = trained.export(tmp_path / "frozen")
    assert {report.parts[part] for part in ("Qformer", "query_tokens", "ln_vision")} == {
        str(trained.stage1)
    }
    assert {report.parts[p] for p in ("quantize", "blocks", "pos_embed_image", "image_down")} == {
        str(trained.stage2)
    }
    assert f"{trained.vision}: gave visual_encoder." in report.lines()
    trained = _train(tiny, tmp_path / "a", freeze_qformer=False)
    report = trained.export(tmp_path / "out")
    assert report.parts["Qformer"] == report.parts["ln_vision"] == str(trained.stage2)
    assert (
        trained.export(tmp_path / "alone", stage1=None).codes
        == report.codes
        == trained.codes[0].tolist()
    )
    trained = _train(tiny, tmp_path / "b", freeze_vit=False)
    report = trained.export(tmp_path / "vision", vision=None)
    assert (
        report.parts["visual_encoder"] == str(trained.stage1)
        and report.codes == trained.codes[0].tolist()
    )


def test_export_seed1_with_names_of_the_training_code(tmp_path):
    trained = _train(tiny_seed1.config(), tmp_path / "run")
    state = {
        tiny_seed1.training_name(name): value
        for name, value in load_state_dict(trained.stage2).items()
    }
    state |= {
        "reverse_tokens": torch.zeros(1, 1, 24),
        "distill_image_proj.weight": torch.zeros(10, 24),
    }
    torch.save({"model": state}, tmp_path / "both.pth")
    trained.stage2 = tmp_path / "both.pth"
    report = trained.export(tmp_path / "out", kind="seed1")
    assert report.codes == trained.codes[0].tolist()


def test_export_with_a_config_next_to_the_checkpoint(trained: Trained, tmp_path):
    with pytest.raises(CheckpointError, match="tensors have another size"):
        trained.export(tmp_path / "out", config=None)
    file = trained.stage2.parent / "config.json"
    file.write_text(json.dumps(trained.config.to_dict()))
    for name, config in (("a", None), ("b", file)):
        assert trained.export(tmp_path / name, config=config).codes == trained.codes[0].tolist()
        assert Seed2Tokenizer.read_config(tmp_path / name / "config.json") == trained.config


def test_export_with_missing_parts(trained: Trained, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(
        CheckpointError,
        match=r"stage2\.pth: no file holds 'ln_vision'; give the stage-1 checkpoint",
    ):
        trained.export(out, stage1=None)
    with pytest.raises(
        CheckpointError, match=r"no stage holds the frozen vision encoder; give its file"
    ):
        trained.export(out, vision=None)
    with pytest.raises(CheckpointError, match=r"stage1\.pth: not a stage-2 checkpoint"):
        export_tokenizer(
            trained.stage1, out, stage1=trained.stage2, vision=trained.vision, config=trained.config
        )
    with pytest.raises(
        CheckpointError, match=r"stage2\.pth: a stage-2 checkpoint of seed2; export it as seed2"
    ):
        trained.export(out, kind="seed1")
    assert not out.exists() and [path.name for path in tmp_path.iterdir()] == ["run"]


def test_export_command(trained: Trained, tmp_path, capsys):
    config = tmp_path / "sizes.json"
    config.write_text(json.dumps(trained.config.to_dict()))

    def command(*more: object) -> int:
        return main(
            [
                *(
                    f"export-tokenizer --stage1 {trained.stage1} --stage2 {trained.stage2} "
                    f"--config {config}"
                ).split(),
                *map(str, more),
            ]
        )

    assert (
        command("--vision", trained.vision, "--image", trained.image, "--out", tmp_path / "a") == 0
    )
    assert " ".join(map(str, trained.codes[0].tolist())) in capsys.readouterr().out
    write_files(
        tmp_path / "words",
        (NANO / "seed_tokenizer" / MODEL).read_bytes(),
        trained.config.codebook_size,
        32,
    )
    assert (
        command(
            "--vision",
            trained.vision,
            "--out",
            tmp_path / "b",
            "--json",
            "--released",
            "--text-tokenizer",
            tmp_path / "words",
        )
        == 0
    )
    record = json.loads(capsys.readouterr().out)
    assert record["kind"] == "seed2" and record["image"].endswith("cat.jpg")
    assert (tmp_path / "b" / "tokenizer.model").is_file() and (
        tmp_path / "b" / "added_tokens.json"
    ).is_file()
    text_tokenizer = NANO / "seed_tokenizer"
    assert (
        command(
            "--vision", trained.vision, "--out", tmp_path / "c", "--text-tokenizer", text_tokenizer
        )
        == 2
    )
    errors = capsys.readouterr().err
    assert (
        "has 50 codes, 32 to an image" in errors and "has words for 1024, 32 to an image" in errors
    )
    assert not (tmp_path / "c").exists()
