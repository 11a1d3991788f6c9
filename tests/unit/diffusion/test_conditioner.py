"""Conditioners: registered by packages, found in a U-Net's folder."""

import shutil
from pathlib import Path

import pytest
import torch
from installed_package import install
from tiny import read_json, write_json
from tiny.diffusion import CROSS, EMBEDDING, write_unclip

from seed_multimodal import UnclipDetokenizer
from seed_multimodal.diffusion.conditioner import load_conditioner
from seed_multimodal.errors import CheckpointError

MODULE = """
from dataclasses import dataclass

import torch
from seed_multimodal.nn.pretrained import PretrainedNetwork


@dataclass(frozen=True)
class FlatConfig:
    width: int
    value: float = 0.5


class Flat(PretrainedNetwork[FlatConfig]):
    '''Starts sampling from one value, and repeats another.'''

    config_class = FlatConfig
    model_type = "flat"

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.token = torch.nn.Parameter(torch.ones(config.width))

    def warm_latents(self, embeds, generators, scheduler, condition=None, size=None):
        return torch.full((len(embeds), 4, *size), self.config.value)

    def tokens(self, embeds):
        return self.token.expand(len(embeds), 3, -1)
"""


@pytest.fixture(scope="module")
def unclip(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("unclip")
    write_unclip(folder)
    return folder


def test_a_conditioner_of_another_package_starts_and_conditions(unclip, tmp_path, monkeypatch):
    # 1. An installed package, and a folder that it wrote in place of the layout decoder's.
    (tmp_path / "flat_package.py").write_text(MODULE)
    install(tmp_path, "flat", {"seed_multimodal.conditioners": {"flat": "flat_package:Flat"}})
    monkeypatch.syspath_prepend(tmp_path)
    import flat_package  # type: ignore[import-not-found]

    folder = tmp_path / "unclip"
    shutil.copytree(unclip, folder, ignore=shutil.ignore_patterns("layout"))
    config = flat_package.FlatConfig(CROSS, value=0.25)
    flat_package.Flat(config).save_pretrained(folder / "conditioner")

    # 2. Its latents and tokens reach the U-Net; the unconditional half has none, else guidance
    #    would go away from the layout of the image.
    model = UnclipDetokenizer.from_pretrained(folder)
    inputs = []
    model.unet.register_forward_pre_hook(
        lambda module, args, named: inputs.append((args[0], named["encoder_hidden_states"])),
        with_kwargs=True,
    )
    model(torch.randn(1, EMBEDDING), seeds=[1], guidance_scale=3.0)
    latents, tokens = inputs[0]
    assert bool((latents == 0.25).all())
    assert torch.equal(tokens, torch.tensor([0.0, 1.0])[:, None, None].expand(2, 3, CROSS))


def test_load_conditioner_of_an_unknown_type(unclip, tmp_path):
    shutil.copytree(unclip / "layout", tmp_path / "conditioner")
    file = tmp_path / "conditioner" / "config.json"
    write_json(file, {**read_json(file), "model_type": "layuot"})
    with pytest.raises(CheckpointError, match=r"config\.json.*layuot"):
        load_conditioner(tmp_path)
    assert load_conditioner(unclip / "unet") is None
