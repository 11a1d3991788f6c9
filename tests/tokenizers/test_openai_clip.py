"""CLIP files of OpenAI's layout: state dicts and archives become transformers' own model; code stays unread."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import pytest
import torch
from transformers import CLIPConfig, CLIPModel

from seed_multimodal.errors import CheckpointError
from seed_multimodal.tokenizers.openai_clip import load_openai_clip

SIZES = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 1,
         "hidden_act": "quick_gelu"}
CONFIG = CLIPConfig(projection_dim=16, vision_config={**SIZES, "image_size": 28, "patch_size": 14},
                    text_config={**SIZES, "vocab_size": 99, "max_position_embeddings": 12, "bos_token_id": 97,
                                 "eos_token_id": 98})


def openai_names(model: CLIPModel) -> dict[str, torch.Tensor]:
    """The model's tensors as OpenAI names them, written down layer by layer."""
    own = model.state_dict()
    state = {"logit_scale": own["logit_scale"], "text_projection": own["text_projection.weight"].T,
             "visual.proj": own["visual_projection.weight"].T,
             "visual.class_embedding": own["vision_model.embeddings.class_embedding"],
             "visual.conv1.weight": own["vision_model.embeddings.patch_embedding.weight"],
             "visual.positional_embedding": own["vision_model.embeddings.position_embedding.weight"],
             "token_embedding.weight": own["text_model.embeddings.token_embedding.weight"],
             "positional_embedding": own["text_model.embeddings.position_embedding.weight"]}
    for kind in ("weight", "bias"):
        state[f"visual.ln_pre.{kind}"] = own[f"vision_model.pre_layrnorm.{kind}"]
        state[f"visual.ln_post.{kind}"] = own[f"vision_model.post_layernorm.{kind}"]
        state[f"ln_final.{kind}"] = own[f"text_model.final_layer_norm.{kind}"]
        for prefix, tower in (("visual.", "vision"), ("", "text")):
            for number in range(2):
                block = f"{prefix}transformer.resblocks.{number}."
                layer = f"{tower}_model.encoder.layers.{number}."
                state[f"{block}attn.in_proj_{kind}"] = torch.cat(
                    [own[f"{layer}self_attn.{one}_proj.{kind}"] for one in "qkv"])
                for theirs, ours in (("attn.out_proj", "self_attn.out_proj"), ("ln_1", "layer_norm1"),
                                     ("ln_2", "layer_norm2"), ("mlp.c_fc", "mlp.fc1"), ("mlp.c_proj", "mlp.fc2")):
                    state[f"{block}{theirs}.{kind}"] = own[f"{layer}{ours}.{kind}"]
    return {name: value.clone() for name, value in state.items()}


def nested(state: dict[str, torch.Tensor]) -> torch.nn.Module:
    """Modules with these tensors at their names."""
    root = torch.nn.Module()
    for name, value in state.items():
        *path, last = name.split(".")
        part = root
        for step in path:
            if step not in dict(part.named_children()):
                part.add_module(step, torch.nn.Module())
            part = part.get_submodule(step)
        part.register_parameter(last, torch.nn.Parameter(value))
    return root


def archive(state: dict[str, torch.Tensor], path: Path) -> Path:
    torch.jit.script(nested(state)).save(str(path))
    return path


@pytest.fixture(scope="module")
def model() -> CLIPModel:
    torch.manual_seed(0)
    made = CLIPModel(CONFIG).eval()
    for value in made.parameters():
        torch.nn.init.normal_(value, std=0.1)
    return made


@pytest.mark.parametrize("kind", ["state dict", "archive"])
def test_both_kinds_of_file_are_transformers_model(model, tmp_path, kind):
    state, file = openai_names(model), tmp_path / "openai_clip_ViT-L-14.bin"
    if kind == "archive":
        archive({**state, "input_resolution": torch.tensor(28.0), "context_length": torch.tensor(12.0)}, file)
    else:
        torch.save(state, file)
    found = load_openai_clip(file)
    assert {name: value.tolist() for name, value in found.state_dict().items()} == {
        name: value.tolist() for name, value in model.state_dict().items()}
    ids = torch.tensor([[97, 5, 6, 98, 98], [97, 7, 98, 98, 98]])
    pixels = torch.randn(2, 3, 28, 28)
    with torch.no_grad():
        ours, theirs = (one(input_ids=ids, pixel_values=pixels).logits_per_text for one in (found, model))
    assert torch.equal(ours, theirs)


def test_an_archive_that_asks_for_more_than_parts_of_a_model_is_refused(model, tmp_path):
    file = archive({"visual.conv1.weight": torch.ones(1)}, tmp_path / "bad.pt")
    data = io.BytesIO(file.read_bytes())
    with zipfile.ZipFile(data) as source, zipfile.ZipFile(file, "w") as target:
        for entry in source.infolist():
            called = b"\x80\x02cos\nsystem\nX\x04\0\0\0true\x85R."
            target.writestr(entry, called if entry.filename.endswith("/data.pkl") else source.read(entry))
    with pytest.raises(CheckpointError, match="refused, because it asks for os.system"):
        load_openai_clip(file)


def test_other_files_are_one_sentence(model, tmp_path):
    whole = archive(openai_names(model), tmp_path / "whole.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="cut.pt: "):
        load_openai_clip(tmp_path / "cut.pt")
    torch.save({"weight": torch.ones(1)}, tmp_path / "other.bin")
    with pytest.raises(CheckpointError, match="not a CLIP of OpenAI's with a ViT"):
        load_openai_clip(tmp_path / "other.bin")
    with pytest.raises(CheckpointError, match="there is no such weights file"):
        load_openai_clip(tmp_path / "none.bin")
