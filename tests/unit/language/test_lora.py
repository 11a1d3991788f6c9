"""`merge_adapter`: equal to peft, for every layout of base and adapter; no output after an
error."""

from __future__ import annotations

import copy
import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from seed_multimodal.errors import CheckpointError, ConfigError
from seed_multimodal.language.llm import load_llm
from seed_multimodal.language.lora import merge_adapter, merge_into, read_trained
from seed_multimodal.language.tokenizer import MultimodalTokenizer

LORA: dict[str, Any] = {
    "r": 4,
    "lora_alpha": 8,
    "lora_dropout": 0.0,
    "task_type": "CAUSAL_LM",
    "modules_to_save": [
        "embed_tokens",
        "lm_head",
        "input_layernorm",
        "post_attention_layernorm",
        "norm",
    ],
    "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}


def make_base(folder: Path, vocab_size: int, width: int = 32, **config: Any) -> Path:
    torch.manual_seed(width)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=width,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
            initializer_range=0.3,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=-1,
            use_cache=False,
            **config,
        )
    ).save_pretrained(folder)
    return folder


def make_adapter(base: Path, vocab_size: int, folder: Path, **lora: Any) -> Any:
    """Write an adapter with random changes of every number; returns the model."""
    llama = LlamaForCausalLM.from_pretrained(base)
    if llama.config.vocab_size != vocab_size:
        llama.resize_token_embeddings(vocab_size, mean_resizing=False)
    model = get_peft_model(
        llama, LoraConfig(**copy.deepcopy({**LORA, **lora}))
    )  # peft changes its arguments
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.empty_like(parameter).normal_(0, 0.1, generator=generator))
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {
            name: value.clone()
            for name, value in get_peft_model_state_dict(model, save_embedding_layers=False).items()
        },
        folder / "adapter_model.safetensors",
    )
    values = {**LORA, **lora, "peft_type": "LORA", "base_model_name_or_path": str(base)}
    (folder / "adapter_config.json").write_text(json.dumps(values))
    return model.eval()


@pytest.fixture(scope="module")
def vocab_size(tokenizer: MultimodalTokenizer) -> int:
    return tokenizer.vocabulary.size


@pytest.fixture(scope="module")
def trained(vocab_size: int, tmp_path_factory) -> SimpleNamespace:
    """A base without image tokens, an adapter with them, and peft's logits and merged weights."""
    folder = tmp_path_factory.mktemp("trained")
    base = make_base(folder / "base", 330)
    adapter = folder / "adapter"
    model = make_adapter(base, vocab_size, adapter)
    with torch.no_grad():
        expected = model(input_ids=sample_ids(vocab_size)).logits
        return SimpleNamespace(
            base=base,
            adapter=adapter,
            logits=expected,
            merged=copy.deepcopy(model).merge_and_unload().state_dict(),
            model=model,
        )


def sample_ids(vocab_size: int) -> torch.Tensor:
    return torch.randint(3, vocab_size, (2, 12), generator=torch.Generator().manual_seed(0))


def check_logits(folder: Path, expected: torch.Tensor, load: Callable[..., Any] = load_llm) -> None:
    with torch.no_grad():
        torch.testing.assert_close(
            load(folder)(input_ids=sample_ids(expected.shape[-1])).logits,
            expected,
            atol=1e-4,
            rtol=1e-4,
        )


def test_merge_adapter_equals_peft(
    trained: SimpleNamespace, tokenizer: MultimodalTokenizer, vocab_size: int, tmp_path
):
    out = tmp_path / "merged"
    summary = merge_adapter(
        trained.base, trained.adapter, out, tokenizer=tokenizer, max_shard_size="40KB"
    )
    assert (
        f": {len(trained.merged)} tensors, 14 with LoRA merged in, 7 replaced by trained ones"
        in summary
    )
    assert (out / "model.safetensors.index.json").is_file()
    state = {
        name: value for file in out.glob("*.safetensors") for name, value in load_file(file).items()
    }
    assert state.keys() == trained.merged.keys()
    for name, value in state.items():
        torch.testing.assert_close(value, trained.merged[name], atol=1e-6, rtol=1e-6, msg=name)
    check_logits(out, trained.logits)
    check_logits(out, trained.logits, AutoModelForCausalLM.from_pretrained)
    config = json.loads((out / "config.json").read_text())
    assert [
        config[k]
        for k in ("bos_token_id", "eos_token_id", "pad_token_id", "vocab_size", "use_cache")
    ] == [1, 2, 0, vocab_size, True]
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == 2
    assert MultimodalTokenizer.from_pretrained(out).vocabulary.size == vocab_size
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


def test_merge_adapter_of_bin_files_in_bf16(trained: SimpleNamespace, tmp_path):
    adapter = tmp_path / "adapter"  # as peft 0.4 wrote it
    adapter.mkdir()
    torch.save(
        load_file(trained.adapter / "adapter_model.safetensors"), adapter / "adapter_model.bin"
    )
    shutil.copy(trained.adapter / "adapter_config.json", adapter)
    merge_adapter(trained.base, adapter, tmp_path / "out", dtype="bf16")
    assert {
        value.dtype for value in load_file(tmp_path / "out" / "model.safetensors").values()
    } == {torch.bfloat16}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("config", "lora"),
    [
        ({"tie_word_embeddings": True}, {"ensure_weight_tying": True}),
        ({"tie_word_embeddings": True}, {}),
        ({"attention_bias": True}, {"bias": "all"}),
        ({"attention_bias": True}, {"bias": "lora_only"}),
    ],
)
def test_merge_adapter_of_other_configurations(vocab_size: int, config, lora, tmp_path):
    base = make_base(tmp_path / "base", vocab_size, **config)
    model = make_adapter(base, vocab_size, tmp_path / "adapter", **lora)
    merge_adapter(base, tmp_path / "adapter", tmp_path / "out")
    with torch.no_grad():
        check_logits(tmp_path / "out", model(input_ids=sample_ids(vocab_size)).logits)
    together = "ensure_weight_tying" in lora  # separately trained matrices stay separate
    assert ("lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")) == together


def test_merge_adapter_of_zero_to_fp32_and_whole_models(trained: SimpleNamespace, tmp_path):
    zero = tmp_path / "zero"
    complete = tmp_path / "whole"
    out = tmp_path / "out"
    zero.mkdir()
    torch.save(
        {
            f"module.llm.{name}": p.detach().clone()
            for name, p in trained.model.named_parameters()
            if p.requires_grad
        },
        zero / "pytorch_model.bin",
    )
    with pytest.raises(CheckpointError, match="no r and lora_alpha"):
        merge_adapter(trained.base, zero, out)
    merge_adapter(trained.base, zero, out, lora=LORA)
    check_logits(out, trained.logits)
    saved = load_file(out / "model.safetensors")
    merge_adapter(None, out, tmp_path / "again", dtype="bf16")  # a whole model
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert all(torch.equal(saved[name].bfloat16(), again[name]) for name in saved)
    complete.mkdir()
    save_file(
        {f"module.llm.{name}": value for name, value in saved.items()},
        complete / "model.safetensors",
    )
    merge_adapter(trained.base, complete, tmp_path / "full")
    full = load_file(tmp_path / "full" / "model.safetensors")
    assert all(torch.equal(saved[name], full[name]) for name in saved)


def test_merge_adapter_holds_one_file_in_memory(tmp_path):
    """A model of 600 MB, in files of 100 MB."""
    # 1. Matrices of 67 MB, one of which has a LoRA.
    config = LlamaConfig(
        vocab_size=330,
        hidden_size=512,
        intermediate_size=32768,
        num_hidden_layers=3,
        num_attention_heads=4,
    )
    with torch.device("meta"):
        shapes = LlamaForCausalLM(config).state_dict()
    base = tmp_path / "base"
    config.save_pretrained(base)
    weights = {name: torch.ones(v.shape, dtype=torch.bfloat16) for name, v in shapes.items()}
    save_file(weights, base / "model.safetensors")
    del weights
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    name = "base_model.model.model.layers.1.mlp.up_proj.lora_{}.weight"
    lora = {name.format("A"): torch.ones(4, 512), name.format("B"): torch.ones(32768, 4)}
    save_file(lora, adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text(json.dumps({**LORA, "peft_type": "LORA"}))

    # 2. The peak, in a thread of its own.
    def anonymous_bytes() -> int:
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.partition("RssAnon:")[2].split()[0])

    sizes = [anonymous_bytes()]
    done = threading.Event()

    def sample() -> None:
        while not done.wait(0.005):
            sizes.append(anonymous_bytes())

    sampler = threading.Thread(target=sample)
    sampler.start()
    merge_adapter(base, adapter, tmp_path / "out", max_shard_size="100MB")
    done.set()
    sampler.join()
    assert max(sizes) - sizes[0] < 300e6

    # 3. The merged matrix: 1 + 8 / 4 · 4 products of ones.
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    merged = "model.layers.1.mlp.up_proj.weight"
    tensors = load_file(tmp_path / "out" / index["weight_map"][merged])
    assert tensors[merged].dtype == torch.float32 and tensors[merged].eq(9).all()
    assert index["weight_map"].keys() == shapes.keys()


def test_merge_into_changes_a_loaded_model(trained: SimpleNamespace, vocab_size: int):
    llama = load_llm(trained.base)
    llama.resize_token_embeddings(vocab_size, mean_resizing=False)
    names = list(llama.state_dict())
    merge_into(llama, read_trained(trained.adapter))
    assert list(llama.state_dict()) == names
    check_logits(Path(), trained.logits, lambda _: llama)


A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: {k: v for k, v in s.items() if k != A},
            r"not a complete adapter .*q_proj\.lora_A",
        ),
        (lambda s: {**s, A: torch.zeros(3, 32)}, "not an adapter of this model .*size mismatch"),
        (
            lambda s: {
                **s,
                "base_model.model.model.layers.9.mlp.up_proj.weight": torch.zeros(2, 2),
            },
            "in the base it is",
        ),
        (
            lambda s: {k: v for k, v in s.items() if "lm_head" not in k},
            "has 330 words, but the token",
        ),
        (
            lambda s: {k: v for k, v in s.items() if "_head" not in k and "embed" not in k},
            "has 330 words, but the token",
        ),
    ],
)
def test_merge_adapter_of_other_tensors_writes_nothing(
    trained: SimpleNamespace,
    tokenizer: MultimodalTokenizer,
    change,
    message,
    tmp_path,
):
    adapter = shutil.copytree(trained.adapter, tmp_path / "adapter")
    save_file(
        change(load_file(adapter / "adapter_model.safetensors")),
        adapter / "adapter_model.safetensors",
    )
    with pytest.raises(CheckpointError, match=message):
        merge_adapter(trained.base, adapter, tmp_path / "out", tokenizer=tokenizer)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_merge_adapter_with_a_wrong_base_or_place(
    trained: SimpleNamespace, vocab_size: int, tmp_path
):
    wide = make_base(tmp_path / "wide", vocab_size, width=64)
    with pytest.raises(CheckpointError, match=r"but in the base it is \(\d+, 64\)"):
        merge_adapter(wide, trained.adapter, tmp_path / "out")
    with pytest.raises(ConfigError, match="A base model is needed"):
        merge_adapter(None, trained.adapter, tmp_path / "out")
    run = shutil.copytree(trained.adapter, tmp_path / "run")
    with pytest.raises(ConfigError, match="run: holds .*, which is used here"):
        merge_adapter(trained.base, run, run, force=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "wide"]
