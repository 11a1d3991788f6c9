"""The commands that runs print: stage 2 after stage 1, the export to a tokenizer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lavis_runs import printed, write_clip, write_text_encoder
from repository import ROOT

NIGHTLY = ("eva trained", "seed1", "lavit eva")


def write_eva(file: Path) -> Path:
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
    # The vision encoder is EVA's file or a CLIP folder, frozen or trained further.
    from seed_multimodal.cli.main import main

    monkeypatch.chdir(tmp_path)
    vision = write_clip(tmp_path / "clip") if "clip" in case else write_eva(tmp_path / "eva.pth")
    sizes = (
        "model.vit={patch_size: 16, width: 32, depth: 1, heads: 2, mlp_width: 64, "
        f"pre_norm: {'clip' in case}}}"
    )
    options = [f"model.vit_weights={vision}", sizes]
    if "lavit" in case:
        heads = (
            "model.merger={merger_depth: 1, merger_heads: 2, merger_mlp_width: 64, llm_width: 8}"
        )
        run(yaml("lavit", *options, heads))
    else:
        run(
            yaml("stage1", *options, f"model.freeze_vit={'trained' not in case}", "run.max_epoch=1")
        )
        script, _, config, _, start = printed(capsys.readouterr().out)[1:]
        assert Path(script).name == "codebook.sh" and config == "YOUR_STAGE_2.yaml"
        kind = "seed1" if case == "seed1" else "stage2"
        text = (
            [f"model.text_encoder={write_text_encoder(tmp_path / 'diffusion')}"]
            if kind == "seed1"
            else []
        )
        run(yaml(kind, start, *options, *text, "run.max_epoch=1"))
    export = printed(capsys.readouterr().out)
    assert export[0] == "seed" and main(export[1:]) == 0
    if "lavit" not in case:
        image = ROOT / "images" / "cat.jpg"
        capsys.readouterr()
        assert main(["tokenize", str(image), "--model", export[-1]]) == 0
        assert sum(code.isdigit() for code in capsys.readouterr().out.split()) >= 32
