"""Run real commands on random weights in the originals' layouts and sizes; measure their memory.

    python benchmarks/rehearsal.py --scratch /tmp/rehearsal                  every row
    python benchmarks/rehearsal.py --scratch /tmp/rehearsal --only 8b-draw   some

Prints a JSON line for each row. A model is written when its first row runs, and the one before is
removed (45 GB of disk at most). anonymous_gb: memory that cannot be dropped, at its peak, of the
command and its children; resident_gb: with mapped files, which the kernel drops if another program
needs the memory. Answers mean nothing; `seconds` are those of this machine, with model files in its
cache; cpu_seconds depend less on other programs.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
from original_layouts import MODELS
from shared import ROOT, start

from seed_multimodal.evaluation import machine

SAMPLE_SECONDS = 0.1
SEED = f"{sys.executable} -m seed_multimodal"
TRAIN = (
    f"{sys.executable} {ROOT}/MultiModalLLM/src/train/train.py data=data.yaml trainer.max_steps=1 "
    "trainer.gradient_accumulation_steps=1 trainer.dataloader_num_workers=0 output_dir=log "
    "model.model.pretrained_model_name_or_path=pretrained/seed_llama_8b_sft"
)
# One row of 256 positions, instead of the six of 2,048 of the published pretraining.
DATA = """sources: [{files: captions.jsonl, decoder: pretrain.caption}]
packing: true
length: 256
rows: 1
"""
DESCRIBE = f"{SEED} describe {ROOT}/images/cat.jpg --dtype bfloat16 --max-new-tokens 16 --model"
RECONSTRUCT = f"{SEED} reconstruct {ROOT}/images/cat.jpg --dtype bfloat16 --steps 2 --model"
DRAW = f'{SEED} draw "a red apple" --dtype bfloat16 --steps 2 --out apple.png --model'
# Another autoencoder than the model's, which the next row writes again.
SMALL = f"""{sys.executable} -c '
from diffusers import AutoencoderTiny
AutoencoderTiny().save_pretrained("pretrained/stable-diffusion-2-1-unclip/vae")
' && rm finished"""
EXPORT = f"{SEED} export-gguf --model 8b --quant q4_k_m"

# Row → model, and a command, which runs in the folder of the model.
ROWS = {
    "8b-describe": ("8b", f"{DESCRIBE} 8b"),
    "8b-reconstruct": ("8b", f"{RECONSTRUCT} 8b --out cat.png"),
    "8b-draw": ("8b", f"{DRAW} 8b"),
    "8b-describe-8bit": ("8b", f"{DESCRIBE} 8b --quantization 8bit"),
    "8b-describe-4bit": ("8b", f"{DESCRIBE} 8b --quantization 4bit"),
    "8b-describe-int8": ("8b", f"{DESCRIBE} 8b --quantization int8"),
    "8b-reconstruct-small": ("8b", f"{SMALL} && {RECONSTRUCT} 8b --out cat.png"),
    "8b-describe-gguf": ("8b", f"{EXPORT} && {DESCRIBE} 8b --engine llama.cpp --max-running 1"),
    "seed-x-describe-4bit": ("seed-x-i", f"{DESCRIBE} seed-x-i --quantization 4bit"),
    "seed-x-draw-4bit": (
        "seed-x-i",
        f"{DRAW} seed-x-i --quantization 4bit --height 512 --width 512",
    ),
    "8b-lora-step": ("8b", TRAIN),
    "8b-qlora-step": ("8b", f"{TRAIN} +model.quantization=4bit"),
    "lavit-describe": ("lavit", f"{DESCRIBE} lavit"),
    "lavit-draw": ("lavit", f"{DRAW} lavit --height 512 --width 512"),
}


def model_folder(scratch: Path, model: str) -> Path:
    """A folder with the model in `pretrained/`; other models are removed."""
    folder = scratch / model
    finished = folder / "finished"
    if finished.is_file():
        return folder
    for name in MODELS:
        shutil.rmtree(scratch / name, ignore_errors=True)

    # 1. The weights.
    writer = ROOT / "benchmarks/original_layouts.py"
    subprocess.run([sys.executable, writer, model, folder / "pretrained"], check=True)

    # 2. Data of a training.
    record = json.dumps({"image_ids": list(range(32)), "text": "a red apple on a plate " * 8})
    (folder / "captions.jsonl").write_text(f"{record}\n" * 64)
    (folder / "data.yaml").write_text(DATA)
    finished.touch()
    return folder


def memory(pid: int) -> tuple[int, int]:
    """Bytes of a process and its children: anonymous, and with mapped files."""
    anonymous = 0
    resident = 0
    try:
        process = psutil.Process(pid)
        for member in (process, *process.children(recursive=True)):
            sizes = member.memory_info()
            anonymous += sizes.rss - sizes.shared
            resident += sizes.rss
    except psutil.NoSuchProcess:
        pass  # it ended
    return anonymous, resident


def measure(command: str, folder: Path) -> dict[str, Any]:
    """Run a command and sample its memory."""
    shutil.rmtree(folder / "log", ignore_errors=True)  # a training would resume an earlier one
    started = time.perf_counter()
    cpu_before = sum(os.times()[2:4])  # of children that have ended
    peak_anonymous = 0
    peak_resident = 0
    with (folder / "output.txt").open("wb") as output:
        process = subprocess.Popen(
            ["bash", "-c", command], cwd=folder, stdout=output, stderr=subprocess.STDOUT
        )
        while process.poll() is None:
            anonymous, resident = memory(process.pid)
            peak_anonymous = max(peak_anonymous, anonymous)
            peak_resident = max(peak_resident, resident)
            time.sleep(SAMPLE_SECONDS)
    return {
        "exit_code": process.returncode,
        "seconds": round(time.perf_counter() - started, 1),
        "cpu_seconds": round(sum(os.times()[2:4]) - cpu_before, 1),
        "anonymous_gb": round(peak_anonymous / 1e9, 2),
        "resident_gb": round(peak_resident / 1e9, 2),
        "output": (folder / "output.txt").read_text(errors="replace")[-500:],
    }


def run(options: argparse.Namespace) -> None:
    options.scratch.mkdir(parents=True, exist_ok=True)
    for name in options.only or ROWS:
        model, command = ROWS[name]
        figures = measure(command, model_folder(options.scratch, model))
        circumstances = machine.circumstances("cpu", command)
        print(json.dumps({"row": name, "results": figures} | circumstances), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scratch", type=Path, default=Path("rehearsal"))
    parser.add_argument("--only", nargs="+", choices=ROWS, metavar="ROW", help=", ".join(ROWS))
    start(run, parser)
