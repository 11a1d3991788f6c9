"""LaVIT's stage 1 on LAVIS: from image files to a tokenizer folder."""

from __future__ import annotations

import math
import re
import tarfile

import pytest
import torch
from lavis_runs import ROOT, log_of, torchrun

from seed_multimodal.errors import CheckpointError, ConfigError

VISION = ROOT / "pretrained" / "nano" / "seed_tokenizer" / "diffusion_model" / "image_encoder"


@pytest.fixture
def other_vision(tmp_path):
    """A vision encoder of the same size with other weights."""
    from seed_multimodal.seed.checkpoints import load_clip_vision

    vision = load_clip_vision(VISION, log=None)
    vision.load_state_dict({name: 1.1 * value for name, value in vision.state_dict().items()})
    vision.save_pretrained(tmp_path / "other")
    return tmp_path / "other"


def test_images_become_a_tokenizer(yaml, run, other_vision, pictures, tmp_path, capsys):
    from seed_multimodal.cli.main import main
    from seed_multimodal.images.io import open_image
    from seed_multimodal.lavit.checkpoints import load_dynamic_tokenizer
    from seed_multimodal.lavit.decoder import CodeDecoder
    from seed_multimodal.lavit.training import LavitStage1

    model = run(yaml("lavit", "run.valid_splits=[val]")).model.eval()
    lines = log_of(tmp_path / "lavit", "lavit-stage1")
    assert list(lines) == [1, 2, 3, 4, 5, 6] and all(math.isfinite(line["last_loss"]) for line in lines.values())
    assert "perplexity" not in lines[2] and lines[3]["perplexity"] > 1 and 0 < lines[6]["kept"] < 1
    assert {"valid/val/loss_cosine", "valid/val/tokens", "valid/val/perplexity"} <= set(lines[6])
    capsys.readouterr()

    checkpoint, out = tmp_path / "lavit" / "checkpoint_2.pth", tmp_path / "tokenizer"
    for sentence, more in (("missing from the file: 'tokenizer.encoder", []),
                           ("not the vision encoder that .*checkpoint_2.pth was trained with",
                            ["--vision", str(other_vision)])):
        assert main(["export-tokenizer", "--lavit", str(checkpoint), "--out", str(out), *more]) == 2
        assert re.search(sentence, capsys.readouterr().err)
    assert main(["export-tokenizer", "--lavit", str(checkpoint), "--vision", str(VISION), "--out", str(out)]) == 0
    tokenizer = load_dynamic_tokenizer(out / "tokenizer")
    decoder = CodeDecoder.from_pretrained(out / "decoder")
    pixels = tokenizer.transform.batch([open_image(path) for path in sorted(pictures.glob("*.png"))[:3]])
    noise = torch.randn(3, 16, 2)
    codes = tokenizer.encode(pixels, noise=noise)
    expected = LavitStage1.forward(model, pixels, noise=noise)
    assert torch.equal(torch.cat(codes), expected.codes_T)
    rebuilt = decoder.features([tokenizer.embed_codes(one) for one in codes])
    cosine = 1 - torch.nn.functional.cosine_similarity(rebuilt, tokenizer.patch_features(pixels), dim=-1).mean()
    torch.testing.assert_close(cosine, expected.loss_cosine, rtol=1e-3, atol=1e-4)


def test_shards_and_the_rate_of_the_token_selector(yaml, run, pictures, tmp_path):
    shard = tmp_path / "shard-000.tar"
    with tarfile.open(shard, "w") as tar:
        for image in sorted(pictures.glob("*.png")):
            tar.add(image, image.name)
    splits = f"datasets.pictures.build_info.splits={{train: {shard}}}"
    runner = run(yaml("lavit", splits, "run.max_epoch=1", "model.codebook_warmup=1", "model.selector_lr_scale=0.5",
                      "model.freeze_selector=true"))
    assert [group.get("lr_scale", 1.0) for group in runner.optimizer.param_groups] == [1.0, 1.0, 0.5, 0.5]
    assert len(runner.datasets["pictures"]["train"]) == 24
    with pytest.raises(ConfigError, match="The frozen vision encoder has no weights"):
        run(yaml("lavit", "model.vit_weights=null", name="wrong"))


def test_a_longer_run_with_another_seed_or_vision_encoder(yaml, run, other_vision, tmp_path, capsys):
    """The parts that later trainings begin with are random, and are not compared."""
    run(yaml("lavit", "run.max_epoch=2"))
    run(yaml("lavit", "run.max_epoch=3", "run.seed=7"))
    assert "run.seed: 42 -> 7" in capsys.readouterr().out and len(log_of(tmp_path / "lavit", "lavit-stage1")) == 6
    with pytest.raises(CheckpointError, match="another set of frozen weights"):
        run(yaml("lavit", "run.max_epoch=4", f"model.vit_weights={other_vision}"))


@pytest.mark.process
def test_two_processes_have_one_codebook(yaml, start, tmp_path):
    _, (first, second) = torchrun(start, tmp_path, yaml("lavit", "run.num_workers=0", "model.freeze_selector=true"))
    assert all(torch.equal(value, second[name]) for name, value in first.items() if not name.endswith("counts"))
