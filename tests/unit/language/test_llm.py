"""`load_llm`: special ids, old shards, quantisation, and errors of missing, damaged, unsafe and
other files."""

from __future__ import annotations

import json
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from repository import ROOT
from safetensors.torch import load_file, save_file
from tiny.language import random_llm

from seed_multimodal.errors import CheckpointError, ConfigError, SeedWarning
from seed_multimodal.language.llm import check_vocab_size, load_llm
from seed_multimodal.language.tokenizer import MultimodalTokenizer
from seed_multimodal.language.vocabulary import ImageVocabulary

NANO = ROOT / "pretrained" / "nano" / "seed_llama"


@pytest.fixture
def changed(llm_folder: Path, tmp_path) -> Callable[..., Path]:
    """`changed(config, tensors)`: a copy of the model's folder with another configuration or
    other tensors."""

    def change(config: dict | None = None, tensors: Callable[[dict], dict] | None = None) -> Path:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        shutil.copytree(llm_folder, folder)
        if config is not None:
            values = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps({**values, **config}))
        if tensors is not None:
            state = tensors(load_file(folder / "model.safetensors"))
            save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return change


def test_load_llm_sets_special_ids_and_keeps_weights(
    llm_folder: Path, tokenizer: MultimodalTokenizer
):
    assert (
        json.loads((llm_folder / "config.json").read_text())["eos_token_id"] == 1
    )  # the legacy conversion
    model = load_llm(llm_folder, tokenizer=tokenizer)
    for config in (model.config, model.generation_config):
        assert (
            config.bos_token_id,
            config.eos_token_id,
            config.pad_token_id,
            config.use_cache,
        ) == (1, 2, 0, True)
    assert (
        model.model.embed_tokens.padding_idx == 0
        and not model.training
        and model.dtype == torch.float32
    )
    state = load_file(llm_folder / "model.safetensors")
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert load_llm(llm_folder, dtype=torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("architecture", ["qwen3", "smollm3", "mistral", "phi3", "gemma2"])
def test_load_llm_of_other_architectures(architecture, tmp_path):
    """Their special ids are those of the folder."""
    saved = random_llm(architecture, 380, eos_token_id=[5, 6], bos_token_id=None)
    saved.save_pretrained(tmp_path)
    model = load_llm(tmp_path)
    assert type(model) is type(saved)
    assert model.config.bos_token_id is None
    assert model.generation_config.eos_token_id == [5, 6]
    for name, value in saved.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)


def test_check_vocab_size():
    """Rows behind the vocabulary are padding, but not as many as the codes of another tokenizer."""
    vocabulary = ImageVocabulary(330, 24, 5)
    check_vocab_size(356, vocabulary, "model")
    check_vocab_size(356 + 2400, vocabulary, "model")
    for n_rows in (355, 330 + 8194):
        with pytest.raises(CheckpointError, match=f"model: .* {n_rows} words, .* has 356"):
            check_vocab_size(n_rows, vocabulary, "model")


def test_load_llm_of_bin_shards(changed: Callable[..., Path]):
    folder = changed()
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = list(state)
    shards = {
        "pytorch_model-00001-of-00002.bin": names[:9],
        "pytorch_model-00002-of-00002.bin": names[9:],
    }
    for file, part in shards.items():
        torch.save(
            {
                **{name: state[name] for name in part},
                "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
            },
            folder / file,
        )
    (folder / "pytorch_model.bin.index.json").write_text(
        json.dumps(
            {
                "metadata": {},
                "weight_map": {name: file for file, part in shards.items() for name in part},
            }
        )
    )
    model = load_llm(folder, dtype=torch.float16)
    assert all(torch.equal(state[name].half(), value) for name, value in model.state_dict().items())
    (folder / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_llm(folder)


def test_load_llm_of_a_missing_model(tmp_path):
    for folder, name in (
        (tmp_path / "pretrained" / "seed_llama_8b_sft", "seed-llama-8b-sft"),
        ("pretrained/seed_llama_14b_sft", "seed-llama-14b-sft"),
    ):
        with pytest.raises(CheckpointError, match=rf"downloads AILab-CVC/{name} into "):
            load_llm(folder)
    with pytest.raises(
        CheckpointError, match=r"contains no config\.json; give the folder of a language model"
    ):
        load_llm(tmp_path)
    with pytest.raises(CheckpointError, match="AILab-CVC/no-such-model") as caught:
        load_llm("AILab-CVC/no-such-model")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "gpt2"}, "missing from the file: 'transformer"),
        ({"model_type": "no-such-model"}, "model_type 'no-such-model' is no model"),
        ({"vocab_size": 40194}, r"2 tensors are of another size: .*\(40194, 32\)"),
        (
            {"intermediate_size": 48},
            r"6 tensors are of another size: .*down_proj.* model \(32, 48\)",
        ),
        # Layers that carry a state through packed sequences, or see chunks.
        ({"model_type": "qwen3_5_text"}, "layers of linear_attention; only full and sliding"),
        ({"model_type": "lfm2", "layer_types": ["conv", "full_attention"]}, "layers of conv"),
        ({"model_type": "llama4_text"}, "layers of chunked_attention"),
    ],
)
def test_load_llm_of_another_configuration(changed: Callable[..., Path], config, message):
    with pytest.raises(CheckpointError, match=message):
        load_llm(changed(config))


def test_load_llm_of_missing_and_unknown_tensors(changed: Callable[..., Path]):
    with pytest.raises(
        CheckpointError, match=r"1 tensors are missing from the file: 'model\.norm\.weight'"
    ):
        load_llm(
            changed(
                tensors=lambda state: {
                    key: state[key] for key in state if key != "model.norm.weight"
                }
            )
        )
    with pytest.warns(SeedWarning, match=r"1 tensor unknown to the model: 'other\.w'"):
        load_llm(changed(tensors=lambda state: {**state, "other.w": torch.ones(2)}))
    deeper = {"model.layers.2.input_layernorm.weight": torch.ones(32)}
    with pytest.raises(
        CheckpointError, match=r"unknown to the model of config\.json: 'model\.layers\.2"
    ):
        load_llm(changed(tensors=lambda state: state | deeper))


class Evil:
    def __reduce__(self) -> tuple:
        return (Path.touch, (Path("pickle_was_run"),))


def test_load_llm_of_torn_and_unsafe_files(changed: Callable[..., Path], monkeypatch, tmp_path):
    folder = changed()
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="weights cannot be read"):
        load_llm(folder)
    file.unlink()
    monkeypatch.chdir(tmp_path)
    (folder / "pytorch_model.bin").write_bytes(
        pickle.dumps({"model.norm.weight": Evil()}, protocol=2)
    )
    with pytest.raises(CheckpointError, match="unsafe pickle"):
        load_llm(folder)
    assert not Path("pickle_was_run").exists()


@pytest.fixture(scope="module")
def nano_llm() -> Any:
    return load_llm(NANO)


@pytest.mark.parametrize(
    ("quantization", "kl"), [("8bit", 0.01), ("4bit", 0.2), ("int8", 0.01), ("int4", 0.5)]
)
def test_load_llm_quantised_on_a_cpu(nano_llm, quantization, kl):
    pytest.importorskip("bitsandbytes" if quantization.endswith("bit") else "torchao")
    ids = torch.arange(300, 320)[None]
    packed = load_llm(NANO, quantization=quantization)
    layer = packed.model.layers[0].mlp.up_proj
    assert (
        layer.weight.dtype in (torch.int8, torch.uint8)
        or type(layer.weight) is not torch.nn.Parameter
    )
    with torch.no_grad():
        expected = nano_llm(ids).logits
        logits = packed(ids).logits
    distance = (
        torch.nn.functional.kl_div(
            logits.log_softmax(-1), expected.log_softmax(-1), log_target=True, reduction="none"
        )
        .sum(-1)
        .mean()
    )
    assert 0 < distance < kl


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_load_llm_quantised_on_a_cpu_holds_no_freed_weights():
    pytest.importorskip("bitsandbytes")
    load_llm(NANO, quantization="4bit")

    def anonymous_bytes() -> int:
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.partition("RssAnon:")[2].split()[0])

    # Without the setting, glibc's limit for blocks that it returns rises to 28 MB here.
    torch.ones(7_000_000)
    before = anonymous_bytes()
    freed = []
    held = []
    for _ in range(20):
        freed.append(torch.ones(1_000_000))
        held.append(torch.ones(1_000_000))
    freed.clear()
    n_bytes = sum(tensor.nbytes for tensor in held)
    assert anonymous_bytes() - before < 1.6 * n_bytes  # without the setting: 2


def test_load_llm_of_another_quantisation(llm_folder: Path):
    with pytest.raises(ConfigError, match="Unknown quantisation"):
        load_llm(llm_folder, quantization="3bit")
