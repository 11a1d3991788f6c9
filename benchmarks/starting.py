"""Time how commands begin: CPU seconds of new processes, beside the imports that they cannot avoid.

python benchmarks/starting.py
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile

SEED = "from seed_multimodal.cli.main import main; main({!r}.split())"
LLAMA = "from transformers import LlamaForCausalLM"
UNET = f"{LLAMA}; from diffusers import UNet2DConditionModel"
# A command, and the imports with which it is compared.
PAIRS = {
    "--help": "pass",
    "describe images/fox.png --batch-size 0": "pass",
    "tokenize images/fox.png": "import torch",
    "describe images/fox.png": LLAMA,
    "draw fox --out {out}": UNET,
}


def cpu_seconds(code: str) -> float:
    before = os.times()
    subprocess.run([sys.executable, "-c", code], capture_output=True)
    after = os.times()
    user = after.children_user - before.children_user
    return user + after.children_system - before.children_system


def run(repeats: int) -> None:
    """Each command and its imports in turn; the medians."""
    print("| seed | CPU s | imports | CPU s | ratio |\n| --- | ---: | --- | ---: | ---: |")
    with tempfile.TemporaryDirectory() as out:
        for command, imports in PAIRS.items():
            code = SEED.format(command.format(out=out))
            rounds = [(cpu_seconds(code), cpu_seconds(imports)) for _ in range(repeats)]
            seconds, least = map(statistics.median, zip(*rounds, strict=True))
            ratio = f"{seconds / least:.2f}"
            print(f"| {command} | {seconds:.2f} | {imports} | {least:.2f} | {ratio} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    run(parser.parse_args().repeats)
