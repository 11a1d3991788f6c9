"""YAML configurations: the originals' files build our objects, and no other object can be built."""

import re

import pytest
from PIL import Image
from repository import ROOT
from yaml_tables import read_tables

from seed_multimodal.config import instantiate, load_yaml
from seed_multimodal.errors import ConfigError

CONFIGS = ROOT / "configs"
TRANSFORM = CONFIGS / "transform" / "clip_transform.yaml"


def test_configurations_have_the_original_keys():
    local = load_yaml(CONFIGS / "llm" / "seed_llama_14b.yaml")
    assert local.pretrained_model_name_or_path == str(ROOT / "pretrained/seed_llama_14b_sft")
    assert local.torch_dtype == "fp16"
    assert load_yaml(CONFIGS / "llm" / "seed_llama_8b_8bit.yaml").load_in_8bit is True
    hub = load_yaml(CONFIGS / "tokenizer" / "seed_llama_tokenizer_hf.yaml")
    assert hub.diffusion_path == "stabilityai/stable-diffusion-2-1-unclip"
    assert hub.encoder_url.endswith("seed_quantizer.pt")


@pytest.mark.parametrize("overrides, side", [({}, 224), ({"image_size": 64}, 64)])
def test_instantiate_builds_the_original_transform(overrides, side):
    transform = instantiate(TRANSFORM, **overrides)
    assert transform(Image.new("RGB", (300, 100), (255, 0, 0))).shape == (3, side, side)


@pytest.mark.parametrize("row", read_tables(__file__), ids=str)
def test_instantiate_refuses(row):
    # A YAML file from elsewhere must not run code.
    with pytest.raises(ConfigError, match=re.escape(row["named"])):
        instantiate(row["config"])


DAMAGED = {
    "open": "a: [1",
    "list": "- 1\n- 2",
    "interpolation": "a: ${nowhere}",
    "tab": "\t- :",
    "circle": "a: &a [*a]",
    "deep": f"a: {'[' * 1200}{']' * 1200}",
    "long number": f"a: {'9' * 5000}",
    "absent": None,
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_load_yaml_names_a_damaged_file(content, tmp_path):
    # One line, not a traceback of the YAML library.
    file = tmp_path / "damaged.yaml"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ConfigError, match=r"damaged\.yaml") as caught:
        load_yaml(file)
    assert "\n" not in str(caught.value)
