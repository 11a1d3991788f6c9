"""`merge_lora_weights.py` turns tuned checkpoints, ours and original ones, into systems."""

import itertools
from pathlib import Path

import pytest
import torch
import yaml
from llm_runs import task_of
from systems import load
from tiny import read_json

from seed_multimodal.compat.weight_programs import merge_script
from seed_multimodal.recipes.seed_x.losses import TrainedAgent
from seed_multimodal.recipes.seed_x.train_agent import TuningTask

pytestmark = pytest.mark.slow
STEPS = 2


def tuned(config_of, output) -> tuple[TuningTask, Path]:
    """A finished run with its weights loaded, and its checkpoint."""
    config = config_of(output, lora=True, trainer={"max_steps": STEPS})
    TuningTask.train(config)
    task = task_of(TuningTask, config)
    task.prepare()
    task.load(output / f"checkpoint-{STEPS}")
    task.module.eval()
    return task, output / f"checkpoint-{STEPS}"


@pytest.fixture(scope="module")
def run(config_of, tmp_path_factory) -> tuple[TuningTask, Path]:
    return tuned(config_of, tmp_path_factory.mktemp("tuned") / "out")


def merge(parts_dir, folder, checkpoint: Path, *flags: str, **model) -> Path:
    """The merged system, by the original's program."""
    folder.mkdir(exist_ok=True)
    words = {"pretrained_model_name_or_path": str(parts_dir / "tokenizer")}
    for name, content in (("model", model), ("words", words)):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content))
    command = (
        f"--model_cfg {folder / 'model.yaml'} --tokenizer_cfg {folder / 'words.yaml'} "
        f"--lora_model {checkpoint} --save_path {folder / 'merged'}"
    )
    assert merge_script("merge_lora_weights.py", "", [*command.split(), *flags]) == 0
    return folder / "merged"


def check_system(task: TuningTask, parts_dir, merged: Path):
    """The system has the losses of the tuned module, and answers."""
    system = load(merged, vision=parts_dir / "vision", dtype="fp32", load_decoder=False)
    for batch in itertools.islice(task.data, 4):  # one of each source
        inputs = task.inputs(batch)
        with torch.no_grad():
            expected = task.module(**inputs)
            trained = TrainedAgent(
                system.llm,
                system.family.agent.input_resampler,
                system.family.agent.output_resampler,
                system.family.agent.settings,
            )
            trained.patch_pos_embed = system.family.agent.patch_pos_embed
            losses = trained(**inputs)
        for name, value in expected.items():
            assert float(losses[name]) == pytest.approx(float(value), rel=1e-4, abs=1e-6), name
    assert isinstance(
        system.ask(parts_dir / "pictures" / "red.jpg", "What is it?", max_new_tokens=4), str
    )


def test_merge_of_an_original_export(run, parts_dir, tmp_path):
    # Written by `zero_to_fp32.py`: one file with the tensor names of an old peft, no settings next
    # to it.
    task, checkpoint = run
    state = {
        name.replace(".base_layer.", "."): value for name, value in task.module.state_dict().items()
    }
    about = read_json(checkpoint / "agent.json")
    agent = {
        "_target_": "src.models.mllm.seed_x.ContinuousLVLM.from_pretrained",
        **{name: about[name] for name in ("input_resampler", "output_resampler")},
        "rec_loss_scale": 6.0,
    }
    (tmp_path / "agent.yaml").write_text(yaml.safe_dump(agent))
    torch.save(state, tmp_path / "pytorch_model.bin")
    flags = ["--agent_cfg", str(tmp_path / "agent.yaml")]
    model = {"path": str(parts_dir / "llm"), "lora": about["lora"]}
    merged = merge(parts_dir, tmp_path, tmp_path / "pytorch_model.bin", *flags, **model)
    check_system(task, parts_dir, merged)


def test_checkpoint_opens_as_a_system(run, parts_dir):
    # Its record names the base model and the vision encoder.
    task, checkpoint = run
    check_system(task, parts_dir, checkpoint)
