"""`microseed.py`: its weights in the library's classes give the same codes, pixels and logits."""

import re
import runpy
import sys

import pytest
import torch
from llm_runs import environment
from real_processes import run_checked
from repository import ROOT
from tiny import read_json
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from seed_multimodal.language.vocabulary import ImageVocabulary
from seed_multimodal.models.seed.configuration import QFormerConfig, Seed2Config
from seed_multimodal.models.seed.modeling import Seed2Tokenizer
from seed_multimodal.nn.vision.eva import EvaConfig

SCRIPT = ROOT / "microseed.py"
# Beginnings or ends of names: microseed's → the library's; docs/explanation/microseed.md has them.
TOKENIZER_NAMES = {
    r"^vit\.patch_embed": "visual_encoder.patch_embed.proj",
    r"^vit\.class_token": "visual_encoder.cls_token",
    r"^vit\.position_embed": "visual_encoder.pos_embed",
    r"^vit\.": "visual_encoder.",
    r"^vit_norm": "ln_vision",
    r"^qformer\.queries": "query_tokens",
    r"^qformer\.norm": "Qformer.bert.embeddings.LayerNorm",
    r"^qformer\.layers": "Qformer.bert.encoder.layer",
    r"self_attention\.out": "attention.output.dense",
    r"self_attention": "attention.self",
    r"cross_attention\.out": "crossattention.output.dense",
    r"cross_attention": "crossattention.self",
    r"(layer\.\d+)\.norm1": r"\1.attention.output.LayerNorm",
    r"(layer\.\d+)\.norm2": r"\1.crossattention.output.LayerNorm",
    r"(layer\.\d+)\.norm3": r"\1.output_query.LayerNorm",
    r"(layer\.\d+)\.mlp\.0": r"\1.intermediate_query.dense",
    r"(layer\.\d+)\.mlp\.2": r"\1.output_query.dense",
    r"^encode_task": "encode_task_layer",
    r"^codebook": "quantize",
    r"quantize\.embedding": "quantize.embedding.weight",
    r"^decode_task": "decode_task_layer",
    r"^position_embed": "pos_embed_image",
    r"^blocks": "blocks_image",
    r"(blocks\w*\.\d+)\.attention\.out": r"\1.attn.proj",
    r"(blocks\w*\.\d+)\.mlp\.0": r"\1.mlp.fc1",
    r"(blocks\w*\.\d+)\.mlp\.2": r"\1.mlp.fc2",
    r"^reduce": "image_down",
    r"^to_pixels": "distill_image_proj",
}
LLAMA_NAMES = {
    r"^": "model.",
    r"attention\.out": "self_attn.o_proj",
    r"attention\.(.)\w+\.": r"self_attn.\1_proj.",
    r"(\d)\.norm1": r"\1.input_layernorm",
    r"(\d)\.norm2": r"\1.post_attention_layernorm",
    r"(\d)\.(gate|up|down)\.": r"\1.mlp.\2_proj.",
}


def renamed(model: nn.Module, names: dict[str, str]) -> dict[str, torch.Tensor]:
    """State of a model of microseed under the library's names."""
    state = {}
    for name, tensor in model.state_dict().items():
        for pattern, replacement in names.items():
            name = re.sub(pattern, replacement, name)
        state[name] = tensor
    return state


def add_joined_layers(state: dict[str, torch.Tensor]) -> None:
    """The library's ViT joins queries, keys and values; its Q-Former adds a bias to keys."""
    for name in [*state]:
        block, is_query, part = name.partition(".attention.query.")
        if is_query:
            query, value = state[name], state[f"{block}.attention.value.{part}"]
            if part == "weight":
                key = state[f"{block}.attention.key.weight"]
                state[f"{block}.attn.qkv.weight"] = torch.cat([query, key, value])
            elif block.startswith("visual_encoder"):
                state[f"{block}.attn.q_bias"], state[f"{block}.attn.v_bias"] = query, value
            else:
                joined = torch.cat([query, torch.zeros_like(query), value])
                state[f"{block}.attn.qkv.bias"] = joined
        if name.endswith(".self.key.weight"):
            state[name.replace("weight", "bias")] = torch.zeros_like(state[name][0])
    for name in [*state]:
        if re.search(r"blocks\w*\.\d+\.attention\.", name):
            del state[name]


@pytest.fixture(scope="module")
def microseed(tmp_path_factory) -> dict:
    """Names of the program after a short training."""
    settings = {
        "sprites": ROOT / "data" / "nano" / "sprites.tar",
        "out": tmp_path_factory.mktemp("microseed"),
        "tokenizer_steps": 12,
        "continuous_steps": 4,
        "lm_steps": 4,
        "eval_scenes": 4,
    }
    arguments = [f"{name}={value}" for name, value in settings.items()]
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng():
        patch.setattr(sys, "argv", [str(SCRIPT), *arguments])
        return runpy.run_path(str(SCRIPT))


@pytest.fixture(scope="module")
def tokenizer(microseed) -> Seed2Tokenizer:
    width, num_queries = microseed["width"], microseed["num_queries"]
    common = {"width": width, "heads": microseed["heads"], "mlp_width": 4 * width}
    config = Seed2Config(
        vit=EvaConfig(
            image_size=microseed["image_size"],
            patch_size=microseed["patch_size"],
            depth=microseed["vit_depth"],
            **common,
        ),
        qformer=QFormerConfig(
            depth=microseed["qformer_depth"], cross_attention_freq=1, dropout=0.0, **common
        ),
        num_query=num_queries,
        codebook_size=microseed["num_codes"],
        codebook_dim=microseed["code_dim"],
        codebook_sections=num_queries,
        decode_depth=microseed["decoder_depth"],
        decode_heads=microseed["heads"],
        recon_s=False,
        image_features_dim=3 * microseed["image_size"] ** 2,
    )
    state = renamed(microseed["tokenizer"], TOKENIZER_NAMES)
    add_joined_layers(state)
    library = Seed2Tokenizer(config).eval()
    keys = library.load_state_dict(state, strict=False)
    assert not keys.unexpected_keys
    assert all(name.endswith("position_ids") for name in keys.missing_keys)
    return library


@pytest.fixture(scope="module")
def llama(microseed) -> LlamaForCausalLM:
    width, heads = microseed["width"], microseed["heads"]
    config = LlamaConfig(
        vocab_size=microseed["vocabulary_size"],
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=microseed["lm_depth"],
        num_attention_heads=heads,
        num_key_value_heads=heads,
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        pad_token_id=microseed["PAD"],
        bos_token_id=microseed["BOS"],
        eos_token_id=microseed["EOS"],
    )
    library = LlamaForCausalLM(config).eval()
    state = renamed(microseed["lm"], LLAMA_NAMES)
    library.load_state_dict({**state, "lm_head.weight": state["model.embed_tokens.weight"]})
    return library


@pytest.mark.slow
@torch.no_grad()
def test_tokenizer_computes_what_seed_2_computes(microseed, tokenizer):
    images, codes = microseed["images"][::9][:500], microseed["codes"][::9][:500]
    ours = microseed["tokenizer"]

    features = ours.encode_task(ours.query_features(images))
    torch.testing.assert_close(tokenizer.pre_quant(images), features, rtol=0, atol=1e-6)
    assert torch.equal(tokenizer.encode(images), codes)
    for length in (4, microseed["num_queries"]):
        prefix = codes.clone()
        prefix[:, length:] = -1
        pixels = ours.decode(codes, length)
        decoded = tokenizer.decode(prefix).view_as(pixels)
        torch.testing.assert_close(decoded, pixels, rtol=0, atol=1e-6)
    torch.testing.assert_close(tokenizer.quantize(features)[1], ours.codebook(features)[1])


@pytest.mark.slow
@torch.no_grad()
def test_language_model_computes_what_llama_computes(microseed, llama):
    # 1. Logits of whole sequences, and the continuation of a prompt.
    image = microseed["image_ids"](microseed["codes"][5])
    text = microseed["word_ids"](microseed["captions"][5])
    ids = torch.tensor([[1, *image, *text, 2], [1, *text, *image, 2]])
    torch.testing.assert_close(llama(ids).logits, microseed["lm"](ids), rtol=0, atol=1e-4)
    prompt = ids[1:, : len(text) + 2]
    continued = llama.generate(prompt, max_new_tokens=12, do_sample=False, eos_token_id=None)
    assert torch.equal(continued[:, prompt.shape[1] :], microseed["lm"].generate(prompt, 12))

    # 2. The ids of words and codes.
    vocabulary = ImageVocabulary(
        n_text=microseed["CODE_START"],
        n_codes=microseed["num_codes"],
        tokens_per_image=microseed["num_queries"],
    )
    assert vocabulary.size == microseed["vocabulary_size"]
    assert vocabulary.image_ids(microseed["codes"][5].tolist()) == image


def test_microseed_is_read_in_an_evening():
    assert len(SCRIPT.read_text().splitlines()) <= 600


@pytest.mark.nightly
@pytest.mark.process
@pytest.mark.timeout(900)
def test_microseed_learns_in_ten_minutes(tmp_path):
    command = [sys.executable, str(SCRIPT), f"out={tmp_path}"]
    run_checked(command, cwd=ROOT, env=environment(), timeout=850)
    results = read_json(tmp_path / "results.json")
    assert results["seconds"] <= 600
    assert results["codes_used"] >= 480
    for pairs in ("seen", "unseen"):
        assert results[pairs]["described"] >= 0.95
        assert results[pairs]["drawn"] >= 0.90
        assert results[pairs]["reconstructed"]["16"] >= 0.98
    assert (tmp_path / "picture.png").is_file()
