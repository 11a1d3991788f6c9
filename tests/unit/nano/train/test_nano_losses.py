"""nano's two language-model stages through the application, compared with recorded losses.

The codes are random, not encoded, so that only data, model, optimizer and loop matter. After a
change that is meant to change the losses:

    PYTHONPATH=src:tests/support:tests/support/warm python tests/unit/nano/train/test_nano_losses.py
"""

import json
import os
from pathlib import Path

import pytest
import torch
import warm_python
from real_processes import run_process
from repository import ROOT
from safetensors import safe_open

from seed_multimodal.language.tokenizer import MultimodalTokenizer
from seed_nano.train.assemble import install_llm
from seed_nano.train.pipeline import render
from seed_nano.train.tokenizer import write_initial_llm, write_records
from seed_nano.train.workspace import Workspace, load_settings
from seed_nano.world.records import KINDS

EXPECTED = Path(__file__).with_name("nano_losses.json")
STEPS = (1, 2, 4, 8, 12)
STAGES = {"llm_pretrain": "train_pretrain", "llm_sft": "train_sft"}
SETTINGS = [
    "pool=30",
    "held_out_scenes=30",
    "llm.text_vocabulary=1500",
    "tokenizer.codes=1024",
    *(f"records.{kind}=30" for kind in KINDS),
] + [
    f"{stage}={{steps: 12, batch_size: 8, lr: 3.0e-3, warmup: 2, precision: fp32, log_every: 1}}"
    for stage in STAGES.values()
]


def prepared(folder: Path) -> Workspace:
    """30 records of every kind with random codes, and the configurations, for the shipped
    tokenizer."""
    out = folder / "system"
    out.mkdir(parents=True)
    (out / "seed_tokenizer").symlink_to(ROOT / "pretrained/nano/seed_tokenizer")
    space = Workspace(load_settings("nano", "test", SETTINGS), folder, out)
    generator = torch.Generator().manual_seed(7)
    positions = torch.arange(32) * 32
    write_records(
        space, lambda scenes: positions + torch.randint(32, (len(scenes), 32), generator=generator)
    )
    write_initial_llm(space)
    for name, settings in STAGES.items():
        render(space, name, settings)
    return space


def trained(folder: Path, name: str) -> dict[str, list[float]]:
    """Run a stage as a process; returns its losses at STEPS and those of evaluation."""
    plain = {
        key: value
        for key, value in os.environ.items()
        if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    }
    done = run_process(
        (
            f"{warm_python.PYTHON} {ROOT / 'MultiModalLLM/src/train/train.py'} "
            f"--config-path {folder} --config-name {name} trainer.sample_steps=0"
        ).split(),
        timeout=170,
        env={
            **plain,
            "PYTHONPATH": str(ROOT / "src"),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
        },
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    log = [
        json.loads(line) for line in next((folder / name).glob("*.jsonl")).read_text().splitlines()
    ]
    steps = {int(line["step"]): line for line in log if "loss" in line}
    evaluation_line = next(line for line in log if "eval_loss" in line)
    return {
        "loss": [steps[step]["loss"] for step in STEPS],
        "held_out": [evaluation_line["eval_text_loss"], evaluation_line["eval_image_loss"]],
    }


@pytest.mark.process
@pytest.mark.slow
def test_stages_have_the_recorded_losses(tmp_path):
    space = prepared(tmp_path / "work")
    expected = json.loads(EXPECTED.read_text(encoding="utf-8"))
    for name in STAGES:
        losses = trained(space.work, name)
        for kind, values in losses.items():
            assert values == pytest.approx(expected[name][kind], rel=5e-3), f"{name} {kind}"
        assert losses["loss"][-1] < 0.95 * losses["loss"][0]

    assert install_llm(space)["text_loss"] == pytest.approx(losses["held_out"][0], abs=1e-3)
    tokenizer = MultimodalTokenizer.from_pretrained(space.tokenizer_folder)
    with safe_open(space.out / "seed_llama/model.safetensors", "pt") as handle:
        assert (
            handle.get_slice("model.embed_tokens.weight").get_shape()[0]
            == tokenizer.vocabulary.size
        )


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        work = prepared(Path(folder) / "work").work
        EXPECTED.write_text(
            json.dumps({name: trained(work, name) for name in STAGES}, indent=1) + "\n"
        )
    print(EXPECTED.read_text())
