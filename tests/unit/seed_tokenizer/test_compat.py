"""LAVIS next to a recent transformers, in a fresh process; the error without LAVIS."""

from __future__ import annotations

import sys

import pytest

CODE = """
import sys
from seed_lavis import compat, register
heavy = {"transformers", "diffusers", "timm", "pandas", "decord", "iopath", "cv2", "torchvision"}
print("heavy", sorted(heavy & set(sys.modules)))
register()
import lavis
for kind in ("models", "tasks", "runners", "processors", "lr_schedulers"):
    print(kind, *sorted(getattr(compat.registry, f"list_{kind}")()))
"""
REGISTERED = {
    "models": "blip2_casual blip2_codebook_all_image lavit_tokenizer seed1_codebook_text",
    "tasks": "image_gen_pretrain image_text_pretrain",
    "runners": "runner_seed",
    "processors": "blip2_image_train blip_caption blip_image_eval",
    "lr_schedulers": "linear_warmup_cosine_lr linear_warmup_cosine_steps",
}


def run_code(start, *command: str) -> tuple[str, str, int]:
    process = start(sys.executable, *command)
    output, error = process.communicate(timeout=120)
    return output, error, process.returncode


@pytest.mark.process
def test_register_in_a_fresh_process(start):
    # The names of the originals' YAML files, without LAVIS's heavy imports.
    output, error, code = run_code(start, "-W", "error::FutureWarning", "-c", CODE)
    assert code == 0, error
    printed = dict(line.split(" ", 1) for line in output.splitlines())
    assert printed["heavy"] == "[]"
    for kind, names in REGISTERED.items():
        assert set(names.split()) <= set(printed[kind].split()), kind


@pytest.mark.process
def test_train_without_lavis(start):
    # One line with the command that installs it.
    project = "lavis/projects/nano/pretrain_qformer.yaml"
    code = (
        "import sys; sys.modules['lavis'] = None\n"  # makes `import lavis` fail
        f"import train; sys.exit(train.main(['--cfg-path', '{project}']))"
    )
    _, error, code = run_code(start, "-c", code)
    assert code == 2
    assert "install.sh --lavis" in error and "Traceback" not in error
