"""Distillation into few steps: objectives and guidance (families: test_pixel_decoders.py)."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from tiny.diffusion import write_unclip
from tiny.seed import write_code_decoder
from tiny.training import read_losses, seed_decoder_config, write_seed_decoder_parts

from seed_multimodal.models.seed.diffusion import UnclipDetokenizer
from seed_multimodal.models.seed.train_detokenizer import SeedDecoderTask

FEW = {"teacher_steps": 4, "student_steps": 2, "trained": "all"}
ONE = {"max_steps": 1, "save_steps": 0}
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
# Objective → class of a scheduler and its settings.
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "epsilon": ("DDIMScheduler", {**SCHEDULE, "clip_sample": False}),
    "velocity": (
        "DDIMScheduler",
        {**SCHEDULE, "clip_sample": False, "prediction_type": "v_prediction"},
    ),
    "flow": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
}


def build_scheduler(objective: str) -> Any:
    import diffusers  # slow to import

    name, settings = SCHEDULERS[objective]
    return getattr(diffusers, name)(**settings)


@pytest.fixture(scope="module")
def seed_parts(tmp_path_factory) -> Path:
    """Parts, and the teachers `codes` and `unclip` (with a conditioner)."""
    root = write_seed_decoder_parts(tmp_path_factory.mktemp("seed"))
    write_code_decoder(root / "codes")
    write_unclip(root / "unclip")
    return root


def seed_config(parts: Path, output: Path, teacher: str = "codes", **changes: Any) -> Any:
    model = {"teacher": str(parts / teacher), **FEW, **changes.pop("model", {})}
    return seed_decoder_config(parts, output, **{"trainer": ONE, **changes, "model": model})


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_student_of_as_many_steps_has_nothing_to_learn(seed_parts: Path, tmp_path, name):
    # Without guidance, its steps are the teacher's.
    teacher = tmp_path / "teacher"
    shutil.copytree(seed_parts / "codes", teacher)
    build_scheduler(name).save_pretrained(teacher / "scheduler")
    model = {"teacher": str(teacher), "teacher_steps": 2, "teacher_guidance": 1.0}
    still = {"learning_rate": 0.0}
    run = tmp_path / "run"
    SeedDecoderTask.train(seed_config(seed_parts, run, model=model, optim=still))
    assert max(read_losses(run)) < 1e-9


@pytest.mark.nightly
def test_a_student_of_stable_unclip_learns_guidance(seed_parts: Path, tmp_path):
    # A teacher with two runs a step; the student draws in two steps of one run.
    config = seed_config(
        seed_parts,
        tmp_path / "run",
        "unclip",
        model={"teacher_guidance": 6.0},
        optim={"learning_rate": 1e-3},
        trainer={"max_steps": 40, "save_steps": 0},
    )
    student = UnclipDetokenizer.from_pretrained(SeedDecoderTask.train(config)["decoder"])
    curve = read_losses(tmp_path / "run")
    assert sum(curve[-6:]) < 0.8 * sum(curve[:6])
    assert (student.defaults.num_inference_steps, student.defaults.guidance_scale) == (2, 1)
