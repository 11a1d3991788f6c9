"""LaVIT's stage 1 on LAVIS: from image files to a tokenizer folder."""

import math
from pathlib import Path

import pytest
import torch
from lavis_runs import build, log_of, printed
from repository import NANO

VISION = NANO / "seed_tokenizer" / "diffusion_model" / "image_encoder"


@pytest.mark.slow
def test_train_and_export_of_lavit(yaml, run, images, tmp_path, capsys):
    # The exported tokenizer and decoder have the trained model's codes.
    from seed_multimodal import open_image
    from seed_multimodal.cli.main import main
    from seed_multimodal.models.lavit.checkpoints import load_dynamic_tokenizer
    from seed_multimodal.models.lavit.decoder import CodeDecoder
    from seed_multimodal.recipes.lavit.losses import LavitStage1

    model = run(yaml("lavit", "run.valid_splits=[val]")).model.eval()
    lines = log_of(tmp_path / "lavit", "lavit-stage1")
    assert all(math.isfinite(line["last_loss"]) for line in lines.values())
    assert "perplexity" not in lines[2]  # before codes are used
    assert lines[3]["perplexity"] > 1
    assert 0 < lines[6]["kept"] < 1
    assert {"valid/val/loss_cosine", "valid/val/perplexity"} <= set(lines[6])

    # The command that the run printed; the frozen vision encoder is not in the checkpoint.
    seed, *export = printed(capsys.readouterr().out)
    *without, _, vision, _, out = export
    assert main([*without, "--out", out]) == 2
    assert "tokenizer.encoder" in capsys.readouterr().err
    assert (seed, vision) == ("seed", str(VISION)) and main(export) == 0
    tokenizer = load_dynamic_tokenizer(Path(out, "tokenizer"))
    decoder = CodeDecoder.from_pretrained(Path(out, "decoder"))
    files = sorted(images.glob("*.png"))[:3]
    pixels = tokenizer.transform.batch([open_image(file).image for file in files])
    noise = torch.randn(3, 16, 2)
    codes = tokenizer.encode(pixels, noise=noise)
    expected = LavitStage1.forward(model, pixels, noise=noise)
    assert torch.equal(torch.cat(codes), expected.codes_T)
    rebuilt = decoder.features([tokenizer.embed_codes(row) for row in codes])
    assert rebuilt.shape == tokenizer.patch_features(pixels).shape


def test_build_with_a_rate_of_the_token_selector(yaml):
    # Two groups each: with and without decay.
    runner = build(yaml("lavit", "model.selector_lr_scale=0.5"))
    scales = [group.get("lr_scale", 1.0) for group in runner.optimizer.param_groups]
    assert scales == [1.0, 1.0, 0.5, 0.5]
