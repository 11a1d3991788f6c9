"""The commands that runs print: stage 2 after stage 1, the export to a tokenizer."""

from pathlib import Path

import pytest
import torch
from lavis_runs import printed
from repository import ROOT
from tiny.vision import write_clip, write_vision

NIGHTLY = ("siglip", "eva trained", "seed1")


def write_eva(file) -> Path:
    """An EVA vision encoder's file, at the size of `lavis_runs.TINY`."""
    from seed_multimodal.nn.vision.eva import EvaConfig, EvaVit

    torch.manual_seed(1)
    torch.save(
        EvaVit(
            EvaConfig(image_size=64, patch_size=16, width=32, depth=1, heads=2, mlp_width=64)
        ).state_dict(),
        file,
    )
    return file


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    ["eva", "clip", *(pytest.param(case, marks=pytest.mark.nightly) for case in NIGHTLY)],
)
def test_export_by_the_printed_commands(case, yaml, run, tmp_path, capsys, monkeypatch):
    # The vision encoder is EVA's file, a CLIP folder or one of transformers, frozen or trained
    # further.
    from tiny.diffusion import write_text_encoder

    from seed_multimodal.cli.main import main

    monkeypatch.chdir(tmp_path)
    if case == "siglip":
        write_vision("siglip", tmp_path / "vision")
        options = [f"model.vit={{type: hub, path: {tmp_path}/vision}}"]
    else:
        is_clip = "clip" in case
        weights = write_clip(tmp_path / "clip") if is_clip else write_eva(tmp_path / "eva.pth")
        sizes = f"patch_size: 16, width: 32, depth: 1, heads: 2, mlp_width: 64, pre_norm: {is_clip}"
        options = [f"model.vit_weights={weights}", f"model.vit={{{sizes}}}"]
    options.append("run.max_epoch=1")
    run(yaml("stage1", *options, f"model.freeze_vit={'trained' not in case}"))
    script, _, config, _, *start = printed(capsys.readouterr().out)[1:]
    assert Path(script).name == "codebook.sh" and config == "YOUR_STAGE_2.yaml"
    if case == "siglip":
        options.append("model.alignment_target=encoder")
    if case == "seed1":
        text_encoder = write_text_encoder(tmp_path / "diffusion")
        options.append(f"model.text_encoder={text_encoder}")
    run(yaml("seed1" if case == "seed1" else "stage2", *start, *options))
    export = printed(capsys.readouterr().out)
    assert export[0] == "seed" and main(export[1:]) == 0
    image = ROOT / "images" / "cat.jpg"
    capsys.readouterr()
    assert main(["tokenize", str(image), "--model", export[-1]]) == 0
    assert sum(code.isdigit() for code in capsys.readouterr().out.split()) >= 32
