"""Shell scripts and programs as they start: on machines with another `sh`, or without torch."""

import os
import shutil
import stat
import subprocess
import sys

import pytest
from llm_runs import environment
from real_processes import run_process
from repository import ROOT

FOLDERS = ("scripts", "benchmarks", "src/lavit/scripts", "MultiModalLLM", "SEED_Tokenizer")
SCRIPTS = [
    ROOT / "install.sh",
    *sorted(file for name in FOLDERS for file in (ROOT / name).rglob("*.sh")),
]
STARTS_BASH = '[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"'
needs_dash = pytest.mark.skipif(shutil.which("dash") is None, reason="the sh of Debian and Ubuntu")


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return run_process(command, timeout=120, cwd=ROOT, env={**os.environ, **environment})


@pytest.mark.process
@needs_dash
def test_shell_scripts_parse():
    # `sh FILE` is dash there: a script with bash's own syntax must start bash before it is read.
    for path in SCRIPTS:
        code = path.read_text()
        commands = [line for line in code.splitlines() if line and not line.startswith("#")]
        shells = ["bash"] if commands[0].startswith(STARTS_BASH) else ["bash", "dash"]
        for shell in shells:
            done = run(shell, "-n", str(path))
            assert done.returncode == 0, done.stderr
        assert "bash" in shells[-1] or ("BASH_SOURCE" not in code and "pipefail" not in code), path


@pytest.mark.process
@needs_dash
@pytest.mark.parametrize(
    "script, text",
    [
        ("install.sh", "--lavis"),
        ("SEED_Tokenizer/install.sh", "--lavis"),
        ("scripts/start_frontend_8b.sh", "--request_address"),
        ("src/lavit/scripts/vqa_eval.sh", "--task_name"),
        ("MultiModalLLM/scripts/train_lavit_detokenizer.sh", "trainer"),
        ("MultiModalLLM/scripts/train_seed_x_detokenizer.sh", "trainer"),
    ],
)
def test_shell_scripts_print_their_help(tmp_path, script, text):
    # Started as `sh FILE`, from which each kind of script starts another program; an exported
    # CDPATH would send `cd scripts/..` elsewhere.
    for folder in ("scripts", "SEED_Tokenizer", "src/lavit/scripts"):
        (tmp_path / folder).mkdir(parents=True)
    done = run("dash", script, "--help", **environment(CDPATH=str(tmp_path)))
    assert done.returncode == 0 and text in done.stdout, done.stderr


def test_shell_scripts_go_to_their_own_folder():
    recipe = ROOT / "src/seed_multimodal/models/seed/recipe.sh"  # of all run.sh
    for path in (*SCRIPTS, recipe, ROOT / ".ci/run"):
        before, _, after = path.read_text().partition('cd "$(dirname')
        assert not after or "unset CDPATH" in before, path


@pytest.mark.process
def test_ci_runs_the_tests():
    path = ROOT / ".ci" / "run"
    assert path.stat().st_mode & stat.S_IXUSR and "scripts/test.sh" in path.read_text()
    assert run("bash", "-n", str(path)).returncode == 0


@pytest.mark.process
@pytest.mark.parametrize(
    "program",
    [
        "scripts/seed_tokenizer_inference.py",
        "gradio_demo/seed_llama_flask.py",
        "src/lavit/inference.py",
        "src/inference/eval_text2img_seed_x.py",
        "demo_recon.py",
        "MultiModalLLM/src/train/train.py",
    ],
)
def test_program_without_the_environment_says_how_to_get_one(program):
    # Here: a Python without the folder of installed packages.
    done = run(sys.executable, "-S", program, PYTHONPATH="")
    last = done.stderr.splitlines()[-1]
    assert last.startswith("ModuleNotFoundError") and "install.sh" in last, done


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.parametrize("streams", [">&-", "2>&-", ">&- 2>&- <&-"])
def test_programs_work_without_standard_streams(tmp_path, streams):
    # Cron wrappers start programs so; one that fails after its work is started again.
    out = tmp_path / "codes.jsonl"
    program = [sys.executable, "-m", "seed_multimodal", "tokenize", "images/fox.png", "--out"]
    done = run("sh", "-c", f'exec "$@" {streams}', "sh", *program, str(out))
    assert done.returncode == 0 and out.read_text().count("\n") == 1, done


# What a process has imported after one command and the next.
IMPORTS = """
import sys
from seed_multimodal.cli.main import main

large = "torch torchvision sympy transformers peft deepspeed diffusers gradio flask"
for command in sys.argv[1:]:
    if command == "page":
        import seed_multimodal.serving.page
    else:
        try:
            main(command.split())
        except SystemExit:
            pass
    print("imported:", *(name for name in large.split() if name in sys.modules))
"""
# Large libraries of the commands in this order; others would make them twice as slow to begin.
IMPORTED = {
    "describe --help": "",
    "describe images/fox.png --batch-size 0": "",
    "page": "gradio",
    "tokenize images/fox.png": "torch gradio",
    "describe images/fox.png": "torch torchvision sympy transformers gradio",
    "draw fox --out {out}": "torch torchvision sympy transformers peft diffusers gradio",
}


@pytest.mark.slow
@pytest.mark.process
def test_commands_import_what_they_use(tmp_path):
    commands = [command.format(out=tmp_path) for command in IMPORTED]
    done = run(sys.executable, "-c", IMPORTS, *commands, **environment())
    lines = [line for line in done.stdout.splitlines() if line.startswith("imported:")]
    assert [line.partition(": ")[2] for line in lines] == [*IMPORTED.values()], done
    # Warnings of other libraries are not for users.
    known = ("Running on ", "seed describe: error", "usage:", " ", "read back")
    assert not [line for line in done.stderr.splitlines() if not line.startswith(known)], done
