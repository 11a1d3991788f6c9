"""`load_llm`: equal weights and special ids from every form of a folder, and errors that name what
does not fit (damaged files: `models/test_weight_faults.py`, `test_torch_files.py`)."""

import shutil
from pathlib import Path

import pytest
import torch
import transformers
from repository import NANO
from safetensors.torch import load_file, save_file
from tensors import equal
from tiny import read_json, write_json
from tiny.language import random_llm
from torch import Tensor
from yaml_tables import read_tables

from seed_multimodal import MultimodalTokenizer
from seed_multimodal.errors import CheckpointError, SeedWarning
from seed_multimodal.inference.engines import torch_engine
from seed_multimodal.inference.prompt import GenerationSettings, Prompt
from seed_multimodal.language.llm import check_vocab_size, load_llm
from seed_multimodal.language.vocabulary import ImageVocabulary

LLM = NANO / "seed_llama"


@pytest.fixture(scope="module")
def llm_folder(tokenizer, tmp_path_factory) -> Path:
    """A random LLaMA for the tokenizer, with the legacy special ids of the 8B."""
    folder = tmp_path_factory.mktemp("llm")
    ids = {"bos_token_id": 0, "eos_token_id": 1}
    llm = random_llm("llama", tokenizer.vocabulary.size, use_cache=False, **ids)
    llm.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(llm_folder, tmp_path) -> Path:
    """A copy of the model's folder."""
    return shutil.copytree(llm_folder, tmp_path / "llm")


def check_weights(llm, state: dict[str, Tensor]):
    assert llm.state_dict().keys() == state.keys()
    assert equal(state, llm.state_dict())


def test_load_llm_sets_special_ids_and_keeps_weights(llm_folder, tokenizer):
    # The legacy conversion wrote other ids: answers would not end.
    assert read_json(llm_folder / "config.json")["eos_token_id"] == 1
    llm = load_llm(llm_folder, tokenizer=tokenizer)
    for config in (llm.config, llm.generation_config):
        ids = (config.bos_token_id, config.eos_token_id, config.pad_token_id)
        assert ids == (1, 2, 0) and config.use_cache
    assert llm.model.embed_tokens.padding_idx == 0
    assert not llm.training and llm.dtype == torch.float32
    check_weights(llm, load_file(llm_folder / "model.safetensors"))
    assert load_llm(llm_folder, dtype=torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("architecture", ["qwen3", "phi3", "gemma2"])
def test_load_llm_of_other_architectures(architecture, tmp_path):
    """Their special ids are those of the folder."""
    saved = random_llm(architecture, 380, eos_token_id=[5, 6], bos_token_id=None)
    saved.save_pretrained(tmp_path)
    llm = load_llm(tmp_path)
    assert type(llm) is type(saved)
    assert llm.config.bos_token_id is None
    assert llm.generation_config.eos_token_id == [5, 6]
    check_weights(llm, saved.state_dict())


def test_load_llm_of_torch_shards(folder):
    """With buffers that older versions of transformers saved."""
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = list(state)
    weight_map = {}
    for index, part in ((1, names[:9]), (2, names[9:])):
        file = f"pytorch_model-0000{index}-of-00002.bin"
        tensors = {name: state[name] for name in part}
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
        torch.save(tensors, folder / file)
        weight_map |= dict.fromkeys(part, file)
    write_json(folder / "pytorch_model.bin.index.json", {"metadata": {}, "weight_map": weight_map})
    llm = load_llm(folder, dtype=torch.float16)
    check_weights(llm, {name: value.half() for name, value in state.items()})
    (folder / file).unlink()
    with pytest.raises(CheckpointError, match=file):
        load_llm(folder)


def test_check_vocab_size():
    """Rows behind the vocabulary are padding, but not as many as the codes of another tokenizer."""
    vocabulary = ImageVocabulary(330, 24, 5)
    check_vocab_size(356, vocabulary, "model")
    check_vocab_size(356 + 2400, vocabulary, "model")
    for n_rows in (355, 330 + 8194):
        with pytest.raises(CheckpointError, match=f"{n_rows}.*356"):
            check_vocab_size(n_rows, vocabulary, "model")


@pytest.mark.parametrize("case", read_tables(__file__), ids=str)
def test_load_llm_of_another_configuration(folder, case):
    # Each would load, and answer nonsense.
    values = read_json(folder / "config.json")
    write_json(folder / "config.json", {**values, **case["config"]})
    with pytest.raises(CheckpointError, match=case["named"]):
        load_llm(folder)


@pytest.mark.parametrize("name", ["LlavaConfig", "Gemma3Config", "Mistral3Config"])
def test_load_llm_of_a_multimodal_model(tmp_path, name):
    # Its text part has other names in the file: not "download its files again".
    getattr(transformers, name)().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="no decoder-only language model of text"):
        load_llm(tmp_path)


@pytest.mark.parametrize(
    "name, value, outcome",
    [
        ("model.norm.weight", None, CheckpointError),
        # Of a deeper model: its answers would be nonsense.
        ("model.layers.2.input_layernorm.weight", torch.ones(32), CheckpointError),
        ("other.w", torch.ones(2), SeedWarning),
    ],
)
def test_load_llm_names_missing_and_unknown_tensors(folder, name, value, outcome):
    file = folder / "model.safetensors"
    state = load_file(file)
    state.pop(name, None)
    if value is not None:
        state[name] = value
    save_file(state, file, metadata={"format": "pt"})
    is_error = outcome is CheckpointError
    with pytest.raises(outcome, match=name) if is_error else pytest.warns(outcome, match=name):
        load_llm(folder)


def test_load_llm_names_tied_tensors_that_differ(tmp_path):
    # A server or a merge that takes one of them answers otherwise than the model was trained.
    random_llm("llama", 380, tie_word_embeddings=True).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    state = load_file(file)
    head = state["model.embed_tokens.weight"] + 1
    save_file({**state, "lm_head.weight": head}, file, metadata={"format": "pt"})
    with pytest.warns(SeedWarning, match=r"lm_head\.weight"):
        llm = load_llm(tmp_path)
    assert torch.equal(llm.lm_head.weight, head) and not llm.config.tie_word_embeddings


@pytest.fixture(scope="module")
def nano_scores() -> Tensor:
    return scores_of(load_llm(LLM))


def scores_of(llm) -> Tensor:
    with torch.no_grad():
        return llm(torch.arange(300, 320)[None]).logits.log_softmax(-1)


@pytest.mark.slow
@pytest.mark.parametrize(
    "quantization, largest", [("8bit", 0.01), ("4bit", 0.3), ("int8", 0.01), ("int4", 0.5)]
)
def test_load_llm_quantised_on_a_cpu(nano_scores, quantization, largest):
    # The largest divergence from the scores of unquantised weights.
    pytest.importorskip("bitsandbytes" if quantization.endswith("bit") else "torchao")
    packed = load_llm(LLM, quantization=quantization)
    weight = packed.model.layers[0].mlp.up_proj.weight
    is_plain = type(weight) is torch.nn.Parameter
    assert weight.dtype in (torch.int8, torch.uint8) or not is_plain
    divergence = torch.nn.functional.kl_div(
        scores_of(packed), nano_scores, log_target=True, reduction="none"
    )
    assert 0 < divergence.sum(-1).mean() < largest
    # The engine looks at the weights at each request, which few operations of packed ones can do.
    engine = torch_engine(packed, MultimodalTokenizer.from_pretrained(NANO / "seed_tokenizer"))
    assert engine.generate([Prompt([1, 300])], GenerationSettings(max_new_tokens=2)) != [[]]
