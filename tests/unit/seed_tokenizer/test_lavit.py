"""LaVIT's stage 1 on LAVIS: from real picture files to a tokenizer folder, and a run that is killed."""

from __future__ import annotations

import json
import math
import re
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lavis_runs import APPLICATION, ROOT, environment, log_of, torchrun, write_config
from omegaconf import OmegaConf

TOWER = ROOT / "pretrained" / "nano" / "seed_tokenizer" / "diffusion_model" / "image_encoder"

def other_tower(home: Path) -> Path:
    """A tower of the same size with other weights."""
    from seed_multimodal.seed.checkpoints import load_clip_vision

    vision = load_clip_vision(TOWER, log=None)
    vision.load_state_dict({name: 1.1 * value for name, value in vision.state_dict().items()})
    vision.save_pretrained(home / "other")
    return home / "other"


@pytest.fixture
def yaml(pictures: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """options → the arguments of train.py for a tiny run on a folder of pictures into `tmp_path/NAME`."""
    def make(*options: str, name: str = "run", storage: Path | None = None) -> list[str]:
        folder = tmp_path / "pictures"
        if not folder.exists():
            folder.mkdir()
            for picture in pictures.glob("*.png"):
                shutil.copy(picture, folder)
        given = write_config("lavit", storage or folder, tmp_path / name)
        return [*given, *(["--options", *options] if options else [])]

    return make


def test_pictures_without_captions_train_as_any_data_set(yaml: Callable[..., list[str]], tmp_path: Path) -> None:
    import train

    given = yaml("run.output_dir=" + str(tmp_path / "coco"))
    config = OmegaConf.load(given[1])
    for name in ("coco_caption", "laion_400m"):  # the one reads captions by default, the other shards
        config.datasets = {name: next(iter(config.datasets.values()))}
        OmegaConf.save(config, given[1])
        runner = train.build(train.parser("").parse_args(given))
        assert len(runner.datasets[name]["train"]) == 24


def test_pictures_without_captions_become_a_tokenizer(
    yaml: Callable[..., list[str]], run: Callable[[list[str]], Any], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from seed_multimodal.cli.main import main
    from seed_multimodal.images.io import open_image
    from seed_multimodal.lavit.checkpoints import load_dynamic_tokenizer
    from seed_multimodal.lavit.decoder import CodeDecoder
    from seed_multimodal.lavit.training import LavitStage1

    runner = run(yaml("run.valid_splits=[val]"))
    lines = log_of(tmp_path / "run", "lavit-stage1")
    assert list(lines) == [1, 2, 3, 4, 5, 6] and all(math.isfinite(line["last_loss"]) for line in lines.values())
    assert "perplexity" not in lines[2] and lines[3]["perplexity"] > 1 and 0 < lines[6]["kept"] < 1
    assert {"valid/val/loss_cosine", "valid/val/tokens", "valid/val/perplexity"} <= set(lines[6])
    said = capsys.readouterr().out
    assert "seed export-tokenizer --lavit" in said and "loss_cosine 0.18" in said

    checkpoint = tmp_path / "run" / "checkpoint_2.pth"
    out = tmp_path / "tokenizer"
    other = other_tower(tmp_path)
    for said, file, more in (
            ("missing from the file: 'tokenizer.encoder", checkpoint, []),
            ("not the vision encoder that .*checkpoint_2.pth was trained with", checkpoint, ["--vision", str(other)]),
            ("run: there is no such weights file", checkpoint.parent, ["--vision", str(TOWER)])):
        assert main(["export-tokenizer", "--lavit", str(file), "--out", str(out), *more]) == 2
        assert re.search(said, capsys.readouterr().err)
    assert not out.exists()
    assert main(["export-tokenizer", "--lavit", str(checkpoint), "--vision", str(TOWER), "--out", str(out)]) == 0
    again = tmp_path / "again"
    assert main(["export-tokenizer", "--lavit", str(checkpoint), "--vision", str(TOWER), "--out", str(again)]) == 0
    decoders = [(folder / "decoder" / "model.safetensors").read_bytes() for folder in (out, again)]
    assert decoders[0] == decoders[1]  # the untrained heads, too
    tokenizer = load_dynamic_tokenizer(out / "tokenizer")
    decoder = CodeDecoder.from_pretrained(out / "decoder")
    pictures = [open_image(path) for path in sorted((tmp_path / "pictures").glob("*.png"))[:3]]
    pixels = tokenizer.transform.batch(pictures)
    model = runner._model.eval()
    noise = torch.randn(3, 16, 2)
    codes = tokenizer.encode(pixels, noise=noise)
    expected = LavitStage1.forward(model, pixels, noise=noise)
    assert torch.equal(torch.cat(codes), expected.codes_T)
    rebuilt = decoder.features([tokenizer.embed_codes(one) for one in codes])
    cosine = 1 - torch.nn.functional.cosine_similarity(rebuilt, tokenizer.patch_features(pixels), dim=-1).mean()
    torch.testing.assert_close(cosine, expected.loss_cosine, rtol=1e-3, atol=1e-4)


def test_shards_of_pictures_the_selectors_rate_and_refusals(
    yaml: Callable[..., list[str]], run: Callable[[list[str]], Any], tmp_path: Path
) -> None:
    import train

    from seed_multimodal.errors import ConfigError

    yaml()  # makes the pictures
    shard = tmp_path / "shard-000.tar"
    with tarfile.open(shard, "w") as tar:
        for picture in sorted((tmp_path / "pictures").glob("*.png")):
            tar.add(picture, picture.name)
    runner = run(yaml("run.max_epoch=1", "model.codebook_warmup=1", "model.selector_lr_scale=0.5",
                      "model.freeze_selector=true", name="tar", storage=shard))
    assert [group.get("lr_scale", 1.0) for group in runner.optimizer.param_groups] == [1.0, 1.0, 0.5, 0.5]
    assert len(runner.datasets["pictures"]["train"]) == 24
    for key, option in {"model.freeze_vit is false": "model.freeze_vit=false",
                        "The vision tower has no weights": "model.vit_weights=null",
                        "codebook_warmup": "model.codebook_warmup=99",
                        "selector_lr_scal": "model.selector_lr_scal=2"}.items():
        with pytest.raises(ConfigError, match=key):
            train.build(train.parser("").parse_args(yaml(option, name="wrong"))).train()


def test_a_finished_run_goes_on_with_another_seed_but_no_other_tower(
    yaml: Callable[..., list[str]], run: Callable[[list[str]], Any], tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:
    """The parts that later trainings begin with are random, and do not count as the tower."""
    from seed_multimodal.errors import CheckpointError

    run(yaml("run.max_epoch=2"))
    run(yaml("run.max_epoch=3", "run.seed=7"))
    assert "run.seed: 42 -> 7" in capsys.readouterr().out and len(log_of(tmp_path / "run", "lavit-stage1")) == 6
    other = other_tower(tmp_path)
    with pytest.raises(CheckpointError, match="the frozen weights are not those"):
        run(yaml("run.max_epoch=4", f"model.vit_weights={other}"))


@pytest.mark.process
def test_two_processes_have_one_codebook(
    yaml: Callable[..., list[str]], start: Callable[..., Any], tmp_path: Path
) -> None:
    _, (first, second) = torchrun(start, tmp_path, yaml("run.num_workers=0", "model.freeze_selector=true"))
    assert all(torch.equal(value, second[name]) for name, value in first.items() if not name.endswith("counts"))
    assert json.loads((tmp_path / "run" / "lavit-stage1.done.json").read_text())["processes"] == 2


def test_the_script_names_the_configuration() -> None:
    text = (APPLICATION / "train_scripts" / "lavit_tokenizer.sh").read_text()
    config = OmegaConf.load(APPLICATION / "lavis" / "projects" / "lavit" / "train" / "pretrain_tokenizer.yaml")
    assert "lavis/projects/lavit/train/pretrain_tokenizer.yaml" in text and "PATH" in environment()
    run = config.run
    assert run.batch_size_train * run.accum_grad_iters * 8 == 2048  # eight processes
    assert run.max_epoch * run.iters_per_epoch // run.accum_grad_iters == 50_000
