"""The originals' Python objects, at tiny size."""

import importlib
import sys

import pytest
import torch
from repository import APPLICATION, ROOT

from seed_multimodal.errors import CheckpointError, ConfigError

# ---- import paths


def test_every_import_path_has_what_a_yaml_file_names(monkeypatch):
    # hydra imports a `_target_`; ours and hydra's objects are the same.
    from seed_multimodal.compat.targets import ALIASES
    from seed_multimodal.config import find_target

    for folder in (APPLICATION, ROOT):
        monkeypatch.syspath_prepend(str(folder))
    for name in ALIASES:
        if not name.startswith(("models.", "src.")):  # of other libraries
            assert callable(find_target(name)), name
            continue
        module, _, attribute = name.removesuffix(".from_pretrained").rpartition(".")
        target = getattr(importlib.import_module(module), attribute)
        if name.endswith(".from_pretrained"):
            target = target.from_pretrained
        assert target == find_target(name), name


def test_lavits_package_of_the_same_name_wins_in_its_folder(monkeypatch):
    # `models` at the root is a folder without `__init__.py`, so that it never hides LaVIT's.
    for name in [name for name in sys.modules if name == "models" or name.startswith("models.")]:
        monkeypatch.delitem(sys.modules, name)
    for folder in (ROOT / "src" / "lavit", ROOT):  # the root comes first
        monkeypatch.syspath_prepend(str(folder))
    assert importlib.import_module("models").build_model
    monkeypatch.delitem(sys.modules, "models")


def test_seed_1_has_its_class_and_names_missing_weights(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    kind = importlib.import_module("models.visual_tokenizer").SEEDVisualTokenizer
    with pytest.raises(CheckpointError, match="causal_qformer"):
        kind(folder=str(tmp_path))


# ---- SEED-X


def test_agent_with_wrong_arguments(released_seed_x, monkeypatch):
    from tiny.diffusion import FEATURES
    from tiny.seed_x import WORDS
    from transformers import LlamaTokenizer as Theirs

    from seed_multimodal.config import instantiate
    from seed_multimodal.language.llama_tokenizer import LlamaTokenizer

    monkeypatch.chdir(released_seed_x)
    tokenizer = instantiate("configs/tokenizer/clm_llama_tokenizer_224loc_anyres.yaml")
    llm = instantiate("configs/clm_models/llm_seed_x_i.yaml", torch_dtype=torch.float32)
    agent = instantiate("configs/clm_models/agent_seed_x_i.yaml", llm=llm).eval()
    assert isinstance(tokenizer, LlamaTokenizer)
    theirs = Theirs.from_pretrained(
        released_seed_x / "pretrained" / "cvlm_llama2_tokenizer_100img_and_224loc_addpatch"
    )
    image = {"image_embeds": torch.zeros(1, 16, FEATURES), "num_img_gen_tokens": WORDS}
    for arguments, named in (
        ({"tokenizer": theirs, "prompt": "a"}, "Tokenizer"),
        ({"tokenizer": tokenizer, "prompt": "a"}, "num_img_gen_tokens"),
        ({"tokenizer": tokenizer}, "input_ids"),
        ({"tokenizer": tokenizer, "prompt": "a", **image}, "patch_positions"),
    ):
        with pytest.raises(ConfigError, match=named):
            agent.generate(**arguments)


def test_lora_with_new_rows(released_seed_x):
    # New tokens are trained, and begin near the others.
    from peft import LoraConfig

    from seed_multimodal.compat.lora import seed_x_lora
    from seed_multimodal.compat.seed_x import LlamaForCausalLM

    llm = LlamaForCausalLM.from_pretrained(released_seed_x / "pretrained" / "seed_x" / "llm")
    old = llm.lm_head.weight.clone()
    with pytest.raises(ConfigError, match="peft_config"):
        seed_x_lora(llm)
    tuned = seed_x_lora(llm, LoraConfig(r=2, target_modules=["q_proj"]), vocab_size=len(old) + 3)
    rows = tuned.get_output_embeddings().weight
    assert len(rows) == len(old) + 3 and rows.requires_grad
    assert torch.allclose(rows[-1], 3 * old.mean(0), atol=1e-5)
    embeddings = tuned.get_input_embeddings().weight
    assert torch.allclose(embeddings[-1], embeddings[:-3].mean(0), atol=1e-5)


def test_lora_with_the_vocabulary_of_a_tokenizer(tiny_folder, tmp_path):
    # As `src.model.peft_model` of MultiModalLLM: a new LoRA, then the trained one on the same base.
    from peft import LoraConfig
    from safetensors.torch import load_file

    from seed_multimodal import SeedLlamaTokenizer
    from seed_multimodal.compat.lora import seed_llama_lora
    from seed_multimodal.compat.seed_x import LlamaForCausalLM

    tokenizer = SeedLlamaTokenizer.from_pretrained(tiny_folder / "seed_tokenizer", device="cpu")
    text_only = LlamaForCausalLM.from_pretrained(tiny_folder / "seed_llama")
    text_only.resize_token_embeddings(tokenizer.vocab_size, mean_resizing=False)
    text_only.save_pretrained(tmp_path / "base")
    options = {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}
    tuned = seed_llama_lora(text_only, LoraConfig(**options), tokenizer=tokenizer)
    assert len(tuned.get_input_embeddings().weight) == len(tokenizer)
    tuned.save_pretrained(tmp_path / "checkpoint-10")
    # The originals' adapters are torch files.
    weights = tmp_path / "checkpoint-10" / "adapter_model.safetensors"
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    again = seed_llama_lora(base, model_id=str(tmp_path / "checkpoint-10"), tokenizer=tokenizer)
    ids = torch.tensor([tokenizer.encode("hello<img>")])
    assert torch.allclose(again(input_ids=ids).logits, tuned(input_ids=ids).logits, atol=1e-5)
    assert not any(parameter.requires_grad for parameter in again.parameters())
