"""Contract of the pixel decoders' training: variants × train and draw, start, distil, samples and
average, other frozen models, wrong settings.

A new family or denoiser is tested by its entry. Killed runs: e2e/test_trainers.py.
"""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from installed_package import install
from llm_runs import compose
from llm_runs import losses as run_losses
from PIL import Image
from tensors import equal
from tiny.diffusion import TINY_AUTOENCODER, write_unclip
from tiny.seed import write_code_decoder
from tiny.training import APPLICATION, LAVIT, SEED, SEED_X
from yaml_tables import read_tables

from seed_multimodal import errors
from seed_multimodal.diffusion.base import Detokenizer
from seed_multimodal.diffusion.networks import scaled_latents, spatial_factor
from seed_multimodal.state_dicts import load_state_dict
from seed_multimodal.training.pixel_decoder.autoencoder import AutoencoderTask

SHORT = {"max_steps": 2, "save_steps": 0}
FEW_STEPS = {"teacher_steps": 4, "student_steps": 2, "trained": "all"}
STILL = {"learning_rate": 0.0}
HELD_OUT = {"name": "scenes", "format": "nano", "options": {"number": 1}}


FAMILIES = {"SEED": SEED, "SEED_X": SEED_X, "LAVIT": LAVIT}
TABLES = read_tables(__file__)
VARIANTS = TABLES["variants"]


class Run:
    """Runs of one variant on its tiny parts."""

    def __init__(self, variant: str, folder):
        self.family = FAMILIES[VARIANTS[variant]["family"]]
        self.options = VARIANTS[variant]["options"]
        self.folder = folder
        self.parts = self.family.write_parts(folder / "parts")

    def __call__(self, name, parts: Path | None = None, **changes) -> Path:
        """Train in the folder `name`; returns the result's folder."""
        groups = {"trainer": SHORT, **changes}
        groups["model"] = {**self.options.get("model", {}), **changes.get("model", {})}
        options = {**self.options, **groups}
        config = self.family.config(parts or self.parts, self.folder / name, **options)
        return Path(self.family.task_class.train(config)[self.family.result])

    def load(self, folder) -> Detokenizer:
        return self.family.load(self.parts, folder)

    def losses(self, name) -> list[float]:
        return list(run_losses(self.folder / name).values())


@pytest.fixture
def run(variant, tmp_path) -> Run:
    return Run(variant, tmp_path)


def weights(folder) -> dict[str, torch.Tensor]:
    """All weights of a result."""
    return {
        f"{file.parent.name}.{name}": value
        for file in sorted(folder.rglob("*.safetensors"))
        for name, value in load_state_dict(file).items()
    }


def draw(detokenizer: Detokenizer, embeds, rows: list[int], **settings) -> np.ndarray:
    """Images of these rows as numbers."""
    chosen = [embeds[row] for row in rows] if isinstance(embeds, list) else embeds[rows]
    options = {"num_inference_steps": 2, "height": 16, "width": 16, **settings}
    images = detokenizer(chosen, seeds=rows, guidance_scale=1.0, **options)
    return np.stack([np.asarray(image, np.int32) for image in images])


@pytest.mark.slow
@pytest.mark.parametrize(
    "variant",
    [
        pytest.param(name, marks=pytest.mark.nightly if "nightly" in case else ())
        for name, case in VARIANTS.items()
    ],
)
def test_train_then_start_then_distil(run):
    # What a user does with one decoder, step by step.
    first = run("first")

    # 1. The result draws; an image does not depend on the others of its batch.
    teacher = run.load(first)
    embeds = run.family.inputs(teacher)
    together = draw(teacher, embeds, [0, 1, 2])
    assert together.shape == (3, 16, 16, 3)
    assert np.abs(draw(teacher, embeds, [2])[0] - together[2]).max() <= 1

    # 2. A run that starts from it without learning keeps weights, autoencoder and scheduler.
    files = [path for path in first.rglob("*.json") if path.parent.name in ("scheduler", "vae")]
    same = run("same", model={"start": str(first)}, optim=STILL)
    before = weights(first)
    after = weights(same)
    assert before.keys() == after.keys()
    assert equal(before, after)
    for file in files:
        assert (same / file.relative_to(first)).read_text() == file.read_text()

    # 3. `key_value` trains keys and values, and what lies between the codes and them.
    changed = weights(run("changed", model={"start": str(first), "trained": "key_value"}))
    moved = {name for name, value in before.items() if not torch.equal(value, changed[name])}
    reads_conditions = re.compile(r"\.(to|add)_[kv](_proj)?\.")
    assert any(reads_conditions.search(name) for name in moved)
    for name in moved:
        assert reads_conditions.search(name) or name.startswith(run.family.also_trained), name

    # 4. Distilled: two steps of one run each by default, only the denoiser is another.
    folder = run("student", model={"teacher": str(first), **FEW_STEPS})
    student = run.load(folder)
    assert (student.defaults.num_inference_steps, student.defaults.guidance_scale) == (2, 1)
    calls = []
    hook = student.denoiser.register_forward_pre_hook(
        lambda module, args, options: calls.append(len(args[0])), with_kwargs=True
    )
    student(embeds, seeds=range(3), height=16, width=16)
    hook.remove()
    assert calls == [3, 3]
    for name, part in teacher.parts.items():
        is_same = equal(part.state_dict(), student.parts[name].state_dict())
        assert is_same == (name != "denoiser"), name

    # 5. A student starts from an earlier one, not from the teacher.
    model = {"teacher": str(first), **FEW_STEPS, "start": str(folder)}
    assert equal(weights(run("again", model=model, optim=STILL)), weights(folder))


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["seed_x-2"])
def test_samples_and_average_do_not_change_the_losses(run):
    # Looking at a run must not change it.
    steps = {"max_steps": 3, "save_steps": 1}
    run("plain", trainer=steps)
    averaged = run(
        "averaged",
        trainer={**steps, "ema": 0.999, "sample_steps": 3, "report_to": ["tensorboard"]},
        data={"held_out": HELD_OUT},
        optim={"learning_rate": 3e-3},
    )
    assert run.losses("plain") == run.losses("averaged")
    assert list((run.folder / "averaged").rglob("events*"))

    # Samples show the averaged weights, which are those of the result: a run that starts from it
    # and does not learn draws the same.
    run(
        "still",
        trainer={**steps, "sample_steps": 3},
        data={"held_out": HELD_OUT},
        model={"start": str(averaged)},
        optim=STILL,
    )
    first, second = (run.folder / name / "samples" / "step-3.png" for name in ("averaged", "still"))
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.slow
def test_stage_2_of_seed_x_starts_from_the_adapter_of_stage_1(tmp_path):
    # With eight input channels it predicts the same; the resampler's sizes are the adapter's.
    one, two = Run("seed_x-1", tmp_path / "1"), Run("seed_x-2", tmp_path / "2")
    start = one("run")
    result = two("run", one.parts, model={"start": str(start), "trained": "all"}, optim=STILL)
    first, second = (one.load(folder) for folder in (start, result))
    embeds = one.family.inputs(first)[:1]
    options = {"seeds": [1], "num_inference_steps": 2, "guidance_scale": 1.0}
    drawn = second(embeds, condition_images=[Image.effect_noise((16, 16), 90)], **options)
    assert np.array_equal(np.asarray(first(embeds, **options)), np.asarray(drawn))


@pytest.mark.parametrize("variant, changes, error, named", TABLES["wrong"])
def test_train_with_a_wrong_setting(run, changes, error, named):
    with pytest.raises(getattr(errors, error), match=named):
        run("run", **changes, trainer={"sample_steps": 2})
    assert not (run.folder / "run" / "train.log.jsonl").exists(), "before the first step"


@pytest.mark.parametrize("name, settings", TABLES["schedulers"])
def test_student_of_as_many_steps_has_nothing_to_learn(tmp_path, name, settings):
    # Without guidance, its steps are the teacher's.
    import diffusers

    run = Run("seed", tmp_path)
    teacher = write_code_decoder(tmp_path / "teacher")
    getattr(diffusers, name)(**settings).save_pretrained(teacher / "scheduler")
    model = {**FEW_STEPS, "teacher": str(teacher), "teacher_steps": 2, "teacher_guidance": 1.0}
    run("run", model=model, optim=STILL)
    assert max(run.losses("run")) < 1e-9


@pytest.mark.slow
def test_a_registered_tokenizer_is_learned_as_its_recorded_codes(tmp_path, monkeypatch):
    # Images are resized as it expects, else its codes would be others.
    group = {"seed_multimodal.tokenizers": {"patches": "tiny.training:open_patches"}}
    install(tmp_path, "patches", group)
    monkeypatch.syspath_prepend(tmp_path)
    run = Run("seed-recorded", tmp_path)
    options = {"trainer": {"max_steps": 30, "save_steps": 0}, "data": {"encoder_size": 16}}
    run("recorded", **options)
    run("registered", model={"tokenizer": "patches", "recorded": None}, **options)
    losses = run.losses("recorded")
    assert losses == run.losses("registered")
    assert sum(losses[-8:]) < 0.9 * sum(losses[:8])


@pytest.mark.nightly
def test_student_of_stable_unclip_learns_guidance(tmp_path):
    # A teacher with two runs a step and a conditioner.
    run = Run("seed", tmp_path)
    write_unclip(tmp_path / "teacher")
    run(
        "run",
        model={**FEW_STEPS, "teacher": str(tmp_path / "teacher"), "teacher_guidance": 6.0},
        optim={"learning_rate": 1e-3},
        trainer={"max_steps": 40, "save_steps": 0},
    )
    losses = run.losses("run")
    assert sum(losses[-6:]) < 0.8 * sum(losses[:6])


@pytest.mark.parametrize("vae", ["kl", "kl16", "dc"])
def test_small_autoencoder_learns_a_large_one(tmp_path, vae):
    # It reads and writes the denoiser's latents, whatever the large one's scale and shift, and is
    # loaded in its place.
    parts = SEED.write_parts(tmp_path / "parts")
    steps = {"max_steps": 40, "save_steps": 0, "sample_steps": 40}
    config = SEED.config(parts, tmp_path / "run", vae=vae, trainer=steps)
    config["model"] = {"diffusion": str(parts / vae), "student": TINY_AUTOENCODER}
    large = Detokenizer.load_part(parts / vae, "vae")
    folder = Path(AutoencoderTask.train(config)["vae"]).parent
    values = list(run_losses(tmp_path / "run").values())
    assert sum(values[-6:]) < 0.7 * sum(values[:6])

    small = Detokenizer.load_part(folder, "vae")
    assert small.config.latent_channels == large.config.latent_channels
    latents = torch.rand(1, 4, 2, 2)
    assert spatial_factor(small) == spatial_factor(large)
    assert torch.equal(scaled_latents(small, latents), latents)
    assert list((tmp_path / "run" / "samples").glob("step-40.png"))


@pytest.mark.parametrize("program, family, groups, part", TABLES["published"])
def test_published_configurations_are_read(program, family, groups, part):
    configs = APPLICATION / "configs" / program
    read = FAMILIES[family].task_class.run_type.read
    settings = read(compose([*groups, "output_dir=x"], configs))
    assert part in vars(settings.model).values()
