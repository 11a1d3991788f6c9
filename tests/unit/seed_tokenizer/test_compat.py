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
print("bare", getattr(lavis, "__file__", None), len(list(lavis.__path__)))
for kind in ("models", "tasks", "runners", "processors"):
    print(kind, *sorted(getattr(compat.registry, f"list_{kind}")()))
print("schedules", *sorted(compat.registry.list_lr_schedulers()))
print("sets", *sorted(compat.registry.mapping["builder_name_mapping"]))
"""


@pytest.mark.process
def test_register_in_a_fresh_process(start):
    out, error = (
        process := start(sys.executable, "-W", "error::FutureWarning", "-c", CODE)
    ).communicate(timeout=120)
    assert process.returncode == 0, error
    printed = {line.partition(" ")[0]: line.partition(" ")[2] for line in out.splitlines()}
    assert {"linear_warmup_cosine_lr", "linear_warmup_cosine_steps", "linear"} <= set(
        printed.pop("schedules").split()
    )
    assert printed == {
        "heavy": "[]",
        "bare": "None 1",
        "tasks": "image_gen_pretrain image_text_pretrain",
        "models": "blip2_casual blip2_codebook_all_image lavit_tokenizer seed1_codebook_text",
        "runners": "runner_base runner_iter runner_seed",
        "processors": "blip2_image_train blip_caption blip_image_eval",
        "sets": "coco_caption conceptual_caption_3m laion_400m laion_coco nano pictures unsplash",
    }


@pytest.mark.process
def test_plain_import_of_lavis(start):
    """As in the original's folder, where the package lay; programs here find the prepared one."""
    code = (
        "import lavis\nfrom lavis.common.registry import registry\n"
        "from lavis.models import BaseModel\n"
        "from lavis.tasks.base_task import BaseTask\n"
        "print(registry.get_path('library_root'), lavis.__path__[0])"
    )
    out, error = (process := start(sys.executable, "-c", code)).communicate(timeout=120)
    assert process.returncode == 0, error
    root, library = out.split()
    assert root == library and "SEED_Tokenizer" not in library


@pytest.mark.process
def test_train_without_lavis(start):
    code = (
        "import sys; sys.modules['lavis'] = None\n"  # makes `import lavis` fail
        "import train; sys.exit(train.main(['--cfg-path', "
        "'lavis/projects/nano/pretrain_qformer.yaml']))"
    )
    out, error = (process := start(sys.executable, "-c", code)).communicate(timeout=120)
    assert process.returncode == 2 and not out
    assert error.strip() == (
        "train.py: LAVIS (salesforce-lavis 1.0.2) is not installed; install it with "
        "sh SEED_Tokenizer/install.sh (or: bash install.sh --lavis)."
    )
