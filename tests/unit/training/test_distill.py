"""Distillation of pixel decoders into few steps: each family, each objective."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny_decoder
import tiny_detokenizer
import tiny_lavit_training
import tiny_sdxl
import tiny_system
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from huggingface_hub import constants
from tensors import equal

from seed_multimodal.diffusion.base import Detokenizer, fast_scheduler
from seed_multimodal.diffusion.objectives import build_objective
from seed_multimodal.errors import ConfigError
from seed_multimodal.models.lavit.decoder import CodeDecoder
from seed_multimodal.models.lavit.diffusion import LavitDetokenizer
from seed_multimodal.models.lavit.train_pixels import LavitPixelTask
from seed_multimodal.models.seed.diffusion import CodesDetokenizer, UnclipDetokenizer
from seed_multimodal.models.seed.train_detokenizer import SeedDecoderTask
from seed_multimodal.models.seed_x.diffusion import SdxlDetokenizer
from seed_multimodal.models.seed_x.train_detokenizer import DetokenizerTask
from seed_multimodal.training.pixel_decoder.distill import NoiseLevels
from seed_multimodal.weights import load_state_dict

FEW = {"teacher_steps": 4, "student_steps": 2, "trained": "all"}
SHORT = {"max_steps": 2, "save_steps": 0, "sample_steps": 2}
ONE = {"max_steps": 1, "save_steps": 0}
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SCHEDULERS = {
    "epsilon": DDIMScheduler(**SCHEDULE, clip_sample=False),
    "velocity": DDIMScheduler(**SCHEDULE, clip_sample=False, prediction_type="v_prediction"),
    "flow": FlowMatchEulerDiscreteScheduler(shift=3.0),
}


@pytest.fixture(scope="module")
def seed_parts(tmp_path_factory) -> Path:
    """Parts, and the teachers `codes` and `unclip` (with a conditioner)."""
    root = tiny_decoder.write_parts(tmp_path_factory.mktemp("seed"))
    tiny_decoder.write_decoder(root / "codes")
    tiny_system.write_detokenizer(root / "unclip")
    return root


def seed_config(parts: Path, output: Path, teacher: str = "codes", **changes: Any) -> Any:
    model = {"teacher": str(parts / teacher), **FEW, **changes.pop("model", {})}
    return tiny_decoder.config(parts, output, model=model, **changes)


def check_student(student: Detokenizer[Any], teacher: Detokenizer[Any], embeds: Any) -> None:
    """It draws in two steps without guidance by default; only the denoiser was trained."""
    assert student.defaults.num_inference_steps == 2
    assert student.defaults.guidance_scale == 1
    calls: list[int] = []
    hook = student.denoiser.register_forward_pre_hook(
        lambda module, args, options: calls.append(len(args[0])), with_kwargs=True
    )
    images = student(embeds, seeds=range(len(embeds)), height=16, width=16)
    hook.remove()
    assert calls == [len(embeds)] * 2 and images[0].size == (16, 16)
    for name, part in teacher.parts.items():
        same = equal(part.state_dict(), student.parts[name].state_dict())
        assert same == (name not in ("unet", "denoiser")), name


@pytest.mark.parametrize("teacher", ["codes", "unclip"])
def test_distil_a_decoder_of_seed(seed_parts: Path, tmp_path, teacher):
    record = SeedDecoderTask.train(
        seed_config(seed_parts, tmp_path / "run", teacher, trainer=SHORT)
    )
    assert (tmp_path / "run" / "samples" / "step-2.png").is_file()
    detokenizer_class = CodesDetokenizer if teacher == "codes" else UnclipDetokenizer
    before, after = (
        detokenizer_class.from_pretrained(folder)
        for folder in (seed_parts / teacher, record["decoder"])
    )
    embeds = torch.randn(2, 32, tiny_system.WIDTH)
    if teacher == "unclip":
        embeds = torch.randn(2, tiny_system.EMBEDDING)
    check_student(after, before, embeds)


def test_a_student_starts_from_an_earlier_one(seed_parts: Path, tmp_path):
    """Of a learning rate of zero the result is the start, not the teacher."""
    first = SeedDecoderTask.train(seed_config(seed_parts, tmp_path / "one", trainer=SHORT))
    start = {"start": first["decoder"]}
    still = {"learning_rate": 0.0}
    second = SeedDecoderTask.train(
        seed_config(seed_parts, tmp_path / "two", model=start, optim=still, trainer=ONE)
    )
    weights_file = "transformer/diffusion_pytorch_model.safetensors"
    folders = (seed_parts / "codes", Path(first["decoder"]), Path(second["decoder"]))
    teacher, before, after = (load_state_dict(folder / weights_file) for folder in folders)
    assert equal(after, before) and not equal(after, teacher)


def test_distil_a_decoder_of_the_hub(seed_parts: Path, tmp_path, monkeypatch):
    """Its files are in the hub client's cache."""
    repository = tmp_path / "cache" / "models--owner--decoder"
    shutil.copytree(seed_parts / "codes", repository / "snapshots" / "1")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("1")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    model = {"teacher": "owner/decoder"}
    config = seed_config(seed_parts, tmp_path / "run", model=model, trainer=SHORT)
    student = CodesDetokenizer.from_pretrained(SeedDecoderTask.train(config)["decoder"])
    teacher = CodesDetokenizer.from_pretrained(seed_parts / "codes")
    check_student(student, teacher, torch.randn(2, 32, tiny_system.WIDTH))


@pytest.mark.parametrize("stage", [1, 2])
def test_distil_an_adapter_of_seed_x(tmp_path, stage):
    """Of the second stage three runs a step become one."""
    parts = tiny_detokenizer.write_parts(tmp_path / "parts")
    tiny_sdxl.adapter(stage).save_pretrained(parts / "adapter")
    model = {"teacher": str(parts / "adapter"), **FEW}
    settings = tiny_detokenizer.config(parts, tmp_path / "run", stage, model=model, trainer=SHORT)
    record = DetokenizerTask.train(settings)
    before, after = (
        SdxlDetokenizer.from_pretrained(parts / "sdxl", folder)
        for folder in (parts / "adapter", record["adapter"])
    )
    check_student(after, before, torch.randn(2, 4, tiny_sdxl.WIDTH))


@pytest.mark.parametrize("head", ["highres", "lowres"])
def test_distil_a_pixel_decoder_of_lavit(tmp_path, head):
    """A result of the training, with its decoder of codes; images of several sizes."""
    parts = tiny_lavit_training.write_parts(tmp_path / "parts")
    config = tiny_lavit_training.config
    teacher = LavitPixelTask.train(config(parts, tmp_path / "first", head, trainer=ONE))["pixels"]
    model = {"teacher": str(teacher), **FEW}
    record = LavitPixelTask.train(config(parts, tmp_path / "run", head, model=model, trainer=SHORT))
    decoder = CodeDecoder.from_pretrained(Path(record["pixels"]) / "decoder")
    before, after = (
        LavitDetokenizer.from_pretrained(folder, decoder) for folder in (teacher, record["pixels"])
    )
    check_student(after, before, [torch.randn(n, 4) for n in (3, 9)])


@pytest.mark.parametrize("name", SCHEDULERS)
def test_noise_levels_step_as_the_scheduler(name):
    """All levels one by one, and their halves by one step, are those of the scheduler."""
    scheduler = fast_scheduler(SCHEDULERS[name], solver_order=1)
    objective = build_objective(scheduler)
    levels = NoiseLevels.of(scheduler, 6, torch.device("cpu"))
    halves = NoiseLevels.of(scheduler, 3, torch.device("cpu"))
    assert torch.equal(levels.steps[::2], halves.steps)
    torch.testing.assert_close(levels.noise[::2], halves.noise)
    torch.testing.assert_close(levels.signal[-1], torch.ones(1, 1, 1))

    start = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    latents = start
    expected = start
    scheduler.set_timesteps(6)
    for index, step in enumerate(scheduler.timesteps):
        prediction = torch.sin(latents + index)
        expected = scheduler.step(torch.sin(expected + index), step, expected).prev_sample
        level = torch.tensor([index, index])
        assert levels.steps[index] == step
        latents = levels.move(objective, latents, prediction, level, level + 1)
        torch.testing.assert_close(latents, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_student_of_as_many_steps_has_nothing_to_learn(seed_parts: Path, tmp_path, name):
    """Without guidance, its steps are the teacher's."""
    teacher = tmp_path / "teacher"
    shutil.copytree(seed_parts / "codes", teacher)
    SCHEDULERS[name].save_pretrained(teacher / "scheduler")
    model = {"teacher": str(teacher), "teacher_steps": 2, "teacher_guidance": 1.0}
    still = {"learning_rate": 0.0}
    run = tmp_path / "run"
    SeedDecoderTask.train(seed_config(seed_parts, run, model=model, optim=still, trainer=ONE))
    assert max(tiny_detokenizer.losses(run)) < 1e-9


def test_a_student_learns_guidance(seed_parts: Path, tmp_path):
    model = {"teacher_guidance": 6.0}
    trainer = {"max_steps": 40, "save_steps": 0}
    optim = {"learning_rate": 1e-3}
    run = tmp_path / "run"
    SeedDecoderTask.train(
        seed_config(seed_parts, run, "unclip", model=model, optim=optim, trainer=trainer)
    )
    curve = tiny_detokenizer.losses(run)
    assert sum(curve[-6:]) < 0.8 * sum(curve[:6])


def test_distillation_resumes_exactly(seed_parts: Path, tmp_path):
    """With averaged weights, after samples."""
    trainer = {"max_steps": 4, "save_steps": 2, "sample_steps": 2, "ema": 0.5}
    run = tmp_path / "run"
    settings = seed_config(seed_parts, run, trainer=trainer)
    SeedDecoderTask.train(settings)
    weights_file = "decoder/transformer/diffusion_pytorch_model.safetensors"
    uninterrupted = load_state_dict(run / weights_file)
    curve = tiny_detokenizer.losses(run)
    shutil.rmtree(run / "checkpoint-4")
    shutil.rmtree(run / "decoder")
    (run / "summary.json").unlink()
    SeedDecoderTask.train(settings)
    assert equal(uninterrupted, load_state_dict(run / weights_file))
    assert tiny_detokenizer.losses(run) == curve and len(curve) == 4


def test_steps_that_do_not_divide(seed_parts: Path, tmp_path):
    settings = seed_config(seed_parts, tmp_path / "run", model={"student_steps": 3})
    with pytest.raises(ConfigError, match="teacher_steps must be a multiple of student_steps"):
        SeedDecoderTask.train(settings)
