"""Building the language model: new tokens, precision, LoRA, tied embeddings, quantised bases, YAML
files.
"""

import itertools
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from llm_losses import packed_loss, rows
from llm_runs import SIZES
from tensors import equal
from tiny.language import random_llm
from torch.testing import assert_close
from yaml_tables import read_tables

from seed_multimodal.errors import CheckpointError, ConfigError
from seed_multimodal.language.llm import LLAMA_IDS
from seed_multimodal.language.lora import load_llm_or_adapter
from seed_multimodal.language.vocabulary import ImageVocabulary
from seed_multimodal.state_dicts import load_state_dict, save_state_dict
from seed_multimodal.training.llm.config import LlmModelSettings
from seed_multimodal.training.llm.lora import load_adapter
from seed_multimodal.training.llm.loss import SEGMENTS, find_llama
from seed_multimodal.training.llm.model import (
    attention_kind,
    build_llm,
    load_llm_weights,
    published_weights,
    save_llm_weights,
)

TABLES = read_tables(__file__)
TEXT = 60
CODES = 8
TOKENIZER = SimpleNamespace(vocabulary=ImageVocabulary(TEXT, CODES, 4), special_ids=LLAMA_IDS)
VOCAB_SIZE = TOKENIZER.vocabulary.size


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Path]:
    """Base models: with text tokens only, with all tokens, with all tokens and tied embeddings."""
    folder = tmp_path_factory.mktemp("bases")
    ids = {"bos_token_id": 0, "eos_token_id": 1}
    for name, vocab_size, tied in (
        ("text", TEXT, False),
        ("all", VOCAB_SIZE, False),
        ("tied", VOCAB_SIZE, True),
    ):
        fields = {**SIZES, **ids, "tie_word_embeddings": tied, "initializer_range": 0.02}
        random_llm("llama", vocab_size, **fields).save_pretrained(folder / name)
    return {name: folder / name for name in ("text", "all", "tied")}


def build(path: Path | None, adapter: Path | None = None, **settings):
    values = {
        "path": None if path is None else str(path),
        "adapter": None if adapter is None else str(adapter),
    }
    return build_llm(LlmModelSettings(**{"dtype": "fp32", **values, **settings}), TOKENIZER, "cpu")


def test_attention_kind_of_packed_and_padded_rows():
    # Flex attention would be compiled per length of padded rows; SDPA's fast kernels cannot mask
    # packed ones; flash has no fp32.
    cuda = torch.device("cuda")
    assert attention_kind("auto", cuda, packed=True) in ("flash_attention_2", "flex_attention")
    assert attention_kind("auto", cuda, packed=True, half=False) == "flex_attention"
    assert attention_kind("auto", cuda, packed=False) == "sdpa"
    assert attention_kind("auto", torch.device("cpu"), packed=True) == "sdpa"


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


def test_flash_attention_gets_the_sequence_lengths_of_packed_rows():
    from transformers import AttentionInterface

    # Computed once; otherwise transformers derives them from the position ids in every layer.
    AttentionInterface.register("flash_by_lengths", attention_by_lengths)
    model = build(None, sizes=SIZES, lora=LORA, gradient_checkpointing=True)
    packed_rows = two_sequences()
    expected = packed_loss(model, packed_rows).sum
    llama = find_llama(model)
    llama.config._attn_implementation = llama.attentions[True] = "flash_by_lengths"
    loss = packed_loss(model, packed_rows).sum
    assert_close(loss, expected, atol=1e-4, rtol=1e-5)
    loss.backward()


def two_sequences() -> SimpleNamespace:
    """Two rows of a sequence of 7 tokens and one of 13."""
    packed_rows = batch(2, 20)
    packed_rows.position_ids = torch.cat([torch.arange(7), torch.arange(13)]).expand(2, -1)
    return packed_rows


@pytest.mark.parametrize("checkpointing", [False, True])
def test_segment_attention_computes_what_a_mask_does(checkpointing):
    # On a CPU packed rows are attended sequence by sequence, which is faster than with a mask.
    model = build(None, sizes=SIZES, lora=LORA, gradient_checkpointing=checkpointing)
    llama = find_llama(model)
    ids = torch.arange(3, 13)[None]
    mask = (torch.arange(10) > 2).long()[None]
    results = {}
    for attention in ("sdpa", SEGMENTS):
        llama.attentions[True] = attention
        model.zero_grad()
        loss = packed_loss(model, two_sequences()).sum
        assert llama.config._attn_implementation == attention
        loss.backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        # The attention stays set: other calls of the model are masked as ever.
        with torch.no_grad():
            padded_logits = model(input_ids=ids, attention_mask=mask).logits[:, 3:]
            causal_logits = model(input_ids=ids).logits
        results[attention] = [loss, *gradients, padded_logits, causal_logits]
    assert_close(results[SEGMENTS], results["sdpa"], atol=1e-5, rtol=1e-4)


def test_segment_attention_is_for_llama_on_a_cpu_without_compiler():
    assert find_llama(build(None, sizes=SIZES)).attentions == {True: SEGMENTS, False: "sdpa"}
    compiled = build(None, sizes=SIZES, compile=True)
    assert find_llama(compiled).attentions == {True: "sdpa", False: "sdpa"}


def batch(count=2, length=20) -> SimpleNamespace:
    ids = torch.randint(3, VOCAB_SIZE, (count, length), generator=torch.Generator().manual_seed(4))
    return rows(ids)


def step(model, lr: float = 0.1):
    packed_loss(model, batch()).mean.backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr).step()
    model.zero_grad()


LORA = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0}


def test_build_llm_for_zero_3_keeps_weights_as_in_their_files(bases, tmp_path):
    from transformers import LlamaForCausalLM

    # Mapped memory, without a copy in fp32 that a node could not hold; the engine shards them.
    LlamaForCausalLM.from_pretrained(bases["all"], dtype=torch.float16).save_pretrained(tmp_path)
    settings = LlmModelSettings(path=str(tmp_path), dtype="bf16")
    model = build_llm(settings, TOKENIZER, "cpu", "bf16", sharded=True)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float16}


def test_build_llm_initialises_new_tokens_by_the_seed(bases):
    # All processes of a run must have the same rows, whatever they drew before.
    old = load_state_dict(bases["text"] / "model.safetensors")
    torch.manual_seed(5)
    model = build(bases["text"])
    torch.manual_seed(6)
    same = build(bases["text"])
    other = build(bases["text"], seed=1)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weight = model.state_dict()[name]
        assert weight.shape == (VOCAB_SIZE, 32)
        assert torch.equal(weight[:TEXT], old[name])
        assert torch.equal(weight, same.state_dict()[name])
        assert not torch.equal(weight, other.state_dict()[name])
        assert 0.015 < weight[TEXT:].std() < 0.025
    assert (model.config.bos_token_id, model.config.eos_token_id) == (1, 2)


@pytest.mark.slow
@pytest.mark.parametrize("case", TABLES["kinds"].values(), ids=TABLES["kinds"])
def test_trained_saved_and_loaded(case, bases, tmp_path):
    from peft import PeftModel
    from transformers import LlamaForCausalLM

    # What a user trains for weeks is what is saved, and what others load.
    base, settings = case["base"], case["settings"]
    model = build(bases[base], **settings)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    step(model)

    # 1. Only what is trained changes, in fp32: small updates would be lost in the base's bf16.
    trained = {name for name, value in model.named_parameters() if value.requires_grad}
    changed = {
        name for name, value in model.named_parameters() if not torch.equal(value, before[name])
    }
    assert changed and changed <= trained
    assert all(any(part in name for part in case["changing"]) for name in trained)
    assert {model.get_parameter(name).dtype for name in trained} == {torch.float32}
    llama = find_llama(model)
    is_one_matrix = llama.lm_head.weight is llama.model.embed_tokens.weight
    assert is_one_matrix == (base == "tied")

    # 2. What is saved builds the same model again; an adapter has the settings of LoRA.
    folder = save_llm_weights(model, tmp_path)
    more = {} if "lora" in settings else settings
    quantization = {"quantization": settings.get("quantization")}
    again = build(bases[base], adapter=folder, **{**more, **quantization})
    expected = published_weights(model)
    assert published_weights(again).keys() == expected.keys()
    assert equal(expected, published_weights(again))
    with torch.no_grad():
        loss = packed_loss(model, batch()).sum
        assert_close(packed_loss(again, batch()).sum, loss)

    # 3. The files are those of transformers and peft.
    if "quantization" not in settings and base != "text":
        stock = LlamaForCausalLM.from_pretrained(bases[base] if "lora" in settings else folder)
        if "lora" in settings:
            stock = PeftModel.from_pretrained(stock, folder)
        with torch.no_grad():
            logits = stock.eval()(input_ids=batch().input_ids).logits
            assert_close(logits, model.eval()(input_ids=batch().input_ids).logits)


TIED = ("qwen2", "qwen3", "smollm3")
LORA_FIELDS = [
    *itertools.product(("llama", "qwen2"), TABLES["trained"], [True]),
    *itertools.product(("llama", "qwen2"), TABLES["refused"], [False]),
    *((name, {}, True) for name in ("qwen3", "smollm3", "mistral", "phi3")),
]


@pytest.mark.parametrize("architecture, fields, is_trained", LORA_FIELDS)
def test_lora_fields_are_merged_as_trained_or_refused(architecture, fields, is_trained, tmp_path):
    # A field that training follows and merging does not would serve another model.
    base = tmp_path / "base"
    sizes = {**SIZES, "initializer_range": 0.02, "tie_word_embeddings": architecture in TIED}
    random_llm(architecture, VOCAB_SIZE, **sizes).save_pretrained(base)
    lora = {"r": 4, "lora_dropout": 0.0, **fields}
    options = {"train_embeddings": lora.pop("train_embeddings", False), "lora": lora}
    if not is_trained:
        with pytest.raises(ConfigError, match=r"lora"):
            build(base, **options)
        return
    model = build(base, **options)
    for _ in range(2):
        step(model)
    folder = save_llm_weights(model, tmp_path / "saved")
    again = build(base, **options)
    load_llm_weights(again, folder)
    for loaded in (again.eval(), load_llm_or_adapter(folder)):
        ids = batch().input_ids
        with torch.no_grad():
            logits = loaded(input_ids=ids).logits
            assert_close(logits, model.eval()(input_ids=ids).logits)


def test_lora_on_a_base_in_half_precision(bases):
    # The originals' settings: peft would leave modules_to_save in the base's bf16.
    model = build(bases["text"], dtype="bf16", lora={"r": 4, "lora_dropout": 0.0})
    for name, parameter in model.named_parameters():
        dtype = torch.float32 if parameter.requires_grad else torch.bfloat16
        assert parameter.dtype == dtype, name


@pytest.mark.parametrize("damage", ["missing", "unknown"])
def test_load_adapter_of_another_model_names_the_tensor(damage, bases, tmp_path):
    # A tensor that is silently left out makes a model that answers, but badly.
    model = build(bases["all"], lora=LORA)
    folder = save_llm_weights(model, tmp_path)
    state = dict(published_weights(model))
    name = "x" if damage == "unknown" else next(iter(state))
    if damage == "missing":
        del state[name]
    else:
        state[name] = torch.zeros(3, 3)
    save_state_dict(state, folder / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=re.escape(name)):
        load_adapter(build(bases["all"], lora=LORA), folder)


def test_load_adapter_of_peft_0_4(bases, tmp_path):
    # The published checkpoints of SEED-LLaMA.
    model = build(bases["all"], lora=LORA)
    step(model)
    torch.save(dict(published_weights(model)), tmp_path / "adapter_model.bin")
    again = build(bases["all"], lora=LORA)
    load_adapter(again, tmp_path)
    assert equal(published_weights(model), published_weights(again))


WRONG = [
    *((case["base"], case["settings"], case["named"]) for case in TABLES["wrong"]),
    ("", {"sizes": SIZES, "attention": "flash"}, "trainer.precision"),
]


@pytest.mark.parametrize("base, settings, named", WRONG)
def test_build_llm_with_a_wrong_setting(base, settings, named, bases):
    # By the name of the setting, before a model of many gigabytes is read or trained.
    with pytest.raises((ConfigError, CheckpointError), match=named):
        build(bases.get(base), **settings)


def test_build_llm_with_another_vocabulary(bases):
    # Ids of images would be those of words.
    other = SimpleNamespace(vocabulary=ImageVocabulary(80, CODES, 4), special_ids=LLAMA_IDS)
    with pytest.raises(ConfigError, match="80"):
        build_llm(LlmModelSettings(path=str(bases["all"]), dtype="fp32"), other, "cpu")


def test_gradient_checkpointing_computes_each_layer_again(bases):
    # Else a user's batch does not fit into memory.
    calls = []
    for checkpointing in (False, True):
        model = build(bases["all"], lora=LORA, gradient_checkpointing=checkpointing)
        mlp = find_llama(model).model.layers[0].mlp
        mlp.register_forward_pre_hook(lambda *_, row=checkpointing: calls.append(row))
        packed_loss(model, batch()).mean.backward()
    assert calls == [False, True, True]
