"""Components of nano's stages: presets, normalised latents, cached tensors."""

import os

import pytest
import torch
from torch.testing import assert_close

from seed_nano.train.pipeline import Application, render
from seed_nano.train.stages import PIPELINES
from seed_nano.train.task import scene_pixels, to_signed
from seed_nano.train.vae import VaeTask, normalise_latents
from seed_nano.train.workspace import PRESETS, Workspace, load_settings
from seed_nano.world.splits import scene_at


@pytest.mark.parametrize("file", sorted(PRESETS.glob("*/*.yaml")), ids=str)
def test_load_settings_reads_every_preset(file):
    # A preset with an unknown key would end a run after hours.
    keys = {"nano": "train_vae", "nano_x": "train_sft", "nano_lavit": "train_llm"}
    keys |= {"study": "train_sft", "study_grid": "train_sft", "study_lavit": "train_llm"}
    key = keys.get(file.parent.name, "train_images")
    settings = load_settings(file.parent.name, file.stem, [f"{key}.steps=7"])
    assert getattr(settings, key).max_steps == 7 and settings.image_size == 64


@pytest.mark.parametrize("system", ["nano", "nano_lavit", "study", "study_lavit"])
def test_every_training_gets_its_configuration(system, tmp_path):
    # Settings of one name are of different kinds: LaVIT's `records` is a number.
    kind, stages = PIPELINES[system]
    space = kind(load_settings(system, "test"), tmp_path, tmp_path)
    trainings = [row for row in stages if isinstance(row.run, Application) and row.run.section]
    assert trainings
    for stage in trainings:
        assert render(space, stage.name, stage.run.section).is_file()


@torch.no_grad()
def test_normalise_latents_keeps_the_round_trip(tmp_path):
    # The decoder undoes what the encoder is scaled by.
    vae = VaeTask(Workspace(load_settings("nano", "test"), tmp_path, tmp_path)).vae.eval()
    images = to_signed(scene_pixels([scene_at(0, n) for n in range(16)], 64))
    before = vae.decode(vae.encode(images).latent_dist.mean).sample
    normalise_latents(vae, images)
    means = vae.encode(images).latent_dist.mean
    assert_close(vae.decode(means).sample, before, atol=1e-4, rtol=1e-4)
    assert_close(means.mean((0, 2, 3)), torch.zeros(4), atol=1e-3, rtol=0)
    assert_close(means.std((0, 2, 3)), torch.ones(4), atol=1e-2, rtol=0)


def test_cached_recomputes_if_settings_file_or_stage_changed(tmp_path):
    # An old cache would train on another tokenizer's codes.
    calls = 0

    def value(**changes):
        def compute():
            nonlocal calls
            calls += 1
            return torch.tensor([calls])

        settings = load_settings(
            "nano", "test", [f"{key}={setting}" for key, setting in changes.items()]
        )
        return int(Workspace(settings, tmp_path, tmp_path).cached("codes", "tokenizer", compute))

    file = tmp_path / "codes.safetensors"
    record = tmp_path / "tokenizer.done.json"
    record.write_text("{}")
    assert [value(), value(), value(pool=64), value(pool=64), value(seed=3)] == [1, 1, 2, 2, 3]
    file.write_bytes(file.read_bytes()[:-4])
    assert value(seed=3) == 4
    later = file.stat().st_mtime_ns + 10**9
    os.utime(record, ns=(later, later))
    assert value(seed=3) == 5
