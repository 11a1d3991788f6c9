"""Wrong weights of every network are refused, and the file or tensor is named."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny import read_json, write_json
from yaml_tables import read_tables

from seed_multimodal.errors import CheckpointError
from seed_multimodal.state_dicts import load_state_dict, save_state_dict

NETWORKS = read_tables(__file__)


@pytest.fixture(scope="module")
def networks(tmp_path_factory) -> dict[str, tuple[Callable[[Path], object], ...]]:
    """What writes the folder of each network, and what reads it."""
    from tiny import lavit, seed, seed_x, vision
    from tiny.diffusion import random_adapter, write_sdxl
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    from seed_multimodal.models.lavit.checkpoints import load_dynamic_tokenizer
    from seed_multimodal.models.lavit.decoder import CodeDecoder
    from seed_multimodal.models.seed.checkpoints import load_blip2, load_vision
    from seed_multimodal.models.seed.configuration import Seed2Config
    from seed_multimodal.models.seed.modeling import Seed1Tokenizer, Seed2Tokenizer
    from seed_multimodal.models.seed_x.adapter import SDXLAdapter
    from seed_multimodal.models.seed_x.modeling import load_agent
    from seed_multimodal.nn.vision.clip import load_clip_vision
    from seed_multimodal.nn.vision.eva import EvaVit
    from seed_multimodal.nn.vision.qwen import QwenVit
    from seed_multimodal.recipes.seed.losses import Stage1Model, Stage1TrainingOptions

    def write(name, network) -> Callable[[Path], object]:
        return lambda folder: torch.save(network.state_dict(), folder / NETWORKS[name])

    seed1 = seed.seed1_tokenizer()
    config = Seed2Config(**seed.SIZES, decode_heads=12, image_features_dim=10)
    eva = EvaVit(config.vit)
    stage1 = Stage1Model(config, vocab_size=30, options=Stage1TrainingOptions(embed_dim=8))
    clip = CLIPVisionConfig(**vision.SIZES, image_size=16, patch_size=8)
    agent = seed_x.random_agent(SimpleNamespace(config=SimpleNamespace(hidden_size=32)))
    sdxl = write_sdxl(tmp_path_factory.mktemp("sdxl"), complete=False)
    decoder = CodeDecoder(lavit.DECODER)
    return {
        "seed1": (
            lambda folder: seed.write_released_seed1(seed1, folder),
            lambda folder: Seed1Tokenizer.from_pretrained(folder, config=seed1.config),
        ),
        "seed2": (Seed2Tokenizer(config).save_pretrained, Seed2Tokenizer.from_pretrained),
        "eva": (write("eva", eva), lambda folder: load_vision(eva, folder, None)),
        "blip2": (
            write("blip2", stage1),
            lambda folder: load_blip2(stage1, folder / NETWORKS["blip2"], None),
        ),
        "clip": (
            CLIPVisionModelWithProjection(clip).save_pretrained,
            lambda folder: load_clip_vision(folder, log=None),
        ),
        "qwen": (
            write("qwen", QwenVit(seed_x.TOWER)),
            lambda folder: QwenVit.from_pretrained(folder, config=seed_x.TOWER),
        ),
        "agent": (write("agent", agent), lambda folder: load_agent(agent, folder)),
        "sdxl_adapter": (
            random_adapter().save_pretrained,
            lambda folder: SDXLAdapter.from_pretrained(folder, sdxl),
        ),
        "lavit_tokenizer": (
            lavit.small_tokenizer().save_pretrained,
            load_dynamic_tokenizer,
        ),
        "lavit_decoder": (
            write("lavit_decoder", decoder),
            lambda folder: CodeDecoder.from_pretrained(folder, config=decoder.config),
        ),
    }


@pytest.mark.parametrize("fault", ["missing", "misshapen", "integer", "torn", "unsafe", "absent"])
@pytest.mark.parametrize("name", NETWORKS)
def test_wrong_weights_are_named(name, fault, networks, tmp_path):
    # 1. A folder that is read without complaint.
    write, load = networks[name]
    file = tmp_path / NETWORKS[name]
    write(tmp_path)
    load(tmp_path)

    # 2. A fault of the file, or of a tensor in the middle of it.
    named = f"{file.name}|{tmp_path.name}"
    if fault == "torn":
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    elif fault == "absent":
        file.unlink()
    elif fault == "unsafe":
        torch.save({"code": Path("a")}, file)
    else:
        state = load_state_dict(file)
        matrices = [key for key, value in state.items() if value.ndim > 1 and "text" not in key]
        named = matrices[len(matrices) // 2]
        changed = {} if fault == "missing" else {named: torch.zeros(99, 98)}
        if fault == "integer":  # of a quantized model, without its scales
            changed = {named: state[named].to(torch.int8)}
        state = {key: value.clone() for key, value in state.items() if key != named} | changed
        (save_state_dict if file.suffix == ".safetensors" else torch.save)(state, file)
    with pytest.raises(CheckpointError, match=named):
        load(tmp_path)


def test_blocks_that_config_json_lacks_are_named(networks, tmp_path):
    # A half of a network of transformers would answer nonsense (of diffusers: `test_networks.py`).
    write, load = networks["clip"]
    write(tmp_path)
    config = read_json(tmp_path / "config.json")
    write_json(tmp_path / "config.json", {**config, "num_hidden_layers": 1})
    with pytest.raises(CheckpointError, match=r"config\.json.*layers\.1\."):
        load(tmp_path)
