"""Export of training checkpoints to a tokenizer that gives the same codes."""

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch
from random_images import noise
from repository import NANO
from tiny import write_json
from tiny.seed import seed1_config, write_stages
from torch import Tensor

from seed_multimodal.cli.main import main
from seed_multimodal.errors import CheckpointError
from seed_multimodal.images.transforms import seed_image_processor
from seed_multimodal.language.tokenizer import MODEL
from seed_multimodal.models.seed.configuration import TokenizerConfig
from seed_multimodal.models.seed.modeling import Seed1Tokenizer, Seed2Tokenizer
from seed_multimodal.recipes.seed.export import Export, export_tokenizer
from seed_nano.train.words import write_files


@dataclasses.dataclass
class Trained:
    """Checkpoints of both stages; codes and embedding of an image by the trained modules."""

    config: TokenizerConfig
    folder: Path
    pixels: Tensor
    codes: Tensor
    embedding: Tensor

    def export(self, out, **options) -> Export:
        files = {"stage1": self.folder / "stage1.pth", "vision": self.folder / "eva_vit_g.pth"}
        files |= {"config": self.config, "image": self.folder / "image.png"}
        return export_tokenizer(self.folder / "stage2.pth", out, **{**files, **options})


def train(config, folder, **options) -> Trained:
    """Random weights in the place of trained ones."""
    folder.mkdir()
    second = write_stages(config, folder, **options)
    image = noise(1)
    image.save(folder / "image.png")
    pixels = seed_image_processor(config.vit.image_size)(image)[None]
    codes = second.encode(pixels)
    return Trained(config, folder, pixels, codes, second.decode(codes))


@pytest.fixture
def trained(tiny, tmp_path) -> Trained:
    return train(tiny, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["seed2", "seed2-reverse", "seed1"])
def test_export_gives_the_codes_of_the_trained_modules(tiny, tmp_path, kind):
    # What was trained is what is served, in our layout and in the original's.
    config = seed1_config() if kind == "seed1" else tiny
    if kind == "seed2-reverse":
        config = dataclasses.replace(tiny, use_qformer_image=True)
    trained = train(config, tmp_path / "run")
    out = tmp_path / "out"
    report = trained.export(out, kind=kind[:5], write_original=True)
    assert report.codes == trained.codes[0].tolist()
    assert len(set(report.codes)) > 5

    # Our folder, and the original files alone.
    tokenizer = Seed1Tokenizer if kind == "seed1" else Seed2Tokenizer
    original = shutil.copytree(out, tmp_path / "original")
    (original / "config.json").unlink()
    (original / "model.safetensors").unlink()
    assert {file.name for file in original.iterdir()} == {*tokenizer.layout.files, "eva_vit_g.pth"}
    for source in (out, original):
        loaded = tokenizer.from_pretrained(source, config=config)
        assert torch.equal(loaded.encode(trained.pixels), trained.codes)
        embedding = loaded.decode(trained.codes)
        torch.testing.assert_close(embedding, trained.embedding, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_export_reads_each_part_from_the_last_stage_that_trained_it(trained, tiny, tmp_path):
    # An untrained copy of a part would give other codes without an error.
    report = trained.export(tmp_path / "frozen")
    stage1, stage2 = (str(trained.folder / f"stage{n}.pth") for n in (1, 2))
    assert {report.parts[part] for part in ("Qformer", "query_tokens", "ln_vision")} == {stage1}
    assert {report.parts[part] for part in ("quantize", "blocks", "image_down")} == {stage2}
    assert report.parts["visual_encoder"] == str(trained.folder / "eva_vit_g.pth")

    # A Q-Former that stage 2 trained, then a vision encoder that stage 1 trained.
    run = train(tiny, tmp_path / "a", freeze_qformer=False)
    report = run.export(tmp_path / "out", stage1=None)
    assert report.parts["Qformer"] == report.parts["ln_vision"] == str(run.folder / "stage2.pth")
    assert report.codes == run.codes[0].tolist()
    run = train(tiny, tmp_path / "b", freeze_vit=False)
    report = run.export(tmp_path / "vision", vision=None)
    assert report.parts["visual_encoder"] == str(run.folder / "stage1.pth")
    assert report.codes == run.codes[0].tolist()


def test_export_with_missing_parts_writes_nothing(trained, tmp_path):
    # A folder that exists must be whole.
    for options, named in (
        ({"stage1": None}, "'ln_vision'"),
        ({"vision": None}, "vision encoder"),
        ({"kind": "seed1"}, "seed2"),
        ({"config": None}, "another size"),  # the original sizes are another model's
    ):
        with pytest.raises(CheckpointError, match=named):
            trained.export(tmp_path / "out", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_export_command_with_a_text_tokenizer(trained, tmp_path, capsys):
    # Of as many codes as the codebook has, and of others.
    config = tmp_path / "sizes.json"
    write_json(config, trained.config.to_dict())
    model = (NANO / "seed_tokenizer" / MODEL).read_bytes()
    write_files(tmp_path / "texts", model, trained.config.codebook_size, 32)

    def export(out, texts):
        run = trained.folder
        files = f"--stage1 {run}/stage1.pth --stage2 {run}/stage2.pth --vision {run}/eva_vit_g.pth"
        command = f"export-tokenizer {files} --config {config} --out {tmp_path / out}"
        return main([*command.split(), "--text-tokenizer", str(texts)])

    assert export("a", tmp_path / "texts") == 0
    assert (tmp_path / "a" / "tokenizer.model").is_file()
    assert export("b", NANO / "seed_tokenizer") == 2
    assert "1024" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()
