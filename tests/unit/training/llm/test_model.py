"""Building the language model: new tokens, precision, LoRA, tied embeddings, quantised bases, YAML
files.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from llm_losses import packed_loss
from omegaconf import OmegaConf
from repository import ROOT
from tensors import equal
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM

from seed_multimodal.config import load_yaml
from seed_multimodal.errors import CheckpointError, ConfigError
from seed_multimodal.language.llm import LLAMA_IDS
from seed_multimodal.language.vocabulary import ImageVocabulary
from seed_multimodal.training.llm.config import LlmModelSettings, read_model_settings
from seed_multimodal.training.llm.lora import (
    MODULES_TO_SAVE,
    TARGET_MODULES,
    adapter_state,
    copy_weights,
    load_adapter,
)
from seed_multimodal.training.llm.loss import find_llama
from seed_multimodal.training.llm.model import (
    attention_kind,
    build_llm,
    load_trained,
    save_trained,
    trained_state,
)

CONFIGS = ROOT / "MultiModalLLM" / "configs" / "model"
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
TEXT = 60
CODES = 8
TOKENIZER = SimpleNamespace(vocabulary=ImageVocabulary(TEXT, CODES, 4), special_ids=LLAMA_IDS)
VOCAB_SIZE = TOKENIZER.vocabulary.size


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Path]:
    """Base models: with text tokens only, with all tokens, with all tokens and tied embeddings."""
    folder = tmp_path_factory.mktemp("bases")
    torch.manual_seed(0)
    for name, vocab_size, tied in (
        ("text", TEXT, False),
        ("all", VOCAB_SIZE, False),
        ("tied", VOCAB_SIZE, True),
    ):
        LlamaForCausalLM(
            LlamaConfig(
                **SIZES,
                vocab_size=vocab_size,
                tie_word_embeddings=tied,
                bos_token_id=0,
                eos_token_id=1,
            )
        ).save_pretrained(folder / name)
    return {name: folder / name for name in ("text", "all", "tied")}


def build(path: Path | None, adapter: Path | None = None, **settings: Any) -> Any:
    values = {
        "path": None if path is None else str(path),
        "adapter": None if adapter is None else str(adapter),
    }
    return build_llm(LlmModelSettings(**{"dtype": "fp32", **values, **settings}), TOKENIZER, "cpu")


def test_attention_kind_of_packed_and_padded_rows():
    """Flex attention would be compiled per length of padded rows.

    SDPA's fast kernels cannot mask packed ones.
    """
    cuda = torch.device("cuda")
    cpu = torch.device("cpu")
    assert attention_kind("auto", cuda, packed=True) in ("flash_attention_2", "flex_attention")
    assert attention_kind("auto", cuda, packed=False) == "sdpa"
    assert (
        attention_kind("auto", cpu, packed=True)
        == attention_kind("auto", cpu, packed=False)
        == "sdpa"
    )
    assert {
        attention_kind(name, cuda, packed)
        for name in ("flash", "eager")
        for packed in (True, False)
    } == {"flash_attention_2", "eager"}
    assert attention_kind("auto", cuda, packed=True, half=False) == "flex_attention"
    with pytest.raises(
        ConfigError, match="flash: needs trainer.precision bf16 or fp16"
    ):  # its kernel has no fp32
        build(None, sizes=SIZES, attention="flash")
    llama = find_llama(build(None, sizes=SIZES, lora={"r": 2}, attention="eager"))
    assert (
        llama.attentions == {True: "eager", False: "eager"}
        and llama.config._attn_implementation == "eager"
    )


def attention_by_lengths(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """Attention of a packed row as in a flash kernel: from the sequences' boundaries."""
    boundaries = kwargs["cu_seq_lens_q"]
    longest = kwargs["max_length_q"]
    assert kwargs["cu_seq_lens_k"] is boundaries and boundaries.dtype == torch.int32
    parts = []
    for start, end in itertools.pairwise(boundaries.tolist()):
        assert end - start <= longest
        q, k, v = (part[:, :, start:end] for part in (query, key, value))
        parts.append(F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling))
    return torch.cat(parts, 2).transpose(1, 2), None


@pytest.mark.parametrize("lora", [None, {"r": 2, "lora_dropout": 0.0}])
def test_flash_attention_gets_the_sequence_lengths_of_packed_rows(lora):
    """Computed once; otherwise transformers derives them from the position ids in every layer."""
    AttentionInterface.register("flash_by_lengths", attention_by_lengths)
    model = build(None, sizes=SIZES, lora=lora, gradient_checkpointing=True)
    packed_rows = batch(2, 20)
    packed_rows.position_ids = torch.cat([torch.arange(7), torch.arange(13)]).expand(2, -1)
    expected = packed_loss(model, packed_rows).sum
    llama = find_llama(model)
    llama.config._attn_implementation = llama.attentions[True] = "flash_by_lengths"
    loss = packed_loss(model, packed_rows).sum
    torch.testing.assert_close(loss, expected, atol=1e-4, rtol=1e-5)
    loss.backward()


def batch(rows: int = 2, length: int = 20) -> SimpleNamespace:
    ids = torch.randint(3, VOCAB_SIZE, (rows, length), generator=torch.Generator().manual_seed(4))
    return SimpleNamespace(input_ids=ids, labels=ids, position_ids=None, attention_mask=None)


def step(model: Any, lr: float = 0.1) -> None:
    packed_loss(model, batch()).mean.backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr).step()
    model.zero_grad()


LORA: dict[str, Any] = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0}


def test_build_llm_initialises_new_tokens_by_the_seed(bases: dict[str, Path]):
    old = LlamaForCausalLM.from_pretrained(bases["text"])
    model = build(bases["text"])
    same = build(bases["text"])
    other = build(bases["text"], seed=1)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weight = model.state_dict()[name]
        assert weight.shape == (VOCAB_SIZE, 32) and torch.equal(
            weight[:TEXT], old.state_dict()[name]
        )
        assert torch.equal(weight, same.state_dict()[name]) and not torch.equal(
            weight, other.state_dict()[name]
        )
        assert 0.015 < weight[TEXT:].std() < 0.025 and abs(weight[TEXT:].mean()) < 0.005
    assert not torch.equal(model.lm_head.weight[TEXT:], model.model.embed_tokens.weight[TEXT:])
    assert (model.config.bos_token_id, model.config.eos_token_id, model.config.pad_token_id) == (
        1,
        2,
        0,
    )
    assert model.config.vocab_size == VOCAB_SIZE and model.training


def test_build_llm_for_zero_3_keeps_weights_as_in_their_files(bases: dict[str, Path], tmp_path):
    """Mapped memory, without a copy in fp32; the engine casts and shards them."""
    LlamaForCausalLM.from_pretrained(bases["all"], dtype=torch.float16).save_pretrained(tmp_path)
    model = build_llm(
        LlmModelSettings(path=str(tmp_path), dtype="bf16"), TOKENIZER, "cpu", "bf16", sharded=True
    )
    assert {(p.dtype, p.requires_grad) for p in model.parameters()} == {(torch.float16, True)}
    adapted = build_llm(
        LlmModelSettings(path=str(tmp_path), dtype="bf16", lora=LORA),
        TOKENIZER,
        "cpu",
        "bf16",
        sharded=True,
    )
    assert {(p.dtype, p.requires_grad) for p in adapted.parameters()} == {
        (torch.float16, False),
        (torch.float32, True),
    }


def test_build_llm_initialises_new_tokens_by_the_mean(bases: dict[str, Path]):
    """As SEED-X's original: the mean of the old rows, in the head 3 times it.

    With one matrix for both its mean.
    """
    model = build(bases["text"], embedding_init="mean")
    for weight, factor in ((model.model.embed_tokens.weight, 1.0), (model.lm_head.weight, 3.0)):
        expected = factor * weight[:TEXT].mean(0)
        assert len(weight) == VOCAB_SIZE
        torch.testing.assert_close(weight[TEXT:], expected.expand(VOCAB_SIZE - TEXT, -1))


def test_freeze_embeddings_trains_all_other_weights(bases: dict[str, Path], tmp_path):
    model = build(bases["all"], freeze_embeddings=True)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    step(model)
    equal = [name for name, value in model.named_parameters() if torch.equal(value, before[name])]
    assert equal == ["model.embed_tokens.weight"]
    again = build(save_trained(model, tmp_path))  # a complete folder
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)
    assert torch.equal(again.model.embed_tokens.weight, before["model.embed_tokens.weight"])
    with pytest.raises(ConfigError, match="freeze_embeddings is for full training"):
        build(bases["all"], lora=LORA, freeze_embeddings=True)
    with pytest.raises(ConfigError, match="freeze_embeddings leaves their rows untrained"):
        build(bases["text"], freeze_embeddings=True)


def test_build_llm_from_sizes_depends_on_the_seed_only():
    torch.manual_seed(5)
    model = build(None, sizes=SIZES)
    torch.manual_seed(6)
    before = torch.random.get_rng_state()
    same = build(None, sizes=SIZES)
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), same.parameters(), strict=True)
    )
    assert all(p.requires_grad and p.dtype == torch.float32 for p in model.parameters())
    with pytest.raises(ConfigError, match="did you mean 'hidden_size'"):
        build(None, sizes={**SIZES, "hiddensize": 1})
    with pytest.raises(CheckpointError, match="sizes: the language model has layers of linear"):
        build(None, sizes={**SIZES, "model_type": "qwen3_5_text"})


def test_build_llm_with_the_originals_lora(bases: dict[str, Path]):
    model = build(bases["text"], dtype="bf16", lora={"r": 4, "lora_dropout": 0.0})
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    for name, parameter in model.named_parameters():
        learned = ".lora_" in name or ".modules_to_save." in name
        assert parameter.requires_grad == learned, name
        # Peft leaves modules_to_save in the base's bf16, where small updates are lost.
        assert parameter.dtype == (torch.float32 if learned else torch.bfloat16), name
    layers = SIZES["num_hidden_layers"]
    assert len(trained) == layers * (2 * len(TARGET_MODULES) + 2) + 3
    config = model.peft_config["default"]
    assert list(config.modules_to_save) == list(MODULES_TO_SAVE) and config.lora_alpha == 32
    assert not any(p.grad is not None for p in model.parameters())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.autocast("cpu", torch.bfloat16):
        step(model)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed <= trained and any("lm_head" in name for name in changed)


def test_lora_with_tied_embeddings_trains_one_matrix(bases: dict[str, Path], tmp_path):
    from peft import PeftModel

    model = build(bases["tied"], lora=LORA)
    llama = find_llama(model)
    assert (
        llama.lm_head.weight is llama.model.embed_tokens.weight
        and llama.lm_head.weight.requires_grad
    )
    before = llama.lm_head.weight.detach().clone()
    step(model)
    assert llama.lm_head.weight is llama.model.embed_tokens.weight and not torch.equal(
        before, llama.lm_head.weight
    )
    state = trained_state(model)
    assert [name for name in state if "embed_tokens" in name or "lm_head" in name] == [
        "base_model.model.model.embed_tokens.weight"
    ]
    folder = save_trained(model, tmp_path / "adapter")
    assert json.loads((folder / "adapter_config.json").read_text())["modules_to_save"] == list(
        MODULES_TO_SAVE
    )
    again = build(bases["tied"], lora=LORA, adapter=folder)
    stock = PeftModel.from_pretrained(
        LlamaForCausalLM.from_pretrained(bases["tied"]), folder
    ).eval()
    with torch.no_grad():
        expected = model.eval()(input_ids=batch().input_ids).logits
        for other in (again.eval(), stock):
            torch.testing.assert_close(other(input_ids=batch().input_ids).logits, expected)


def without(folder: Path, key: str) -> Path:
    """The adapter without a key of its configuration."""
    file = folder / "adapter_config.json"
    file.write_text(
        json.dumps(
            {name: value for name, value in json.loads(file.read_text()).items() if name != key}
        )
    )
    return folder


def test_load_adapter(bases: dict[str, Path], tmp_path):
    model = build(bases["all"], lora=LORA)
    step(model)
    folder = save_trained(model, tmp_path / "one")
    again = build(bases["all"], lora=LORA, adapter=folder)
    assert equal(trained_state(model), adapter_state(again))
    assert sum(p.requires_grad for p in again.parameters()) == sum(
        p.requires_grad for p in model.parameters()
    )
    named = build(bases["all"], adapter=folder)  # with the LoRA settings of its file
    assert (
        trained_state(named).keys() == trained_state(model).keys()
        and named.peft_config["default"].lora_alpha == 8
    )
    old = tmp_path / "old"  # in the format of peft 0.4
    old.mkdir()
    torch.save(dict(trained_state(model)), old / "adapter_model.bin")
    load_adapter(build(bases["all"], lora=LORA), old)
    with pytest.raises(CheckpointError, match="lora_alpha is 8, but the model is set up with 4"):
        build(bases["all"], lora={**LORA, "lora_alpha": 4}, adapter=folder)
    with pytest.raises(
        CheckpointError, match="use_rslora is None, but the model is set up with True"
    ):
        load_adapter(
            build(bases["all"], lora={**LORA, "use_rslora": True}), without(folder, "use_rslora")
        )
    state = dict(trained_state(model))
    name = next(iter(state))
    with pytest.raises(CheckpointError, match="1 tensors are missing"):
        copy_weights(state, {key: value for key, value in state.items() if key != name}, "x")
    with pytest.raises(CheckpointError, match="unknown to the model: 'x'"):
        copy_weights(state, {**state, "x": state[name]}, "x")
    with pytest.raises(CheckpointError, match="but the model needs"):
        copy_weights(state, {**state, name: torch.zeros(3, 3)}, "x")
    with pytest.raises(CheckpointError, match="contains no adapter"):
        load_adapter(model, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "fields",
    [
        {"modules_to_save": None},
        {"modules_to_save": [], "layers_to_transform": [1, 3]},
        {"use_dora": True},
        {"rank_pattern": {"q_proj": 1}, "alpha_pattern": {"q_proj": 3}},
        {"target_modules": ["q_proj", "up_proj"]},
    ],
)
def test_build_llm_from_the_settings_of_an_adapter(bases: dict[str, Path], tmp_path, fields):
    model = build(bases["tied"], lora={**LORA, **fields})
    step(model)
    again = build(bases["tied"], adapter=save_trained(model, tmp_path))
    expected = trained_state(model)
    loaded = trained_state(again)
    assert expected.keys() == loaded.keys()
    assert equal(expected, loaded)
    with torch.no_grad():
        assert torch.equal(
            packed_loss(model.eval(), batch()).sum, packed_loss(again.eval(), batch()).sum
        )


def test_save_trained_of_full_fine_tuning_is_a_plain_model(bases: dict[str, Path], tmp_path):
    model = build(bases["tied"])
    step(model)
    folder = save_trained(model, tmp_path / "whole")
    stock = LlamaForCausalLM.from_pretrained(folder)
    assert equal(trained_state(model), stock.state_dict())
    again = build(bases["tied"], adapter=folder)
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)
    other = build(bases["tied"])
    load_trained(other, folder)
    assert torch.equal(other.lm_head.weight, model.lm_head.weight)


def test_gradient_checkpointing_changes_no_gradient(bases: dict[str, Path]):
    gradients = []
    passes = []
    for checkpointing in (False, True):
        model = build(bases["all"], lora=LORA, gradient_checkpointing=checkpointing)
        calls: list[int] = []
        for layer in find_llama(model).model.layers:
            layer.mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        packed_loss(model, batch()).mean.backward()
        gradients.append(
            {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        )
        passes.append(len(calls))
    assert passes[1] == passes[0] + 4 and gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
def test_lora_on_a_quantised_base(bases: dict[str, Path], tmp_path, quantization):
    model = build(bases["all"], quantization=quantization, lora=LORA)
    packed = find_llama(model).model.layers[0].mlp.up_proj.base_layer.weight
    assert packed.dtype in (torch.uint8, torch.int8)
    packed_loss(model, batch()).mean.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert all(g is not None for g in grads.values())
    assert all(float(g.abs().max()) > 0 for name, g in grads.items() if "lora_B" in name)
    with pytest.raises(ConfigError, match="base cannot be trained"):
        build(bases["all"], quantization=quantization)
    # An adapter has LoRA settings; fully trained weights have none.
    again = build(bases["all"], quantization=quantization, adapter=save_trained(model, tmp_path))
    assert trained_state(again).keys() == trained_state(model).keys()
    with pytest.raises(ConfigError, match="base cannot be trained"):
        build(bases["all"], quantization=quantization, adapter=bases["all"])


def test_build_llm_with_another_vocabulary_fails(bases: dict[str, Path]):
    other = SimpleNamespace(vocabulary=ImageVocabulary(80, CODES, 4), special_ids=LLAMA_IDS)
    with pytest.raises(
        ConfigError, match="The model has 70 tokens, but the tokenizer has 80 text tokens"
    ):
        build_llm(LlmModelSettings(path=str(bases["all"]), dtype="fp32"), other, "cpu")
    with pytest.raises(ConfigError, match="gets new tokens, but embed_tokens is not trained"):
        build(bases["text"], lora={**LORA, "modules_to_save": ["norm"]})
    with pytest.raises(ConfigError, match="lora: .*mismatched target modules"):
        build(bases["all"], lora={"target_modules": ["qproj"]})
    with pytest.raises(ConfigError, match="did you mean 'lora_alpha'"):
        build(bases["all"], lora={"lora_alfa": 1})


def plain(file: Path) -> dict:
    return OmegaConf.to_container(load_yaml(file), resolve=True)


def test_read_model_settings_of_original_files():
    settings = read_model_settings(plain(CONFIGS / "vicuna_7b_lora.yaml"))
    assert (
        settings.path == "pretrained/vicuna-7b-v1.1" and settings.dtype is None
    )  # that of the run
    assert settings.lora is not None and settings.lora["modules_to_save"] == list(MODULES_TO_SAVE)
    assert (settings.lora["r"], settings.lora["lora_alpha"], settings.lora["lora_dropout"]) == (
        16,
        32,
        0.05,
    )
    merged = read_model_settings(plain(CONFIGS / "vicuna_7b_lora_from_merged_pretrain.yaml"))
    assert (
        merged.path == "log/seed_vicuna-7b_lora_pretrain/checkpoint-merged-10000"
        and merged.lora == settings.lora
    )
    assert read_model_settings(plain(CONFIGS / "llama2_13b_lora.yaml")).lora == settings.lora
    trained = read_model_settings(
        {**plain(CONFIGS / "vicuna_7b_lora_pretrained.yaml"), "model_id": "log/x"}
    )
    assert trained.adapter == "log/x" and trained.lora is None
    for name in ("nano_scratch", "nano_lora"):
        assert read_model_settings(plain(CONFIGS / f"{name}.yaml")).dtype == "fp32"
    settings = read_model_settings(
        {
            "_target_": "transformers.LlamaForCausalLM.from_pretrained",
            "load_in_8bit": False,
            "pretrained_model_name_or_path": "x",
            "torch_dtype": "fp16",
            "seed": 3,
        }
    )
    assert (settings.path, settings.dtype, settings.lora, settings.seed) == ("x", "fp16", None, 3)


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"path": "x", "atention": "eager"}, "did you mean 'attention'"),
        ({"path": "x", "attention": "flesh"}, "did you mean 'flash'"),
        ({}, "set either path"),
        ({"_target_": "os.system", "path": "x"}, "'os.system' is not allowed"),
        (
            {
                "_target_": "transformers.LlamaForCausalLM.from_pretrained",
                "pretrained_model_name_or_path": "???",
            },
            "pretrained_model_name_or_path is required",
        ),
    ],
)
def test_read_model_settings_with_a_mistake(config, sentence):
    with pytest.raises(ConfigError, match=sentence):
        read_model_settings(config)
