"""Distillation of a pixel decoder into few steps without guidance.

Progressive distillation (Salimans & Ho 2022, arXiv 2202.00512) of a guided teacher (Meng et al.
2023, arXiv 2210.03142), at once instead of by halving: one step of the student learns to reach the
latents that the teacher reaches in several steps, each with all its runs of the denoiser. Both step
as DDIM, or as Euler's method for a flow. The loss is the unweighted mean squared error of the
latents reached; the papers' is that of the clean latents x, weighted by the truncated SNR.

The student is the teacher's folder with another denoiser, a scheduler for few steps, and a
`seed_decode.json` with the number of steps and without guidance.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seed_multimodal.diffusion.base import (
    DEFAULTS,
    Denoising,
    Detokenizer,
    DrawingSettings,
    fast_scheduler,
)
from seed_multimodal.diffusion.objectives import Objective, is_flow
from seed_multimodal.disk import replace_text
from seed_multimodal.fingerprints import fingerprint
from seed_multimodal.training.pixel_decoder.encoders import EncodedImages, condition_images
from seed_multimodal.training.pixel_decoder.task import (
    PixelTask,
    Reconstruction,
    TrainedDetokenizer,
)

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

NO_GUIDANCE = {"guidance_scale": 1.0, "image_guidance_scale": 1.0}


class Student(TrainedDetokenizer):
    """The trained denoiser."""

    def forward(  # type: ignore[override]
        self, noisy: Tensor, steps: Tensor, denoising: Denoising
    ) -> Tensor:
        """The prediction `[B, C, h, w]` for noisy latents at time steps `[B]`."""
        return denoising.predict(self.detokenizer.denoiser, noisy, steps)


@dataclass
class NoiseLevels:
    """Noise levels of a scheduler's M steps: noisy latents are `signal · x + noise · e`."""

    steps: Tensor  # time steps [M]
    signal: Tensor  # [M + 1, 1, 1, 1]; the last is 1
    noise: Tensor  # [M + 1, 1, 1, 1]; the last is 0

    @classmethod
    def of(cls, scheduler: SchedulerMixin, count: int, device: torch.device) -> Self:
        """Those of a `fast_scheduler`."""
        scheduler.set_timesteps(count)
        sigmas = scheduler.sigmas.to(device)[:, None, None, None]
        if is_flow(scheduler):
            signal = 1 - sigmas
            noise = sigmas
        else:
            # The scheduler's sigmas are ratios of noise and signal.
            signal = (1 + sigmas**2).rsqrt()
            noise = sigmas * signal
        return cls(scheduler.timesteps.to(device), signal, noise)

    def noisy(self, latents: Tensor, noise: Tensor, levels: Tensor) -> Tensor:
        """Latents with noise at levels `[B]`."""
        return self.signal[levels] * latents + self.noise[levels] * noise

    def move(
        self, objective: Objective, noisy: Tensor, prediction: Tensor, start: Tensor, end: Tensor
    ) -> Tensor:
        """Noisy latents at levels `start` `[B]` → at levels `end`, by the denoiser's prediction."""
        clean = objective.clean(noisy, prediction, self.signal[start], self.noise[start])
        noise = (noisy - self.signal[start] * clean) / self.noise[start]
        return self.signal[end] * clean + self.noise[end] * noise


class Distillation(Reconstruction):
    """A student that learns from a teacher, by the conditions of a family's task."""

    def __init__(self, task: PixelTask) -> None:
        super().__init__(task)
        self.model = task.model
        self.drawing_steps = self.model.student_steps
        teacher_settings = ("teacher", "teacher_steps", "teacher_guidance", "student_steps")
        self.fixed_settings = ("trained", *teacher_settings)

    @cached_property
    def teacher(self) -> Detokenizer[Any]:
        """The decoder that is distilled."""
        teacher = self.task.load_decoder(self.model.teacher).to(self.task.device)
        for part in teacher.parts.values():
            part.requires_grad_(False).eval()
        self.frozen_models = {"teacher": fingerprint(teacher.denoiser)}
        return teacher

    def scheduler(self) -> SchedulerMixin:
        """The student's scheduler, which steps as DDIM or Euler's method."""
        return fast_scheduler(self.teacher.scheduler, solver_order=1, use_karras_sigmas=False)

    def build(self) -> Student:
        """The teacher with the student's denoiser and settings."""
        # Levels at which the teacher makes a step; the student at every n-th of them.
        scheduler = self.scheduler()
        self.levels = NoiseLevels.of(scheduler, self.model.teacher_steps, self.task.device)
        student = copy.copy(self.teacher)
        student.denoiser = self.task.load_decoder(self.model.start or self.model.teacher).denoiser
        student.scheduler = scheduler
        student.defaults = self.defaults
        return Student(student, {"denoiser": "denoiser"})

    def losses(
        self,
        model: nn.Module,
        images: EncodedImages,
        latents: Tensor,
        generator: torch.Generator,
    ) -> Mapping[str, Tensor]:
        """How far the student's step ends from the teacher's steps."""
        levels = self.levels
        objective = self.objective
        n_images = len(latents)

        # 1. Conditions of both, by the same random numbers.
        seeds = torch.randint(2**62, (n_images,), generator=generator).tolist()
        guided = self.drawing_settings(latents, guidance_scale=self.model.teacher_guidance)
        unguided = self.drawing_settings(latents, **self.unguided)
        teacher_run = self.denoising(guided, images, seeds)
        student_run = self.denoising(unguided, images, seeds)

        # 2. Each image's latents at the start of one of the student's steps.
        n_steps = self.model.student_steps
        teacher_per_student = self.model.teacher_steps // n_steps
        step = torch.randint(n_steps, (n_images,), generator=generator).to(latents.device)
        start = step * teacher_per_student
        noise = torch.randn(latents.shape, generator=generator).to(latents)
        noisy = levels.noisy(latents, noise, start)
        # Drawing starts from noise, or from a conditioner's latents.
        is_first = (step == 0)[:, None, None, None]
        noisy = torch.where(is_first, student_run.start.to(noisy), noisy)

        # 3. The teacher's steps.
        target = noisy
        with torch.no_grad():
            for level in range(teacher_per_student):
                current = start + level
                prediction = teacher_run.predict(
                    self.teacher.denoiser, target, levels.steps[current]
                )
                target = levels.move(objective, target, prediction, current, current + 1)

        # 4. The student's step.
        prediction = model(noisy, levels.steps[start], student_run)
        end = start + teacher_per_student
        reached = levels.move(objective, noisy, prediction.float(), start, end)
        loss = F.mse_loss(reached, target)
        return {"total_loss": loss, "mse": loss.detach()}

    @property
    def unguided(self) -> dict[str, float]:
        """Settings of drawing without guidance, those that this family has."""
        defaults = vars(self.teacher.defaults)
        return {name: value for name, value in NO_GUIDANCE.items() if name in defaults}

    def drawing_settings(self, latents: Tensor, **settings: float | None) -> DrawingSettings:
        """Settings of the teacher for the size of latents."""
        height, width = latents.shape[2:]
        factor = self.teacher.factor
        return self.teacher.check_settings(height=height * factor, width=width * factor, **settings)

    @torch.no_grad()
    def denoising(
        self, settings: DrawingSettings, images: EncodedImages, seeds: Sequence[int]
    ) -> Denoising:
        """Conditions of a batch as in drawing."""
        teacher = self.teacher
        embeds = self.task.embeds(images.conditions)
        negatives = self.task.null_embeds
        if negatives is not None:
            negatives = negatives.expand(len(embeds), *negatives.shape[1:])
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        conditions = condition_images(images.batch)
        return teacher.prepare(settings, generators, embeds, negatives, conditions)

    # ---- the result

    @property
    def defaults(self) -> DrawingSettings:
        """The student's."""
        return replace(
            self.teacher.defaults,
            num_inference_steps=self.model.student_steps,
            preset="original",
            **self.unguided,
        )

    def save(self, module: TrainedDetokenizer, folder: Path) -> None:
        """Write a folder as the teacher's."""
        self.task.save_student(module.detokenizer.denoiser, self.teacher, folder)
        self.scheduler().save_pretrained(folder / "scheduler")
        replace_text(folder / DEFAULTS, json.dumps(vars(self.defaults)) + "\n")
