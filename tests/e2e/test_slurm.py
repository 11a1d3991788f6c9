"""The batch scripts for clusters, each on two processes of this machine that stand for two
nodes."""

import os
from pathlib import Path

import pytest
from llm_runs import environment
from real_processes import free_port, run_checked
from repository import ROOT
from tiny import write_json

pytestmark = [pytest.mark.nightly, pytest.mark.process, pytest.mark.timeout(300)]
# What the scripts take from Slurm: `srun` starts a command once per node; the nodes are this
# machine.
SRUN = """#!/bin/sh
while [ "${1#--}" != "$1" ]; do shift; done
SLURM_NODEID=1 "$@" &
SLURM_NODEID=0 "$@" && wait $!
"""


@pytest.fixture
def sbatch(tmp_path):
    """Run a batch script as Slurm would; more variables by name."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", "#!/bin/sh\necho 127.0.0.1\necho 127.0.0.1\n")):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    port = free_port()

    def run(script: str, *arguments, **more: str) -> str:
        return run_checked(
            ["sh", f"scripts/slurm/{script}.sbatch", *map(str, arguments)],
            cwd=ROOT,
            timeout=170,
            env=environment(
                PATH=f"{tools}:{os.environ['PATH']}",
                SLURM_JOB_NUM_NODES="2",
                SLURM_JOB_NODELIST="a,b",
                SLURM_JOB_ID=str(port),
                MASTER_PORT=str(port),
                **more,
            ),
        ).stdout

    return run


def test_tokenizer_stages_on_two_nodes(sbatch, tmp_path):
    overrides = [
        "run.max_epoch=1",
        "run.iters_per_epoch=2",
        "run.batch_size_train=4",
        "run.warmup_steps=1",
    ]

    def stage(script: str, project: str, *options: str) -> Path:
        out = tmp_path / script
        configuration = f"lavis/projects/nano/{project}.yaml"
        options = (f"run.output_dir={out}", *options, *overrides)
        sbatch(script, "--options", *options, CONFIG=configuration)
        return next(out.rglob("checkpoint_0.pth"))

    first = stage("stage1", "pretrain_qformer")
    stage("stage2", "pretrain_codebook", f"model.pretrained={first}")
    assert len(list(tmp_path.rglob("curves.png"))) == 2


def test_codes_then_language_model_on_two_nodes(sbatch, tmp_path):
    settings = tmp_path / "images.yaml"
    settings.write_text(
        "{format: nano, format_options: {split: pairs, content: captions, number: 24}}"
    )
    codes = tmp_path / "codes"
    arguments = (
        f"--tokenizer configs/tokenizer/nano.yaml --data {settings} --save_dir {codes} "
        "--num_workers 0 --block 12"
    )
    for task in "46":  # of an array of any numbers
        array = {"SLURM_ARRAY_TASK_ID": task, "SLURM_ARRAY_TASK_COUNT": "2"}
        sbatch("pretokenize", *arguments.split(), **array)
    data = tmp_path / "data.yaml"
    source = {"name": "mine", "files": str(codes), "decoder": "pretrain.caption"}
    write_json(data, {"sources": [source], "length": 128, "rows": 1})
    small = (
        "model=nano_lora",
        "tokenizer=nano",
        f"data={data}",
        "optim=nano",
        "trainer=nano",
        "deepspeed=none",
    )
    for script in ("pretrain", "sft"):
        out = tmp_path / script
        sbatch(script, *small, "trainer.max_steps=2", f"output_dir={out}")
        assert (out / "checkpoint-2").is_dir()


def test_any_training_script_on_two_nodes(sbatch, tmp_path):
    small = "model=nano data=nano optim=nano trainer=nano data.batch_size=2 trainer.max_steps=1"
    flags = f"{small} trainer.sample_steps=0 output_dir={tmp_path / 'out'}"
    sbatch("train", "MultiModalLLM/scripts/train_seed_decoder.sh", *flags.split())
    assert (tmp_path / "out" / "checkpoint-1").is_dir()
