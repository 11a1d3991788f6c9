"""Train a tokenizer stage on LAVIS, as LAVIS's own train.py: one process, or one of torchrun's.

    python train.py --cfg-path lavis/projects/blip2/train/pretrain_qformer.yaml \\
        --options run.max_epoch=1
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))  # runs from a checkout

from seed_multimodal.cli.common import program_parser  # noqa: E402
from seed_multimodal.entry import claim_stdout, run_and_exit, run_program  # noqa: E402


def build(cfg_path: str, options: Sequence[str]) -> Any:
    """The runner that a configuration describes, through LAVIS's registry."""
    import torch
    from seed_lavis import register

    register()
    from seed_lavis.compat import registry
    from seed_lavis.options import load_config

    from seed_multimodal.training.agreement import agree
    from seed_multimodal.training.distributed import ProcessGroup, join_processes

    config = load_config(cfg_path, options)
    run = config.run_cfg
    run.device = str(join_processes(run.device, run.timeout_minutes))
    agree(ProcessGroup(run.timeout_minutes), config.to_dict(), Path(run.output_dir))
    # All ranks build the same model; the trainer seeds every step itself.
    torch.manual_seed(run.seed)
    task = registry.get_task_class(run.task).setup_task(cfg=config)
    datasets = task.build_datasets(config)
    model = task.build_model(config)
    return registry.get_runner_class(run.runner)(config, task, model, datasets, "")


def train(cfg_path: str, options: Sequence[str]) -> int:
    """Build and train, or (`run.evaluate`) print the held-out losses; exit code 0."""
    from seed_multimodal.training.distributed import process_group_cleanup, translate_errors

    # The trainer translates errors of its own.
    with (
        process_group_cleanup(),
        translate_errors("the start", lambda: "checkpoints of earlier runs are intact"),
    ):
        if "run.evaluate=True" in options:
            stdout = claim_stdout()  # from log lines
            print(json.dumps(build(cfg_path, options).evaluate()), file=stdout)
        else:
            build(cfg_path, options).train()
    return 0


def main(
    argv: Sequence[str] | None = None,
    program: str = "train.py",
    description: str = str(__doc__),
    more: Sequence[str] = (),
) -> int:
    """Run; returns the exit code (2: an error, with one sentence on stderr).

    more: options besides the user's.
    """
    parser = program_parser(program, description)
    parser.add_argument(
        "--cfg-path", required=True, metavar="YAML", help="configuration of the run"
    )
    parser.add_argument(
        "--options",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="keys that override the file's",
    )
    return run_program(parser, lambda args: train(args.cfg_path, [*args.options, *more]), argv)


if __name__ == "__main__":
    run_and_exit(main)
