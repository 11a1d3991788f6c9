"""The nano speed run's two language-model stages through the application, against losses written down before.

The codes are drawn, not encoded, so that nothing but the data, the model, the optimiser and the loop is in play. After
a change that is meant to move the losses, this writes the file anew:
`PYTHONPATH=src:tests/warm python tests/multimodal_llm/test_nano_losses.py`.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
import warm_python
from safetensors import safe_open

from seed_multimodal.errors import CheckpointError, ConfigError
from seed_nano.train.config import load_config
from seed_nano.train.llm_recipe import PRETRAIN, SFT, install_llm, write_llm_recipes, write_records
from seed_nano.train.workspace import Workspace
from seed_nano.world.records import KINDS

ROOT = Path(__file__).resolve().parents[3]
EXPECTED = Path(__file__).with_name("nano_losses.json")
STEPS = (1, 2, 5, 10, 20, 30)
SETTINGS = ["pool=60", "gate_scenes=60", "llm.text_vocabulary=1500", "tokenizer.codes=1024",
            *(f"records.{kind}=60" for kind in KINDS)] + [
    f"train_{stage}={{steps: 30, batch_size: 8, lr: 3.0e-3, warmup: 5, precision: fp32, log_every: 1}}"
    for stage in ("pretrain", "sft")]


def prepared(folder: Path) -> tuple[Workspace, dict[str, dict[str, int]]]:
    """60 records of every kind with drawn codes and the configurations, in the shipped tokenizer's words."""
    out = folder / "system"
    out.mkdir(parents=True)
    (out / "seed_tokenizer").symlink_to(ROOT / "pretrained/nano/seed_tokenizer")
    space = Workspace(load_config(ROOT / "configs/nano/test.yaml", SETTINGS), folder, out)
    generator = torch.Generator().manual_seed(7)
    places = torch.arange(32) * 32
    counts, _ = write_records(space, lambda scenes: places + torch.randint(32, (len(scenes), 32), generator=generator))
    write_llm_recipes(space, counts)
    return space, counts


def trained(folder: Path, name: str, *more: str) -> list[dict[str, float]]:
    """One stage by the application, as a process of its own; returns its log."""
    plain = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    done = subprocess.run(
        [warm_python.PYTHON, str(ROOT / "MultiModalLLM/src/train/train.py"), "--config-path", str(folder),
         "--config-name", name, *more], capture_output=True, text=True, timeout=170,
        env={**plain, "PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    lines = next((folder / name).glob("*.jsonl")).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def losses(log: list[dict[str, float]]) -> dict[str, list[float]]:
    """What is written down: losses of single steps, and the held-out ones."""
    steps = {int(line["step"]): line for line in log if "loss" in line}
    held_out = next(line for line in log if "eval_loss" in line)
    return {"loss": [steps[step]["loss"] for step in STEPS],
            "held_out": [held_out["eval_text_loss"], held_out["eval_image_loss"]]}


@pytest.fixture(scope="module")
def line(tmp_path_factory: pytest.TempPathFactory) -> tuple[Workspace, dict[str, dict[str, list[float]]]]:
    space, _ = prepared(tmp_path_factory.mktemp("line") / "work")
    return space, {name: losses(trained(space.work, name)) for name in (PRETRAIN, SFT)}


@pytest.mark.process
@pytest.mark.slow
def test_losses_are_those_written_down(line: tuple[Workspace, dict[str, dict[str, list[float]]]]) -> None:
    expected = json.loads(EXPECTED.read_text(encoding="utf-8"))
    for name in (PRETRAIN, SFT):
        for what, values in line[1][name].items():
            # Muon multiplies in bf16, which not every release of torch rounds alike.
            assert values == pytest.approx(expected[name][what], rel=5e-3), f"{name} {what}"
        assert line[1][name]["loss"][-1] < 0.9 * line[1][name]["loss"][0]


@pytest.mark.process
def test_the_tuned_model_becomes_the_systems(line: tuple[Workspace, dict[str, dict[str, list[float]]]]) -> None:
    space = line[0]
    record = install_llm(space)
    assert record["sft_val_text_loss"] == pytest.approx(line[1][SFT]["held_out"][0], abs=1e-3)
    assert {file.name for file in (space.out / "seed_llama").iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors"}
    written = json.loads((space.work / "sft.done.json").read_text())
    assert written["val_text_loss"] == record["sft_val_text_loss"] and written["steps"] == 30
    assert written["parameters"] > 10_000 and written["batch_size"].endswith(" rows of 512")
    with safe_open(space.out / "seed_llama/model.safetensors", "pt") as handle:
        assert handle.get_slice("model.embed_tokens.weight").get_shape()[0] == space.words.vocabulary.size


@pytest.mark.slow
def test_a_stage_that_is_not_trained_is_named(tmp_path: Path) -> None:
    space, counts = prepared(tmp_path / "work")
    with pytest.raises(CheckpointError, match="llm_pretrain is not trained to its end; train it with: python Multi"):
        install_llm(space)
    space.config.train_sft.start = str(tmp_path)
    with pytest.raises(ConfigError, match="must be the folder of a LLaMA"):
        write_llm_recipes(space, counts)


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        work = prepared(Path(folder) / "work")[0].work
        found = {name: losses(trained(work, name)) for name in (PRETRAIN, SFT)}
        EXPECTED.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(EXPECTED.read_text())
