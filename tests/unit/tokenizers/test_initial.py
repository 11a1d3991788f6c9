"""Initial weights: generated files with the released files' full lists of names, at tiny widths."""

from __future__ import annotations

import dataclasses
import gzip
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from seed_multimodal.errors import CheckpointError, SeedWarning
from seed_multimodal.nn.eva import EvaConfig, EvaVit
from seed_multimodal.tokenizers.clip_weights import load_clip_vision
from seed_multimodal.tokenizers.initial import check_unclip, load_blip2, load_tower
from seed_multimodal.tokenizers.qformer import QFormerConfig
from seed_multimodal.tokenizers.seed2 import Seed2Config
from seed_multimodal.tokenizers.stage1 import Stage1Model

KEYS = Path(__file__).parents[2] / "golden" / "data" / "seed2_keys_full" / "stage1_training_model.json.gz"
WORDS = "Qformer.bert.embeddings.word_embeddings.weight"
HEAD = "Qformer.cls.predictions."
# Released sizes → tiny ones: word pieces, MLP, tower, Q-Former, positions, projections.
TINY = {30523: 61, 30522: 60, 3072: 40, 1408: 16, 768: 24, 512: 20, 256: 8}
EVA = EvaConfig(image_size=16, patch_size=8, width=16, depth=39, heads=2, mlp_width=24)


@pytest.fixture(scope="module")
def config() -> Seed2Config:
    """The released depths, so that every name of the released files exists."""
    return Seed2Config(vit=dataclasses.replace(EVA, depth=1),
                       qformer=QFormerConfig(width=24, depth=12, heads=2, mlp_width=40, max_positions=20))


@pytest.fixture(scope="module")
def blip2() -> dict[str, Tensor]:
    """What `blip2_pretrained.pth` holds: stage 1 without the tower, and the matching head."""
    table = json.loads(gzip.decompress(KEYS.read_bytes()))
    names = {name: row for name, row in table.items() if not name.startswith("visual_encoder.")}
    generator = torch.Generator().manual_seed(3)
    state = {name: torch.arange(20)[None] if name.endswith("position_ids")
             else torch.randn([TINY.get(n, n) for n in row["shape"]], generator=generator)
             for name, row in names.items()}
    state[f"{HEAD}decoder.weight"], state[f"{HEAD}decoder.bias"] = state[WORDS], state[f"{HEAD}bias"]
    return state | {"itm_head.weight": torch.zeros(2, 24), "itm_head.bias": torch.zeros(2)}


def _model(config: Seed2Config, **options) -> Stage1Model:
    return Stage1Model(config, vocab_size=61, embed_dim=8, **options)


def _saved(state: dict[str, Tensor], file: Path) -> Path:
    torch.save({"model": state}, file)
    return file


def test_blip2_fills_everything_but_the_tower(config: Seed2Config, blip2: dict[str, Tensor], tmp_path: Path) -> None:
    assert len(blip2) == 855 - 511 + 2
    model, lines = _model(config), []
    tower = {name: value.clone() for name, value in model.visual_encoder.state_dict().items()}
    report = load_blip2(model, _saved(blip2, tmp_path / "blip2_pretrained.pth"), lines.append)
    own = model.state_dict()
    assert set(report.loaded) == set(blip2) - {"itm_head.weight", "itm_head.bias"}
    for name in report.loaded:
        assert torch.equal(own[name], blip2[name]), name
    assert all(torch.equal(value, model.visual_encoder.state_dict()[name]) for name, value in tower.items())
    assert report.ignored == ["itm_head.weight", "itm_head.bias"] and not report.fitted
    assert all(name.startswith("visual_encoder.") for name in report.missing) and len(report.missing) == len(tower)
    assert len(lines) == 1 and "itm_head (2)" in lines[0] and f"visual_encoder ({len(tower)})" in lines[0]


def test_blip2_bundled_tower_is_left_aside(config: Seed2Config, blip2: dict[str, Tensor], tmp_path: Path) -> None:
    model = _model(config)
    before = model.visual_encoder.cls_token.clone()
    with_tower = blip2 | {"visual_encoder.cls_token": torch.ones(1, 1, 1024)}
    report = load_blip2(model, _saved(with_tower, tmp_path / "a.pth"), None)
    assert "visual_encoder.cls_token" in report.ignored and torch.equal(model.visual_encoder.cls_token, before)


@pytest.mark.parametrize("shorter", [
    (WORDS, f"{HEAD}bias", f"{HEAD}decoder.weight", f"{HEAD}decoder.bias"),  # BERT's own size everywhere
    (f"{HEAD}bias", f"{HEAD}decoder.bias")])  # words enlarged, the tied bias not
def test_word_tables_with_one_row_less(config: Seed2Config, blip2: dict[str, Tensor], tmp_path: Path,
                                       shorter: tuple[str, ...]) -> None:
    model = _model(config)
    new_row, new_bias = model.state_dict()[WORDS][-1].clone(), model.state_dict()[f"{HEAD}bias"][-1].clone()
    state = blip2 | {name: blip2[name][:-1] for name in shorter}
    report = load_blip2(model, _saved(state, tmp_path / "a.pth"), None)
    own = model.state_dict()
    assert set(report.fitted) == set(shorter) and report.fitted[shorter[0]] == "fitted from 60 to 61 rows"
    assert torch.equal(own[WORDS][:-1], blip2[WORDS][:-1]) and torch.equal(own[f"{HEAD}bias"][:-1],
                                                                         blip2[f"{HEAD}bias"][:-1])
    assert torch.equal(own[f"{HEAD}bias"][-1], new_bias)
    assert torch.equal(own[WORDS][-1], new_row if WORDS in shorter else blip2[WORDS][-1])
    assert own[f"{HEAD}decoder.weight"].data_ptr() == own[WORDS].data_ptr()


def test_word_tables_with_one_row_more(config: Seed2Config, blip2: dict[str, Tensor], tmp_path: Path) -> None:
    model = Stage1Model(config, vocab_size=60, embed_dim=8, lm_head=False)
    report = load_blip2(model, _saved(blip2, tmp_path / "a.pth"), None)
    assert torch.equal(model.state_dict()[WORDS], blip2[WORDS][:60]) and list(report.fitted) == [WORDS]
    assert {name.split(".")[1] for name in report.ignored if name.startswith("Qformer")} == {"cls"}


def test_blip2_of_another_size_is_refused_by_name(config: Seed2Config, blip2: dict[str, Tensor],
                                                  tmp_path: Path) -> None:
    name = "Qformer.bert.encoder.layer.0.crossattention.self.key.weight"
    wide = {key: value.new_zeros(24, 1024) if key.endswith(("crossattention.self.key.weight",
                                                            "crossattention.self.value.weight")) else value
            for key, value in blip2.items()}
    with pytest.raises(CheckpointError, match=rf"12 tensors have another size, first '{name}': the file has "
                                              r"\(24, 1024\), the model needs \(24, 16\)"):
        load_blip2(_model(config), _saved(wide, tmp_path / "a.pth"), None)
    words = blip2 | {WORDS: blip2[WORDS][:50]}
    with pytest.raises(CheckpointError, match=rf"first '{WORDS}': the file has \(50, 24\), the model needs \(61, 24\)"):
        load_blip2(_model(config), _saved(words, tmp_path / "b.pth"), None)


def test_blip2_incomplete_unknown_or_absent(config: Seed2Config, blip2: dict[str, Tensor], tmp_path: Path,
                                            monkeypatch: pytest.MonkeyPatch) -> None:
    model = _model(config)
    lost = {name: value for name, value in blip2.items() if name != "vision_proj.bias"}
    with pytest.raises(CheckpointError, match="missing from the file: 'vision_proj.bias'"):
        load_blip2(model, _saved(lost, tmp_path / "a.pth"), None)
    with pytest.warns(SeedWarning, match="1 tensor that the model does not know was left out: 't5_proj.weight'"):
        load_blip2(model, _saved(blip2 | {"t5_proj.weight": torch.zeros(2)}, tmp_path / "b.pth"), None)
    with pytest.raises(CheckpointError, match=r"c\.pth: not a BLIP-2 stage-1 checkpoint.*'other'"):
        load_blip2(model, _saved({"other": torch.zeros(2)}, tmp_path / "c.pth"), None)
    with pytest.raises(CheckpointError, match=r"blip2_pretrained\.pth: there is no such file; download https"):
        load_blip2(model, tmp_path / "blip2_pretrained.pth", None)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="empty: holds no blip2_pretrained.safetensors or blip2_pretrained.pth"):
        load_blip2(model, tmp_path / "empty", None)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(CheckpointError, match="some-owner/blip2: neither a local folder nor reachable"):
        load_blip2(model, "some-owner/blip2", None)


def _tower_file(folder: Path, depth: int = 40, **sizes) -> tuple[Path, EvaVit]:
    tower = EvaVit(dataclasses.replace(EVA, depth=depth, **sizes))
    folder.mkdir(exist_ok=True)
    state = tower.state_dict() | {"norm.weight": torch.ones(16), "head.bias": torch.ones(3)}
    torch.save(state, folder / "eva_vit_g.pth")
    return folder / "eva_vit_g.pth", tower


def test_eva_uses_39_of_40_blocks(tmp_path: Path) -> None:
    file, source = _tower_file(tmp_path / "a")
    lines: list[str] = []
    vit = EvaVit(EVA)
    report = load_tower(vit, file.parent, lines.append)  # a folder with the file is as good as the file
    assert len(report.loaded) == 511 and not report.missing and not report.fitted
    assert all(torch.equal(value, source.state_dict()[name]) for name, value in vit.state_dict().items())
    assert {name.split(".")[0] for name in report.ignored} == {"blocks", "norm", "head"}
    assert len([name for name in report.ignored if name.startswith("blocks.39.")]) == 13
    assert lines == [f"{file.parent}: 511 tensors loaded, 0 not in the file, 15 in the file ignored; "
                     "ignored: blocks (13), norm (1), head (1)."]


def test_eva_positions_are_resized(tmp_path: Path) -> None:
    file, source = _tower_file(tmp_path / "a", depth=3)
    vit = EvaVit(dataclasses.replace(EVA, image_size=24, depth=2))
    report = load_tower(vit, file, None)
    assert report.fitted == {"pos_embed": "resized from (1, 5, 16) to (1, 10, 16)"}
    assert torch.equal(vit.pos_embed[:, 0], source.pos_embed[:, 0])


def test_eva_refusals(tmp_path: Path) -> None:
    file, _ = _tower_file(tmp_path / "a", depth=3)
    wider = EvaVit(dataclasses.replace(EVA, depth=2, width=32, mlp_width=40))
    with pytest.raises(CheckpointError, match=r"tensors have another size, first 'cls_token': the file has "
                                              r"\(1, 1, 16\), the model needs \(1, 1, 32\)"):
        load_tower(wider, file, None)
    with pytest.raises(CheckpointError, match=r"13 tensors are missing from the file: 'blocks\.3"):
        load_tower(EvaVit(dataclasses.replace(EVA, depth=4)), file, None)
    torch.save({"visual.conv1.weight": torch.zeros(2)}, tmp_path / "open_clip.pth")
    with pytest.raises(CheckpointError, match=r"open_clip\.pth: not an EVA vision tower"):
        load_tower(EvaVit(EVA), tmp_path / "open_clip.pth", None)
    with pytest.raises(CheckpointError, match=r"absent\.pth: there is no such file; download https"):
        load_tower(EvaVit(EVA), tmp_path / "absent.pth", None)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole CLIP, as laion's folder is; its vision_config carries another projection width than the model."""
    from transformers import CLIPConfig, CLIPModel

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPConfig(text_config={**sizes, "vocab_size": 30, "bos_token_id": 1, "eos_token_id": 2},
                        vision_config={**sizes, "image_size": 16, "patch_size": 8}, projection_dim=10)
    torch.manual_seed(0)
    model = CLIPModel(config).eval()
    folder = tmp_path_factory.mktemp("clip")
    model.save_pretrained(folder)
    return folder


def test_clip_vision_half_of_a_whole_clip(clip_folder: Path, images: Tensor) -> None:
    from transformers import CLIPModel

    lines: list[str] = []
    model = load_clip_vision(clip_folder, log=lines.append)
    whole = CLIPModel.from_pretrained(clip_folder).eval()
    with torch.no_grad():
        vision = whole.vision_model(pixel_values=images)
        expected = whole.visual_projection(vision.pooler_output)
        assert torch.allclose(model(images).image_embeds, expected, atol=1e-6)
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    groups = {name.split(".")[0] for name in model.load_report.ignored}
    assert groups == {"text_model", "text_projection", "logit_scale"} and not model.load_report.missing
    assert "text_model (" in lines[0]
    assert load_clip_vision(clip_folder, dtype=torch.bfloat16, log=None).dtype == torch.bfloat16


def test_clip_vision_alone_old_file_and_shards(clip_folder: Path, images: Tensor, tmp_path: Path) -> None:
    model = load_clip_vision(clip_folder, log=None)
    expected = model(images).image_embeds
    model.save_pretrained(tmp_path / "vision")
    assert torch.equal(load_clip_vision(tmp_path / "vision", log=None)(images).image_embeds, expected)
    old = tmp_path / "old"
    old.mkdir()
    (old / "config.json").write_text((tmp_path / "vision" / "config.json").read_text())
    state = model.state_dict() | {"vision_model.embeddings.position_ids": torch.arange(5)[None]}
    torch.save(state, old / "pytorch_model.bin")
    assert torch.equal(load_clip_vision(old, log=None)(images).image_embeds, expected)
    model.save_pretrained(tmp_path / "shards", max_shard_size="6KB")
    assert (tmp_path / "shards" / "model.safetensors.index.json").is_file()
    assert torch.equal(load_clip_vision(tmp_path / "shards", log=None)(images).image_embeds, expected)


def test_clip_vision_in_old_shards_and_with_an_index_left_over(clip_folder: Path, images: Tensor,
                                                              tmp_path: Path) -> None:
    model = load_clip_vision(clip_folder, log=None)
    expected = model(images).image_embeds
    model.save_pretrained(tmp_path / "both")
    index = tmp_path / "both" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}}))  # of shards now removed
    assert torch.equal(load_clip_vision(tmp_path / "both", log=None)(images).image_embeds, expected)
    old = tmp_path / "old"
    old.mkdir()
    (old / "config.json").write_text((tmp_path / "both" / "config.json").read_text())
    names = list(model.state_dict())
    files = {name: f"pytorch_model-0000{1 + (name > names[len(names) // 2])}-of-00002.bin" for name in names}
    for file in set(files.values()):
        torch.save({name: value.half() for name, value in model.state_dict().items() if files[name] == file},
                   old / file)
    (old / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": files}))
    torch.testing.assert_close(load_clip_vision(old, log=None)(images).image_embeds, expected, atol=1e-2, rtol=1e-2)
    for damaged in ({}, {"weight_map": []}, {"weight_map": None}):
        (old / "pytorch_model.bin.index.json").write_text(json.dumps(damaged))
        with pytest.raises(CheckpointError, match=r"pytorch_model\.bin\.index\.json: not an index of shards"):
            load_clip_vision(old, log=None)


def test_clip_vision_refusals(clip_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match=r"absent: there is no such folder; download laion/CLIP-ViT-H-14"):
        load_clip_vision(tmp_path / "absent", log=None)
    other = tmp_path / "other"
    other.mkdir()
    (other / "model.safetensors").write_bytes((clip_folder / "model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match=r"config\.json: there is no such file; download laion/"):
        load_clip_vision(other, log=None)
    settings = json.loads((clip_folder / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(settings | {"model_type": "bert"}))
    with pytest.raises(CheckpointError, match="describes a 'bert', not a CLIP"):
        load_clip_vision(other, log=None)
    (other / "config.json").write_text(json.dumps(settings | {"projection_dim": 12}))
    with pytest.raises(CheckpointError, match=r"1 tensors have another size, first 'visual_projection\.weight': the "
                                              r"file has \(10, 16\), the model needs \(12, 16\)"):
        load_clip_vision(other, log=None)
    (other / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="holds no model.safetensors or pytorch_model.bin"):
        load_clip_vision(other, log=None)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(CheckpointError, match="some-owner/clip: neither a local folder nor reachable"):
        load_clip_vision("some-owner/clip", log=None)


def _unclip_folder(folder: Path, width: int, class_width: int | None = None) -> Path:
    from safetensors.torch import save_file

    for name in ("image_normalizer", "image_noising_scheduler", "scheduler", "unet", "vae"):
        (folder / name).mkdir(parents=True)
    parts = dict.fromkeys(("image_normalizer", "image_noising_scheduler", "scheduler", "unet", "vae", "tokenizer",
                           "image_encoder"), ["diffusers", "X"])
    index = {"_class_name": "StableUnCLIPImg2ImgPipeline", **parts, "text_encoder": [None, None]}
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "unet" / "config.json").write_text(json.dumps(
        {"projection_class_embeddings_input_dim": class_width or 2 * width}))
    (folder / "image_normalizer" / "config.json").write_text(json.dumps({"embedding_dim": width}))
    save_file({"mean": torch.zeros(1, width), "std": torch.ones(1, width)},
              folder / "image_normalizer" / "diffusion_pytorch_model.safetensors")
    return folder


def test_unclip_folder_is_checked(tmp_path: Path) -> None:
    lines: list[str] = []
    report = check_unclip(_unclip_folder(tmp_path / "a", 10), 10, lines.append)
    assert report.loaded == ["image_noising_scheduler", "image_normalizer", "scheduler", "tokenizer", "unet", "vae"]
    assert report.missing == ["text_encoder"] and report.ignored == ["image_encoder"] and "width 10" in lines[0]
    with pytest.raises(CheckpointError, match=r"'mean' has \(1, 10\), the tokenizer's image embeddings need \(1, 12\)"):
        check_unclip(tmp_path / "a", 12, None)
    with pytest.raises(CheckpointError, match="class embedding takes 21 numbers, image embeddings of width 10 .* 20"):
        check_unclip(_unclip_folder(tmp_path / "b", 10, 21), 10, None)
    (tmp_path / "a" / "image_normalizer" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"'mean' has \(1, 10\).*\(1, 12\)"):
        check_unclip(tmp_path / "a", 12, None)  # the configuration tells the width too
    (tmp_path / "a" / "vae").rmdir()
    with pytest.raises(CheckpointError, match="a: not a complete stable-unCLIP folder: it holds no 'vae'; download"):
        check_unclip(tmp_path / "a", 10, None)
    with pytest.raises(CheckpointError, match="absent: there is no such folder; download the Stable Diffusion 2.1"):
        check_unclip(tmp_path / "absent", 10, None)


def test_shipped_unclip_folder_fits_the_shipped_tokenizer() -> None:
    folder = Path(__file__).parents[3] / "pretrained" / "nano" / "seed_tokenizer"
    width = Seed2Config.read(folder / "config.json").image_features_dim
    assert check_unclip(folder / "diffusion_model", width, None).missing == ["text_encoder", "tokenizer"]
