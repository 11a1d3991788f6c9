"""Loading: our folder, the released layout (small widths), single files, and everything that must be refused."""

from __future__ import annotations

import dataclasses
import json
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from seed_multimodal.errors import CheckpointError, ConfigError, SeedWarning
from seed_multimodal.nn.eva import EvaVit
from seed_multimodal.nn.layers import Block
from seed_multimodal.tokenizers.qformer import QFormer
from seed_multimodal.tokenizers.seed2 import Seed2Config, Seed2Tokenizer
from seed_multimodal.weights import save_state_dict

State = dict[str, torch.Tensor]


@pytest.fixture(autouse=True)
def _no_cached_tower(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch_home"))
    torch.hub.set_dir(str(tmp_path / "torch_home" / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def original(tiny: Seed2Config) -> Seed2Tokenizer:
    model = Seed2Tokenizer(tiny).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model


def _extra_keys(config: Seed2Config) -> State:
    """The 146 training-only tensors that fit what users reported of the released file."""
    text = QFormer(dataclasses.replace(config.qformer, depth=4), config.qformer.width)
    state = {f"Reverse_Qformer_text.{name}": value for name, value in text.state_dict().items()}
    blocks = nn.ModuleList(Block(config.qformer.width, config.decode_heads) for _ in range(4))
    state |= {f"blocks_text.{name}": value for name, value in blocks.state_dict().items()}
    names = ("reverse_tokens_text", "pos_embed_text", "temp", "distill_text_proj.weight", "distill_text_proj.bias",
             "text_proj.weight", "text_proj.bias", "vision_proj.weight", "vision_proj.bias", "itm_head.weight",
             "itm_head.bias")
    return state | {name: torch.zeros(3) for name in names}


def _released_folder(original: Seed2Tokenizer, folder: Path, vision_depth: int = 3) -> Path:
    """`seed_quantizer.pt` without vision tower but with extras, `eva_vit_g.pth` with one block more than used."""
    folder.mkdir(parents=True, exist_ok=True)
    state = original.state_dict()
    kept = {name: value for name, value in state.items() if not name.startswith("visual_encoder.")}
    torch.save(kept | _extra_keys(original.config), folder / "seed_quantizer.pt")
    deeper = EvaVit(dataclasses.replace(original.config.vit, depth=vision_depth)).state_dict()
    torch.save(deeper | original.visual_encoder.state_dict(), folder / "eva_vit_g.pth")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 3}))
    return folder


def _same(loaded: Seed2Tokenizer, original: Seed2Tokenizer, images: torch.Tensor) -> None:
    for name, value in original.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    assert torch.equal(loaded.encode(images), original.encode(images))
    assert not loaded.training and not any(parameter.requires_grad for parameter in loaded.parameters())


def test_our_folder_round_trip(original: Seed2Tokenizer, tmp_path: Path, images: torch.Tensor) -> None:
    original.save_pretrained(tmp_path / "mine")
    assert sorted(p.name for p in (tmp_path / "mine").iterdir()) == ["config.json", "model.safetensors"]
    loaded = Seed2Tokenizer.from_pretrained(tmp_path / "mine")
    assert loaded.config == original.config
    _same(loaded, original, images)
    _same(Seed2Tokenizer.from_pretrained(tmp_path / "mine" / "model.safetensors"), original, images)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_load_in_any_dtype(original: Seed2Tokenizer, tmp_path: Path, images: torch.Tensor,
                                                  dtype: torch.dtype) -> None:
    original.to(dtype).save_pretrained(tmp_path)
    full = Seed2Tokenizer.from_pretrained(tmp_path)
    assert full.dtype == torch.float32 and full.encode(images).shape == (5, 32)
    half = Seed2Tokenizer.from_pretrained(tmp_path, dtype=dtype)
    assert half.dtype == dtype and half.Qformer.bert.embeddings.position_ids.dtype == torch.int64
    assert torch.equal(half.encode(images), original.encode(images))


def test_released_layout(original: Seed2Tokenizer, tmp_path: Path, images: torch.Tensor) -> None:
    folder, lines = _released_folder(original, tmp_path / "released"), []
    assert len(_extra_keys(original.config)) == 146
    loaded = Seed2Tokenizer.from_pretrained(folder, config=original.config, log=lines.append)
    _same(loaded, original, images)
    report = loaded.load_report
    assert report is not None and not report.missing
    assert len(report.loaded) == len(original.state_dict())
    ignored_blocks = [name for name in report.ignored if name.startswith("visual_encoder.blocks.2.")]
    assert len(report.ignored) == 146 + len(ignored_blocks) and len(ignored_blocks) == 13
    assert "Reverse_Qformer_text (87)" in lines[0] and "eva_vit_g.pth" in lines[0]


def test_single_file_with_vision_elsewhere(original: Seed2Tokenizer, tmp_path: Path, images: torch.Tensor) -> None:
    folder = _released_folder(original, tmp_path / "a")
    tower = folder.rename(tmp_path / "b") / "eva_vit_g.pth"
    tower = tower.rename(tmp_path / "tower.pth")
    loaded = Seed2Tokenizer.from_pretrained(tmp_path / "b" / "seed_quantizer.pt", vision=tower, config=original.config)
    _same(loaded, original, images)


def test_tower_cached_by_the_original_programs_is_found(original: Seed2Tokenizer, tmp_path: Path,
                                                        images: torch.Tensor) -> None:
    folder = _released_folder(original, tmp_path / "a")
    cache = tmp_path / "torch_home" / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    (folder / "eva_vit_g.pth").rename(cache / "eva_vit_g.pth")
    _same(Seed2Tokenizer.from_pretrained(folder, config=original.config), original, images)


def test_config_beside_released_files_and_wrapped_checkpoint(original: Seed2Tokenizer, tmp_path: Path,
                                                             images: torch.Tensor) -> None:
    folder = _released_folder(original, tmp_path / "a")
    (folder / "config.json").write_text(json.dumps(original.config.to_dict()))
    state = torch.load(folder / "seed_quantizer.pt", weights_only=True)
    del state["Qformer.bert.embeddings.position_ids"]
    torch.save({"model": state, "epoch": 3}, folder / "seed_quantizer.pt")
    loaded = Seed2Tokenizer.from_pretrained(folder)
    _same(loaded, original, images)
    assert loaded.load_report is not None
    assert loaded.load_report.missing == ["Qformer.bert.embeddings.position_ids"]


def test_positions_are_resized_for_another_image_size(original: Seed2Tokenizer, tmp_path: Path) -> None:
    folder = _released_folder(original, tmp_path / "a")
    larger = Seed2Tokenizer.from_pretrained(folder, config=original.config, image_size=32)
    assert larger.visual_encoder.pos_embed.shape == (1, 17, 16)
    assert torch.equal(larger.visual_encoder.pos_embed[:, 0], original.visual_encoder.pos_embed[:, 0])
    assert larger.encode(torch.randn(2, 3, 32, 32)).shape == (2, 32)


def test_sizes_are_read_off_released_weights() -> None:
    with torch.device("meta"):
        plain = Seed2Tokenizer(Seed2Config()).state_dict()
        reverse = Seed2Tokenizer(Seed2Config(use_qformer_image=True, reverse_depth=4)).state_dict()
        file_tower = EvaVit(dataclasses.replace(Seed2Config().vit, depth=40)).state_dict()
    assert Seed2Config.infer(plain, "x") == Seed2Config()
    assert Seed2Config.infer(reverse, "x") == Seed2Config(use_qformer_image=True, reverse_depth=4)
    mixed = {**plain, **{f"visual_encoder.{name}": value for name, value in file_tower.items()},
             "reverse_tokens": torch.empty(1, 77, 768), "Reverse_Qformer.bert.encoder.layer.0.x": torch.empty(1)}
    assert Seed2Config.infer(mixed, "x") == Seed2Config()


def test_training_only_blocks_can_be_left_out(original: Seed2Tokenizer, tmp_path: Path, images: torch.Tensor) -> None:
    lean = dataclasses.replace(original.config, recon_s=False)
    loaded = Seed2Tokenizer.from_pretrained(_released_folder(original, tmp_path / "a"), config=lean)
    assert not any(name.startswith(("blocks.", "pos_embed.")) for name in loaded.state_dict())
    codes = original.encode(images)
    assert torch.equal(loaded.encode(images), codes) and torch.equal(loaded.decode(codes), original.decode(codes))
    with pytest.raises(ConfigError, match="recon_s=False"):
        loaded.rebuild_queries(torch.zeros(1, 32, 24))
    loaded.save_pretrained(tmp_path / "lean")
    assert Seed2Tokenizer.from_pretrained(tmp_path / "lean").config == lean


def test_small_widths_need_a_config(original: Seed2Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="number of attention heads.*config.json"):
        Seed2Tokenizer.from_pretrained(_released_folder(original, tmp_path / "a"))


def test_missing_vision_tower_says_where_to_get_it(original: Seed2Tokenizer, tmp_path: Path) -> None:
    folder = _released_folder(original, tmp_path / "a")
    (folder / "eva_vit_g.pth").unlink()
    with pytest.raises(CheckpointError, match=r"seed_quantizer\.pt: the vision tower .*eva_vit_g\.pth.*vision=FILE"):
        Seed2Tokenizer.from_pretrained(folder, config=original.config)
    with pytest.raises(CheckpointError, match=r"absent\.pth: there is no such vision-tower file"):
        Seed2Tokenizer.from_pretrained(folder, vision=tmp_path / "absent.pth", config=original.config)


def test_missing_tensors_are_named(original: Seed2Tokenizer, tmp_path: Path) -> None:
    folder = _released_folder(original, tmp_path / "a")
    state = torch.load(folder / "seed_quantizer.pt", weights_only=True)
    lost = {name: value for name, value in state.items() if name != "encode_task_layer.2.bias"}
    torch.save(lost, folder / "seed_quantizer.pt")
    with pytest.raises(CheckpointError, match="1 tensors are missing from the file: 'encode_task_layer.2.bias'"):
        Seed2Tokenizer.from_pretrained(folder, config=original.config)
    torch.save(state, folder / "seed_quantizer.pt")
    tower = torch.load(folder / "eva_vit_g.pth", weights_only=True)
    del tower["blocks.1.attn.q_bias"]
    torch.save(tower, folder / "eva_vit_g.pth")
    with pytest.raises(CheckpointError, match=r"eva_vit_g\.pth: 1 tensors are missing.*blocks\.1\.attn\.q_bias"):
        Seed2Tokenizer.from_pretrained(folder, config=original.config)


def _in_hub_cache(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Move a folder into the hub client's cache and give its name there."""
    from huggingface_hub import constants

    place = folder.parent / "cache" / f"models--{name.replace('/', '--')}"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("0" * 40)
    (place / "snapshots").mkdir()
    folder.rename(place / "snapshots" / ("0" * 40))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder.parent / "cache"))
    return name


@pytest.mark.parametrize("where", ["folder", "hub"])
@pytest.mark.parametrize("ending", ["pt", "safetensors"])
def test_what_nobody_listed_is_left_out_with_a_warning(
    original: Seed2Tokenizer, tmp_path: Path, images: torch.Tensor, monkeypatch: pytest.MonkeyPatch, ending: str,
    where: str,
) -> None:
    """146 further names like the released file's, of which nobody here knows a single one."""
    folder = _released_folder(original, tmp_path / "a")
    state = torch.load(folder / "seed_quantizer.pt", weights_only=True)
    for name in _extra_keys(original.config):
        state[f"another_branch.{name}"] = state.pop(name)
    tower = torch.load(folder / "eva_vit_g.pth", weights_only=True) | {"odd_one": torch.zeros(2)}
    for tensors, file in ((state, f"seed_quantizer.{ending}"), (tower, "eva_vit_g.pth")):
        (torch.save if file.endswith(("t", "pth")) else save_state_dict)(tensors, folder / file)
    if ending == "safetensors":
        (folder / "seed_quantizer.pt").unlink()
    source = _in_hub_cache(folder, "owner/tokenizer", monkeypatch) if where == "hub" else folder
    with pytest.warns(SeedWarning) as said:
        loaded = Seed2Tokenizer.from_pretrained(source, config=original.config)
    _same(loaded, original, images)
    told = [str(warning.message) for warning in said if warning.category is SeedWarning]
    assert len(told) == 2 and f"seed_quantizer.{ending}: 146 tensors that the model does not know were left out: " \
        "another_branch (146)." in told[0]
    assert "1 tensor that the model does not know was left out: 'odd_one'" in told[1]
    assert loaded.load_report is not None and len(loaded.load_report.unlisted) == 147


@pytest.mark.parametrize("ending", ["pt", "safetensors"])
def test_a_needed_tensor_of_another_shape_is_refused(original: Seed2Tokenizer, tmp_path: Path, ending: str) -> None:
    folder = _released_folder(original, tmp_path / "a")
    state = torch.load(folder / "seed_quantizer.pt", weights_only=True)
    (folder / "seed_quantizer.pt").unlink()
    state["encode_task_layer.2.bias"] = torch.zeros(99)
    (torch.save if ending == "pt" else save_state_dict)(state, folder / f"seed_quantizer.{ending}")
    with pytest.raises(CheckpointError, match=r"'encode_task_layer\.2\.bias': the file has \(99,\), the model needs"):
        Seed2Tokenizer.from_pretrained(folder, config=original.config)


@pytest.mark.parametrize("form", ["ours", "released"])
def test_weights_of_the_files_precision_are_the_mapped_file(original: Seed2Tokenizer, tmp_path: Path,
                                                            images: torch.Tensor, form: str) -> None:
    """And changing them, or writing the folder anew, changes neither the other."""
    original.save_pretrained(tmp_path / "ours")
    folder = tmp_path / "ours" if form == "ours" else _released_folder(original, tmp_path / "released")
    loaded = Seed2Tokenizer.from_pretrained(folder, config=original.config)
    names = {file.name for file in folder.iterdir() if file.suffix != ".json"}
    mapped = {Path(line.split(maxsplit=5)[5].strip()).name for line in Path("/proc/self/maps").read_text().splitlines()
              if str(folder) in line}
    assert names <= mapped, "the files are not mapped"
    with torch.no_grad():
        loaded.query_tokens += 1
    assert torch.equal(Seed2Tokenizer.from_pretrained(folder, config=original.config).query_tokens,
                       original.query_tokens)
    with torch.no_grad():
        loaded.query_tokens.copy_(original.query_tokens)
    loaded.save_pretrained(folder)
    _same(loaded, original, images)


LOADS = """
import gc, sys, threading, time
from pathlib import Path
import torch
from seed_multimodal.tokenizers.seed2 import Seed2Tokenizer

def anonymous():
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024

Seed2Tokenizer.from_pretrained(sys.argv[1])  # so that all modules are imported
gc.collect()
before, peak, done = anonymous(), 0, threading.Event()

def watch():
    global peak
    while not done.is_set():
        peak = max(peak, anonymous())
        time.sleep(0.001)

watching = threading.Thread(target=watch)
watching.start()
model = Seed2Tokenizer.from_pretrained(sys.argv[2], dtype=getattr(torch, sys.argv[3]))
done.set()
watching.join()
print(max(peak, anonymous()) - before)
"""


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "share"), [("float32", 0.1), ("float16", 0.6)])
def test_loading_takes_no_memory_beside_the_weights(original: Seed2Tokenizer, tmp_path: Path, dtype: str,
                                                    share: float) -> None:
    """The released layout of 260 MB in float32: nothing of it is copied, or each tensor once into half the size."""
    original.save_pretrained(tmp_path / "small")
    vit = dataclasses.replace(original.config.vit, width=512, mlp_width=2048, heads=8, depth=20)
    with torch.device("meta"):
        shapes = Seed2Tokenizer(dataclasses.replace(original.config, vit=vit)).state_dict()
    state = {name: torch.zeros(value.shape, dtype=value.dtype) for name, value in shapes.items()}
    folder = tmp_path / "large"
    folder.mkdir()
    tower = {name.removeprefix("visual_encoder."): state.pop(name) for name in list(state) if "visual_encoder" in name}
    torch.save(state, folder / "seed_quantizer.pt")
    torch.save(tower, folder / "eva_vit_g.pth")
    (folder / "config.json").write_text(json.dumps(dataclasses.replace(original.config, vit=vit).to_dict()))
    size = (folder / "eva_vit_g.pth").stat().st_size
    assert size > 200e6
    run = subprocess.run([sys.executable, "-c", LOADS, str(tmp_path / "small"), str(folder), dtype], text=True,
                         capture_output=True, check=True)
    (folder / "eva_vit_g.pth").unlink()
    assert int(run.stdout) < share * size + 8e6, f"{int(run.stdout) / size:.2f} of the file"


def test_another_size_is_refused(original: Seed2Tokenizer, tmp_path: Path) -> None:
    folder = _released_folder(original, tmp_path / "a")
    other = dataclasses.replace(original.config, codebook_size=51)
    with pytest.raises(CheckpointError, match=r"'quantize\.embedding\.weight': the file has \(50, 6\)"):
        Seed2Tokenizer.from_pretrained(folder, config=other)


@pytest.mark.parametrize(("part", "key", "value", "said"), [
    (None, "codebook_size", "50", "codebook_size must be a whole number, not '50'"),
    (None, "codebook_dim", 6.0, "codebook_dim must be a whole number, not 6.0"),
    (None, "recon_s", "no", "recon_s must be true or false, not 'no'"),
    ("vit", "patch_size", 0, "vit: patch_size must be at least 1, not 0"),
    ("vit", "depth", True, "vit: depth must be a whole number, not True"),
    ("qformer", "depth", None, "qformer: depth must be a whole number, not None"),
    ("qformer", "heads", -2, "qformer: heads must be at least 1, not -2"),
    ("qformer", "dropout", "0.1", "qformer: dropout must be a number, not '0.1'")])
def test_sizes_that_are_none_are_refused_by_name(original: Seed2Tokenizer, tmp_path: Path, part: str | None, key: str,
                                                 value: object, said: str) -> None:
    sizes = original.config.to_dict()
    (sizes if part is None else sizes[part])[key] = value
    (tmp_path / "config.json").write_text(json.dumps(sizes))
    with pytest.raises(ConfigError, match=re.escape(said)) as caught:
        Seed2Config.read(tmp_path / "config.json")
    assert "config.json" in str(caught.value)


def test_a_seed1_tokenizer_is_called_so(original: Seed2Tokenizer, tmp_path: Path) -> None:
    state = original.state_dict() | {"distill_text_proj.weight": torch.zeros(8, 24)}
    state.pop("distill_image_proj.weight")
    torch.save(state, tmp_path / "seed_tokenizer.pth")
    with pytest.raises(CheckpointError, match=r"seed_tokenizer\.pth: this is a SEED-1 tokenizer .* Seed1Tokenizer"):
        Seed2Tokenizer.from_pretrained(tmp_path / "seed_tokenizer.pth")


def test_other_models_are_refused(original: Seed2Tokenizer, tmp_path: Path) -> None:
    llama = tmp_path / "pytorch_model.bin"
    torch.save({"model.embed_tokens.weight": torch.zeros(4, 4)}, llama)
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: not a complete SEED-2 tokenizer.*embed_tokens"):
        Seed2Tokenizer.from_pretrained(llama)
    folder = _released_folder(original, tmp_path / "a")
    with pytest.raises(CheckpointError, match="this is the vision tower alone"):
        Seed2Tokenizer.from_pretrained(folder / "eva_vit_g.pth")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: not an EVA vision tower"):
        Seed2Tokenizer.from_pretrained(folder, vision=llama, config=original.config)


def test_damaged_files_are_refused(original: Seed2Tokenizer, tmp_path: Path) -> None:
    folder = _released_folder(original, tmp_path / "a")
    file = folder / "seed_quantizer.pt"
    whole = file.read_bytes()
    for content in (b"", whole[: len(whole) // 2], b"not a checkpoint at all"):
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"seed_quantizer\.pt"):
            Seed2Tokenizer.from_pretrained(folder, config=original.config)
    original.save_pretrained(tmp_path / "b")
    weights = tmp_path / "b" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: not a complete safetensors file"):
        Seed2Tokenizer.from_pretrained(tmp_path / "b")
    (tmp_path / "b" / "config.json").write_text("{half")
    with pytest.raises((CheckpointError, ConfigError), match=r"config\.json: not valid json"):
        Seed2Tokenizer.from_pretrained(tmp_path / "b")


class _Payload:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return Path.touch, (self.marker,)


def test_unsafe_pickles_are_refused_and_never_run(original: Seed2Tokenizer, tmp_path: Path) -> None:
    folder, marker = _released_folder(original, tmp_path / "a"), tmp_path / "ran"
    state = torch.load(folder / "seed_quantizer.pt", weights_only=True)
    torch.save(state | {"temp": _Payload(marker)}, folder / "seed_quantizer.pt")
    with pytest.raises(CheckpointError, match=r"seed_quantizer\.pt: refused.*unsafe"):
        Seed2Tokenizer.from_pretrained(folder, config=original.config)
    (folder / "seed_quantizer.pt").write_bytes(pickle.dumps(_Payload(marker)))
    with pytest.raises(CheckpointError, match=r"seed_quantizer\.pt"):
        Seed2Tokenizer.from_pretrained(folder, config=original.config)
    assert not marker.exists()


def test_nothing_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match=r"no such tokenizer; put seed_quantizer\.pt .* into a folder "
                                               r"such as pretrained/seed_tokenizer and give its path\."):
        Seed2Tokenizer.from_pretrained(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="holds no tokenizer weights"):
        Seed2Tokenizer.from_pretrained(tmp_path / "empty")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    with pytest.raises(CheckpointError, match="no-such-owner/tokenizer: neither a local folder nor reachable"):
        Seed2Tokenizer.from_pretrained("no-such-owner/tokenizer")
    with pytest.raises(CheckpointError, match="there is no such tokenizer"):
        Seed2Tokenizer.from_pretrained("empty/tokenizer")  # the parent is a local folder: not a hub id


def test_description_names_every_group(original: Seed2Tokenizer, tmp_path: Path) -> None:
    loaded = Seed2Tokenizer.from_pretrained(_released_folder(original, tmp_path / "a"), config=original.config)
    assert loaded.load_report is not None
    line = loaded.load_report.describe()
    assert "blocks_text (48)" in line and "visual_encoder (13)" in line and "\n" not in line
