"""The documented commands on the nano set: stage 1, stage 2, and a tokenizer exported from both."""

from __future__ import annotations

import shlex

import pytest
import torch
from lavis_runs import ROOT, TINY, TINY_STAGE2

SHORT = [*TINY, "run.iters_per_epoch=2"]


@pytest.mark.process
@pytest.mark.slow
def test_both_stages_and_export(start, tmp_path):
    first = start("sh", "train_scripts/causal_qformer.sh", "0", "127.0.0.1", "--options", *SHORT,
                  f"run.output_dir={tmp_path}/q", CONFIG="lavis/projects/nano/pretrain_qformer.yaml")
    out, error = first.communicate(timeout=150)
    assert first.returncode == 0, error
    assert "Stage 1 (causal Q-Former): 4 steps, 32 pictures" in out and f"{tmp_path}/q/checkpoint_1.pth" in out
    assert f"Next: CONFIG={tmp_path}/q/stage2.yaml sh train_scripts/codebook.sh" in out
    assert {"checkpoint_0.pth", "checkpoint_1.pth", "config.json", "config.yaml", "log.txt", "stage1.log.jsonl",
            "stage1.done.json", "stage1.checkpoints"} <= {file.name for file in (tmp_path / "q").iterdir()}

    second = start("sh", "train_scripts/codebook.sh", "--options", *SHORT, *TINY_STAGE2[1:],
                   f"model.pretrained={tmp_path}/q/checkpoint_1.pth", f"run.output_dir={tmp_path}/c",
                   CONFIG="lavis/projects/nano/pretrain_codebook.yaml")
    out, error = second.communicate(timeout=150)
    assert second.returncode == 0, error
    (line,) = (line for line in out.splitlines() if line.startswith("Next: "))
    assert line.startswith(f"Next: seed export-tokenizer --stage1 {tmp_path}/q/checkpoint_1.pth")
    tokenizer = ROOT / "pretrained" / "nano" / "seed_tokenizer"  # whose word pieces stage 1 read
    assert f"--text-tokenizer {tokenizer} --out tokenizer" in line
    log = (tmp_path / "c" / "stage2.log.jsonl").read_text()
    for key in ("samples_per_s", "loss_embed", "loss_recon_s", "loss_distil_image", "codebook_used", "perplexity",
                "wait_share", "peak_memory_mib", "eta_seconds", "lr", "grad", "bad_samples"):
        assert f'"{key}"' in log, key

    from seed_multimodal.cli.main import main
    from seed_multimodal.seed.modeling import Seed2Tokenizer

    command = shlex.split(line.removeprefix("Next: seed "))  # as it is printed, but for the folder
    assert main([*command[:-1], str(tmp_path / "tokenizer")]) == 0
    assert (tmp_path / "tokenizer" / "tokenizer.model").is_file()
    codes = Seed2Tokenizer.from_pretrained(tmp_path / "tokenizer").encode(torch.rand(2, 3, 64, 64))
    assert codes.shape == (2, 32) and 64 < int(codes.max()) < 1024
