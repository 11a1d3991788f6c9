"""Start a training script as one process, or as many under torchrun; what `train_scripts/*.sh` call.

    launch.py --config YAML --port 18273 [NODE_RANK] [MASTER_ADDR] [--options KEY=VALUE …] [--debug]

Environment: NNODES (1), NPROC_PER_NODE (the GPUs of this machine, or 1), MASTER_PORT. A single process starts without
torchrun. Nothing is assumed about the network: NCCL_SOCKET_IFNAME and the like are used if set. A refusal is one
sentence and exit code 2 in both cases.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

import train

from seed_multimodal.entry import guarded
from seed_multimodal.errors import ConfigError


def count(name: str, default: int) -> int:
    """A positive number from the environment."""
    text = os.environ.get(name) or str(default)
    if not text.isdigit() or not int(text):
        raise ConfigError(f"{name} must be a positive number of processes or nodes, not {text!r}.")
    return int(text)


def torchrun(args: argparse.Namespace, nodes: int, processes: int, script: list[str]) -> int:
    """Run `train.py` under torchrun; its own exit code if it fails."""
    from seed_multimodal.training.torchrun import run_torchrun

    place = ["--standalone"]
    if nodes > 1 or args.master_addr:
        if not args.master_addr:
            raise ConfigError("Several nodes need the first one's address: sh SCRIPT NODE_RANK MASTER_ADDR.")
        place = [f"--nnodes={nodes}", f"--node-rank={args.node_rank}", f"--master-addr={args.master_addr}",
                 f"--master-port={os.environ.get('MASTER_PORT') or args.port}"]
    check(script)
    return run_torchrun([*place, f"--nproc-per-node={processes}", str(train.HERE / "train.py"), *script], "launch.py",
                        args.debug)


def check(script: list[str]) -> None:
    """Refuse a wrong configuration once, before processes start."""
    from seed_lavis import register

    register()
    from seed_lavis.run_config import load_config

    args = train.parser("").parse_args(script)
    load_config(args.cfg_path, args.options)


def launch(args: argparse.Namespace) -> int:
    """Count nodes and processes, and start."""
    nodes, processes = count("NNODES", 1), count("NPROC_PER_NODE", visible_gpus())
    script = ["--cfg-path", args.config, *(["--options", *args.options] if args.options else []),
              *(["--debug"] if args.debug else [])]
    if nodes * processes > 1:
        return torchrun(args, nodes, processes, script)
    return train.main(script)


def visible_gpus() -> int:
    """GPUs of this machine, at least 1 process without any."""
    import torch

    return max(1, torch.cuda.device_count())


def main(argv: Sequence[str] | None = None) -> int:
    """Parse and start; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("node_rank", nargs="?", type=int, default=0, help="this machine's number among NNODES")
    parser.add_argument("master_addr", nargs="?", default="", help="address of machine 0")
    parser.add_argument("--config", required=True, metavar="YAML")
    parser.add_argument("--port", type=int, required=True, help="port on machine 0 unless MASTER_PORT is set")
    parser.add_argument("--options", nargs="+", default=[], metavar="KEY=VALUE")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    args = parser.parse_args(argv)
    return guarded("launch.py", args.debug, lambda: launch(args))


if __name__ == "__main__":
    sys.exit(main())
