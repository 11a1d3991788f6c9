"""`merge_lora_weights.py` turns tuned checkpoints, ours and original ones, into systems."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from seed_multimodal.compat.weight_programs import merge_script
from seed_multimodal.models.seed_x.losses import TrainedAgent
from seed_multimodal.models.seed_x.pipeline import SeedX
from seed_multimodal.models.seed_x.train_agent import TuningTask
from seed_multimodal.training.distributed import ProcessGroup

pytestmark = pytest.mark.slow
STEPS = 2


def tuned(config_of, output: Path, lora: bool = True) -> tuple[TuningTask, Path]:
    """A finished run with its weights loaded, and its checkpoint."""
    config = config_of(output, lora=lora, trainer={"max_steps": STEPS})
    TuningTask.train(config)
    task = TuningTask(TuningTask.read(config), ProcessGroup(), torch.device("cpu"))
    task.prepare()
    task.load_weights(output / f"checkpoint-{STEPS}")
    task.module.eval()
    task.batches = list(itertools.islice(task.data, 4))  # one of each source
    return task, output / f"checkpoint-{STEPS}"


@pytest.fixture(scope="module")
def run(config_of, tmp_path_factory) -> tuple[TuningTask, Path]:
    return tuned(config_of, tmp_path_factory.mktemp("tuned") / "out")


def merge(
    parts_dir: Path,
    folder: Path,
    checkpoint: Path,
    *flags: str,
    lora: Any = None,
    base: bool = True,
) -> int:
    folder.mkdir(exist_ok=True)
    model = {"lora": lora, **({"path": str(parts_dir / "llm")} if base else {"sizes": {}})}
    (folder / "model.yaml").write_text(yaml.safe_dump(model))
    (folder / "words.yaml").write_text(
        yaml.safe_dump({"pretrained_model_name_or_path": str(parts_dir / "tokenizer")})
    )
    return merge_script(
        "merge_lora_weights.py",
        "",
        [
            *(
                f"--model_cfg {folder / 'model.yaml'} --tokenizer_cfg {folder / 'words.yaml'} "
                f"--lora_model {checkpoint} --save_path {folder / 'merged'}"
            ).split(),
            *flags,
        ],
    )


def check_system(task: TuningTask, parts_dir: Path, merged: Path) -> None:
    """The system has the losses of the tuned module, and answers."""
    system = SeedX.from_pretrained(
        merged,
        vision=parts_dir / "vision",
        device="cpu",
        dtype="fp32",
        log=None,
        load_decoder=False,
    )
    for batch in task.batches:
        inputs = task.inputs(batch)
        with torch.no_grad():
            expected = task.module(**inputs)
            trained = TrainedAgent(
                system.llm,
                system.agent.input_resampler,
                system.agent.output_resampler,
                system.agent.settings,
            )
            trained.patch_pos_embed = system.agent.patch_pos_embed
            losses = trained(**inputs)
        for name, value in expected.items():
            assert float(losses[name]) == pytest.approx(float(value), rel=1e-4, abs=1e-6), name
    assert isinstance(
        system.ask(parts_dir / "pictures" / "red.jpg", "What is it?", max_new_tokens=4), str
    )


def test_merge_of_a_checkpoint_and_tuning_of_the_merged_agent(
    config_of,
    run: tuple[TuningTask, Path],
    parts_dir: Path,
    tmp_path,
    capsys,
):
    task, checkpoint = run
    assert merge(parts_dir, tmp_path, checkpoint) == 0
    log = capsys.readouterr().err
    assert "14 with LoRA merged in" in log
    assert "; 21 tensors of resamplers" in log  # without the sinusoidal embeddings
    merged = tmp_path / "merged"
    assert {path.name for path in merged.iterdir()} == {"llm", "agent"}
    check_system(task, parts_dir, merged)
    again = TuningTask(
        TuningTask.read(
            config_of(
                tmp_path / "again",
                lora=True,
                model={"path": str(merged / "llm")},
                agent={"path": str(merged / "agent")},
            )
        ),
        ProcessGroup(),
        torch.device("cpu"),
    )
    again.prepare()
    again.module.eval()
    inputs = task.inputs(task.batches[1])
    with torch.no_grad():  # a new LoRA changes nothing yet
        expected = task.module(**inputs)
        losses = again.module(**inputs)
    assert float(losses["total_loss"]) == pytest.approx(float(expected["total_loss"]), rel=1e-4)


@pytest.mark.parametrize("frozen", [True, False])
def test_merge_of_an_original_export(
    frozen, run: tuple[TuningTask, Path], parts_dir: Path, tmp_path
):
    """Written by `zero_to_fp32.py`: one file with the tensor names of an old peft, no settings next
    to it.
    """
    task, checkpoint = run
    state = {
        name.replace(".base_layer.", "."): value
        for name, value in task.module.state_dict().items()
        if frozen or name in task.weights()
    }
    about = json.loads((checkpoint / "agent.json").read_text())
    (tmp_path / "agent.yaml").write_text(
        yaml.safe_dump(
            {
                "_target_": "src.models.mllm.seed_x.ContinuousLVLM.from_pretrained",
                **{name: about[name] for name in ("input_resampler", "output_resampler")},
                "rec_loss_scale": 6.0,
            }
        )
    )
    torch.save(state, tmp_path / "pytorch_model.bin")
    assert (
        merge(
            parts_dir,
            tmp_path,
            tmp_path / "pytorch_model.bin",
            "--agent_cfg",
            str(tmp_path / "agent.yaml"),
            lora=about["lora"],
        )
        == 0
    )
    check_system(task, parts_dir, tmp_path / "merged")


def test_merge_of_a_fully_trained_model_needs_no_base(config_of, parts_dir: Path, tmp_path, capsys):
    task, checkpoint = tuned(config_of, tmp_path / "out", lora=False)
    assert merge(parts_dir, tmp_path / "files", checkpoint, base=False) == 0
    assert "0 with LoRA merged in" in capsys.readouterr().err
    check_system(task, parts_dir, tmp_path / "files" / "merged")


def test_checkpoint_opens_as_a_system(run: tuple[TuningTask, Path], parts_dir: Path):
    """Its record names the base model and the vision encoder.

    The other parts are the originals'.
    """
    task, checkpoint = run
    check_system(task, parts_dir, checkpoint)
