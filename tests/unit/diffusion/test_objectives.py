"""Objectives: what noise is added, what is predicted, and what a prediction means."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensors import normal
from torch.testing import assert_close
from yaml_tables import read_tables

from seed_multimodal.diffusion.base import fast_scheduler
from seed_multimodal.diffusion.objectives import NoisyLatents, build_objective, is_flow
from seed_multimodal.diffusion.training import ConditionDropout
from seed_multimodal.errors import ConfigError

SCHEDULERS = read_tables(__file__)


def build_scheduler(name, settings):
    import diffusers  # slow to import

    return getattr(diffusers, name)(**settings)


@pytest.fixture(scope="module", params=SCHEDULERS)
def scheduler(request):
    return build_scheduler(*SCHEDULERS[request.param])


def coefficients(scheduler, steps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`signal` and `noise` `[B, 1, 1, 1]` of the papers: noisy = signal · x + noise · e."""
    if is_flow(scheduler):
        times = steps / 1000
        pair = (1 - times, times)
    else:
        share = scheduler.alphas_cumprod[steps]
        pair = (share.sqrt(), (1 - share).sqrt())
    return pair[0][:, None, None, None], pair[1][:, None, None, None]


@given(seed=st.integers(0, 10**6))
def test_noise_target_and_clean_latents_of_any_step(scheduler, seed):
    # If any of the three disagrees, a trained decoder draws noise.
    generator = torch.Generator().manual_seed(seed)
    latents, noise = torch.randn(2, 3, 4, 2, 2, generator=generator)
    objective = build_objective(scheduler)
    steps = objective.sample_timesteps(3, generator)
    signal, level = coefficients(scheduler, steps)

    noisy = objective.add_noise(latents, noise, steps)
    assert_close(noisy, signal * latents + level * noise)
    target = objective.target(latents, noise, steps)
    expected = {
        "epsilon": noise,
        "v_prediction": signal * noise - level * latents,
        "flow": noise - latents,
    }
    assert_close(
        target, expected["flow" if is_flow(scheduler) else scheduler.config.prediction_type]
    )
    clean = objective.clean(noisy, target, signal, level)
    # At the last steps hardly any signal is left to divide by.
    assert_close(clean, latents, atol=2e-4, rtol=1e-3)


def test_noisy_latents_are_those_of_their_generator(scheduler):
    # A resumed run must see the same noise.
    objective = build_objective(scheduler)
    latents = torch.randn(3, 4, 2, 2, dtype=torch.float64)
    first, again = (
        NoisyLatents.sample(objective, latents, torch.Generator().manual_seed(7)) for _ in range(2)
    )
    assert torch.equal(first.latents, again.latents) and torch.equal(first.steps, again.steps)
    signal, level = coefficients(scheduler, first.steps)
    clean = objective.clean(first.latents, first.target, signal, level)
    assert_close(clean, latents, atol=2e-4, rtol=1e-3)

    # The loss: zero for the target, the mean squared error in float32 for others.
    assert float(first.losses(first.target)["total_loss"]) == 0
    prediction = (first.target + 2).requires_grad_()
    losses = first.losses(prediction)
    assert losses["total_loss"].dtype == torch.float32 and losses["total_loss"].requires_grad
    assert not losses["mse"].requires_grad
    assert float(losses["mse"]) == losses["total_loss"].item() == pytest.approx(4)


@pytest.mark.parametrize("preset", [copy.deepcopy, fast_scheduler], ids=["original", "fast"])
def test_sampling_with_perfect_predictions_ends_at_the_image(scheduler, preset):
    # What training teaches, and what the sampler takes the prediction for, must be the same.
    objective = build_objective(scheduler)
    image = torch.full((2, 1, 1, 1), 0.7)
    sampler = preset(scheduler)
    sampler.set_timesteps(20)
    start = normal(0, *image.shape)
    latents = start * getattr(sampler, "init_noise_sigma", 1.0)
    for step in sampler.timesteps:
        noisy = latents
        if hasattr(sampler, "scale_model_input"):
            noisy = sampler.scale_model_input(latents, step)
        # Noisy latents are linear in the noise.
        steps = step.to(objective.sample_timesteps(1, None).dtype).expand(2)
        zero = torch.zeros(2, 1, 1, 1)
        level = objective.add_noise(zero, zero + 1, steps)
        noise = (noisy - objective.add_noise(image, zero, steps)) / level
        latents = sampler.step(objective.target(image, noise, steps), step, latents).prev_sample
    assert_close(latents, image, rtol=0, atol=2e-3)


@pytest.mark.parametrize("times", ["logit_normal", "uniform"])
@pytest.mark.parametrize(
    "name, shift", [("Stable Diffusion 3", 3), ("SANA", 3), ("a flow without shift", 1)]
)
def test_time_steps_of_a_flow_are_shifted_towards_noise(name, shift, times):
    objective = build_objective(build_scheduler(*SCHEDULERS[name]), times)
    steps = objective.sample_timesteps(4000, torch.Generator().manual_seed(0)) / 1000
    unshifted = steps / (shift - (shift - 1) * steps)
    assert 0 < float(steps.min()) and float(steps.max()) < 1
    assert float(unshifted.mean()) == pytest.approx(0.5, abs=0.02)
    deviation = 0.208 if times == "logit_normal" else 0.289
    assert float(unshifted.std()) == pytest.approx(deviation, abs=0.01)


@pytest.mark.parametrize(
    "name, settings, named",
    [
        ("DDIMScheduler", {"prediction_type": "sample"}, "sample"),
        (
            "FlowMatchEulerDiscreteScheduler",
            {"use_dynamic_shifting": True},
            "use_dynamic_shifting",
        ),
    ],
)
def test_build_objective_of_a_scheduler_without_one(name, settings, named):
    with pytest.raises(ConfigError, match=named):
        build_objective(build_scheduler(name, settings))


def test_condition_dropout_draws_its_shares():
    # Drawing with guidance needs a denoiser that also saw no conditions.
    dropout = ConditionDropout(embeds=0.2, image=0.3, both=0.1)
    no_embeds, no_image = dropout.draw(4000, torch.Generator().manual_seed(0))
    for pattern, share in (((True, False), 0.2), ((False, True), 0.3), ((True, True), 0.1)):
        chosen = (no_embeds == pattern[0]) & (no_image == pattern[1])
        assert float(chosen.float().mean()) == pytest.approx(share, abs=0.02)
