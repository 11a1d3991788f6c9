"""Run real commands on random weights in the originals' layouts and sizes; measure their memory.

    python benchmarks/rehearsal.py --scratch /tmp/rehearsal                  every row
    python benchmarks/rehearsal.py --scratch /tmp/rehearsal --only 8b-draw   some
    python benchmarks/rehearsal.py --list                                    all commands

Prints a JSON line for each row, also into SCRATCH/results.jsonl; rows that have succeeded there are
skipped (exit code 0 and, from a server, status 200). A row that needs another's files runs that one
first. A model is written when its first row runs, and the one before is removed (45 GB of disk at
most). anonymous_gb: memory that cannot be dropped, at its peak, of the command and its children;
resident_gb: with mapped files, which the kernel drops if another program needs the memory. A
command is killed, and its row has `"fits": false`, when less than 1 GB of the machine is available
(others_gb: what other programs held before). Answers mean nothing; `seconds` are those of this
machine under `load`, with model files in its cache; cpu_seconds depend less on other programs.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from original_layouts import MODELS
from shared import ROOT, plain_parser, start

from seed_multimodal.evaluation import machine

RESERVE = 10**9  # bytes that stay available for others
SAMPLE_SECONDS = 0.1
RESULTS = "results.jsonl"
REQUEST_SECONDS = 1800
CAT = ROOT / "images/cat.jpg"
SEED = f"{sys.executable} -m seed_multimodal"
PORT = 7899
ADDRESS = f"http://127.0.0.1:{PORT}"
SERVER = f"{sys.executable} {ROOT}/gradio_demo/seed_llama_flask.py --port {PORT}"
APPLICATION = ROOT / "MultiModalLLM"
TRAIN = (
    f"{sys.executable} {APPLICATION}/src/train/train.py data=data.yaml trainer.max_steps=1 "
    "trainer.gradient_accumulation_steps=1 trainer.dataloader_num_workers=0 output_dir=log"
)
MERGE = (
    f"{sys.executable} {APPLICATION}/src/tools/merge_lora_weights.py "
    f"--model_cfg {APPLICATION}/configs/model/vicuna_7b_lora_pretrained.yaml "
    f"--tokenizer_cfg {APPLICATION}/configs/tokenizer/seed_llama_tokenizer.yaml "
    "--lora_model pretrained/lora --force --save_path merged"
)
# One row of 256 positions, instead of the six of 2,048 of the published pretraining.
DATA = """sources: [{files: captions.jsonl, decoder: pretrain.caption}]
packing: true
length: 256
rows: 1
"""


@dataclass(frozen=True)
class Row:
    """A command, run in the folder of a model.

    request: of a server, the body of a POST to /generate, after which the server is stopped.
    needs: the row that writes files which this one reads.
    """

    model: str
    command: str
    request: dict[str, Any] | None = None
    needs: str = ""


DESCRIBE = f"{SEED} describe {CAT} --dtype bfloat16 --max-new-tokens 16 --model"
LAPTOP = f"{DESCRIBE} 8b --engine llama.cpp --max-running 1"
DRAW = f'{SEED} draw "a red apple" --dtype bfloat16 --steps 2 --out apple.png --model'
ROWS = {
    "8b-describe": Row("8b", f"{DESCRIBE} 8b"),
    "8b-reconstruct": Row(
        "8b", f"{SEED} reconstruct {CAT} --model 8b --dtype bfloat16 --steps 2 --out cat.png"
    ),
    "8b-draw": Row("8b", f"{DRAW} 8b"),
    "8b-describe-8bit": Row("8b", f"{DESCRIBE} 8b --quantization 8bit"),
    "8b-describe-4bit": Row("8b", f"{DESCRIBE} 8b --quantization 4bit"),
    "8b-describe-int8": Row("8b", f"{DESCRIBE} 8b --quantization int8"),
    "8b-draw-4bit": Row("8b", f"{DRAW} 8b --quantization 4bit"),
    "8b-export-gguf": Row("8b", f"{SEED} export-gguf --model 8b --quant q4_k_m"),
    "8b-describe-gguf": Row("8b", LAPTOP, needs="8b-export-gguf"),
    "8b-describe-gguf-80": Row("8b", f"{LAPTOP} --max-new-tokens 80", needs="8b-export-gguf"),
    "8b-server": Row(
        "8b",
        f"{SERVER} --system 8b --dtype bfloat16",
        {
            "text": "USER: <image>What is this?\nASSISTANT:",
            "images": [base64.b64encode(CAT.read_bytes()).decode()],
            "max_new_tokens": 16,
        },
    ),
    "seed-x-describe-4bit": Row("seed-x-i", f"{DESCRIBE} seed-x-i --quantization 4bit"),
    "seed-x-draw-4bit": Row(
        "seed-x-i", f"{DRAW} seed-x-i --quantization 4bit --height 512 --width 512"
    ),
    "7b-merge-bf16": Row("vicuna", f"{MERGE} --dtype bf16"),
    "7b-merge-fp32": Row("vicuna", MERGE),
    "7b-qlora-step": Row("vicuna", f"{TRAIN} +model.quantization=4bit"),
    "7b-lora-step": Row("vicuna", TRAIN),
    "lavit-describe": Row("lavit", f"{DESCRIBE} lavit"),
    "lavit-draw": Row("lavit", f"{DRAW} lavit --height 512 --width 512"),
}


# ---- files


def model_folder(scratch: Path, model: str) -> Path:
    """A folder with the model in `pretrained/`; other models are removed."""
    folder = scratch / model
    finished = folder / "finished"
    if finished.is_file():
        return folder
    for name in MODELS:
        shutil.rmtree(scratch / name, ignore_errors=True)

    # 1. The weights.
    folder.mkdir(parents=True)
    started = time.perf_counter()
    writer = ROOT / "benchmarks/original_layouts.py"
    subprocess.run([sys.executable, writer, model, folder / "pretrained"], check=True)
    n_bytes = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    seconds = time.perf_counter() - started
    print(f"{model}: {n_bytes / 1e9:.1f} GB in {seconds:.0f} s", file=sys.stderr)

    # 2. Data of a training.
    record = json.dumps({"image_ids": list(range(32)), "text": "a red apple on a plate " * 8})
    (folder / "captions.jsonl").write_text(f"{record}\n" * 64)
    (folder / "data.yaml").write_text(DATA)
    finished.touch()
    return folder


# ---- measuring


def machine_bytes(name: str) -> int:
    """A size of the machine's memory: "MemTotal", or "MemAvailable" to programs."""
    text = Path("/proc/meminfo").read_text()
    return 1024 * int(text.partition(f"{name}:")[2].split()[0])


def process_tree(pid: int) -> Iterator[int]:
    """A process and its descendants that run."""
    yield pid
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            yield from process_tree(int(child))


def memory(pid: int) -> tuple[int, int]:
    """Bytes of a process and its children: anonymous, and with mapped files."""
    anonymous = 0
    resident = 0
    try:
        for process in process_tree(pid):
            text = Path(f"/proc/{process}/status").read_text()
            for name in ("RssAnon", "RssFile", "RssShmem"):
                size = 1024 * int((text.partition(f"{name}:")[2].split() or ["0"])[0])
                resident += size
                anonymous += size if name == "RssAnon" else 0
    except OSError:
        pass  # a process ended
    return anonymous, resident


def children_cpu_seconds() -> float:
    """CPU time of this program's children that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def ask(process: subprocess.Popen[bytes], request: dict[str, Any], output: BinaryIO) -> int | None:
    """Send one request to a server as soon as it listens, write its answer, then stop it.

    Returns the HTTP status; None: the server ended without an answer.
    """
    body = json.dumps(request).encode()
    message = urllib.request.Request(
        f"{ADDRESS}/generate", body, {"Content-Type": "application/json"}
    )
    while process.poll() is None:
        try:
            answer = urllib.request.urlopen(message, timeout=REQUEST_SECONDS)
        except urllib.error.HTTPError as error:
            answer = error
        except OSError:  # it does not listen yet
            time.sleep(1)
            continue
        output.write(answer.read())
        process.terminate()
        process.wait()
        return answer.status
    return None


def measure(row: Row, folder: Path) -> dict[str, Any]:
    """Run a command and sample its memory."""
    shutil.rmtree(folder / "log", ignore_errors=True)  # a training would resume an earlier one
    printed = folder / "output.txt"
    started = time.perf_counter()
    cpu_before = children_cpu_seconds()
    load = os.getloadavg()[0]
    others = machine_bytes("MemTotal") - machine_bytes("MemAvailable")
    peak_anonymous = 0
    peak_resident = 0
    fits = True
    with printed.open("wb") as output, ThreadPoolExecutor(1) as pool:
        process = subprocess.Popen(
            shlex.split(row.command),
            cwd=folder,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        if row.request is not None:
            status = pool.submit(ask, process, row.request, output)
        while process.poll() is None:
            # 1. The peaks.
            anonymous, resident = memory(process.pid)
            peak_anonymous = max(peak_anonymous, anonymous)
            peak_resident = max(peak_resident, resident)

            # 2. Other programs come first.
            if machine_bytes("MemAvailable") < RESERVE:
                fits = False
                os.killpg(process.pid, signal.SIGKILL)
            time.sleep(SAMPLE_SECONDS)
    results = {
        "fits": fits,
        "exit_code": process.returncode,
        "seconds": round(time.perf_counter() - started, 1),
        "cpu_seconds": round(children_cpu_seconds() - cpu_before, 1),
        "anonymous_gb": round(peak_anonymous / 1e9, 2),
        "resident_gb": round(peak_resident / 1e9, 2),
        "others_gb": round(others / 1e9, 2),
        "load": [load, os.getloadavg()[0]],
        "output": printed.read_text(errors="replace")[-500:],
    }
    if row.request is not None:
        results["http_status"] = status.result()
    return results


def succeeded(results: Mapping[str, Any]) -> bool:
    """Whether a command ended well and, of a server, the request was answered."""
    return results["exit_code"] == 0 and results.get("http_status", 200) == 200


# ---- the program


def record(name: str, scratch: Path) -> None:
    """Measure a row, after the one that it needs; print its line and append it to the file."""
    row = ROWS[name]
    folder = model_folder(scratch, row.model)
    if row.needs and not (folder / f"{row.needs}.succeeded").is_file():
        record(row.needs, scratch)

    figures = measure(row, folder)
    if succeeded(figures):
        (folder / f"{name}.succeeded").touch()
    line = json.dumps(
        {"row": name, "results": figures, **machine.circumstances("cpu", row.command)}
    )
    print(line, flush=True)
    with (scratch / RESULTS).open("a") as file:
        file.write(f"{line}\n")


def run(options: argparse.Namespace) -> None:
    if options.list:
        for name, row in ROWS.items():
            print(f"{name}: {row.command}")
        return

    # Rows that were measured before are kept.
    options.scratch.mkdir(parents=True, exist_ok=True)
    results = options.scratch / RESULTS
    lines = results.read_text().splitlines() if results.is_file() else []
    measured = map(json.loads, lines)
    done = {line["row"] for line in measured if succeeded(line["results"])}
    for name in options.only or ROWS:
        if name not in done:
            record(name, options.scratch)


if __name__ == "__main__":
    parser = plain_parser(__doc__)
    parser.add_argument("--scratch", type=Path, default=Path("rehearsal"), help="scratch folder")
    parser.add_argument("--only", nargs="+", choices=ROWS, metavar="ROW", help="these rows")
    parser.add_argument("--list", action="store_true", help="print the rows and their commands")
    start(run, parser)
