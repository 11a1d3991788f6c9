"""Train a tokenizer stage on LAVIS, as LAVIS's own train.py: one process, or one of torchrun's.

    python train.py --cfg-path lavis/projects/blip2/train/pretrain_qformer.yaml \\
        --options run.max_epoch=1
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))  # runs from a checkout

from seed_multimodal.entry import add_debug, claim_stdout, run_and_exit, run_guarded  # noqa: E402


def parser(description: str) -> argparse.ArgumentParser:
    """LAVIS's arguments, and `--debug`."""
    arguments = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument(
        "--cfg-path", required=True, metavar="YAML", help="configuration of the run"
    )
    arguments.add_argument(
        "--options",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="keys that override the file's",
    )
    add_debug(arguments)
    return arguments


def build(args: argparse.Namespace) -> Any:
    """The runner that the configuration describes, through LAVIS's registry."""
    import torch
    from seed_lavis import register

    register()
    from seed_lavis.compat import registry
    from seed_lavis.options import load_config

    from seed_multimodal.training.agreement import agree
    from seed_multimodal.training.distributed import ProcessGroup, join_processes

    config = load_config(args.cfg_path, args.options)
    run = config.run_cfg
    run.device = str(join_processes(run.device, run.timeout_minutes))
    agree(ProcessGroup(run.timeout_minutes), config.to_dict(), Path(run.output_dir))
    # All ranks build the same model; the trainer seeds every step itself.
    torch.manual_seed(run.seed)
    task = registry.get_task_class(run.task).setup_task(cfg=config)
    datasets = task.build_datasets(config)
    model = task.build_model(config)
    return registry.get_runner_class(run.runner)(config, task, model, datasets, "")


def train(args: argparse.Namespace) -> int:
    """Build and train, or (`run.evaluate`) print the held-out losses; exit code 0."""
    from seed_multimodal.training.distributed import process_group_cleanup, translate_errors

    # The trainer translates errors of its own.
    with (
        process_group_cleanup(),
        translate_errors("the start", lambda: "checkpoints of earlier runs are intact"),
    ):
        if "run.evaluate=True" in args.options:
            stdout = claim_stdout()  # from log lines
            print(json.dumps(build(args).evaluate()), file=stdout)
        else:
            build(args).train()
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run; returns the exit code (2: an error, with one sentence on stderr)."""
    args = parser(str(__doc__)).parse_args(argv)
    return run_guarded("train.py", args.debug, lambda: train(args))


if __name__ == "__main__":
    run_and_exit(main)
