"""Torch files: tensors as they were saved, and files that are refused by name, never executed."""

import io
import os
import zipfile
from functools import partial

import pytest
import torch
from torch import Tensor

from seed_multimodal.errors import CheckpointError
from seed_multimodal.torch_files import read_torch_file

FORMATS = {"zip": True, "legacy": False}  # of torch since 1.6, and before


def content() -> dict:
    """A checkpoint with views, shared and odd tensors, and values that are no tensors."""
    weight = torch.arange(12.0).view(3, 4)
    state = {
        "weight": weight,
        "tied": weight,
        "row": weight[1],
        "transposed": weight.t(),
        "expanded": torch.ones(1).expand(5),
        "empty": torch.zeros(0, 3),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "bfloat16": torch.randn(5).bfloat16(),
        "modules": 7,
    }
    settings = {"lr": 1e-3, "dtype": torch.float16, "device": torch.device("cpu"), 0: {1, 2}}
    optimizer = {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"params": [0]}]}
    return {"model": state, "args": settings, "optimizer": optimizer, "size": torch.Size([2])}


@pytest.mark.parametrize("mapped", [True, False], ids=["mapped", "copied"])
@pytest.mark.parametrize("zipped", FORMATS.values(), ids=FORMATS)
def test_read_torch_file_has_the_saved_tensors(zipped, mapped, tmp_path):
    # Of any dtype and layout, and without the values that are no tensors.
    saved = content()
    file = tmp_path / "a.pth"
    torch.save(saved, file, _use_new_zipfile_serialization=zipped)
    before = file.read_bytes()
    tensors = read_torch_file(file, mapped)
    for name, value in saved["model"].items():
        if isinstance(value, Tensor):
            assert tensors[name].dtype == value.dtype and tensors[name].stride() == value.stride()
            assert torch.equal(tensors[name], value), name
    assert "modules" not in tensors
    # Tied weights stay tied, and writing to them does not reach the file.
    tensors["weight"].fill_(-1)
    assert tensors["tied"][0, 0] == -1 and tensors["row"].tolist() == [-1] * 4
    assert file.read_bytes() == before


class Call:
    """An object whose pickle calls a function, which writes the file `trace`."""

    def __reduce__(self) -> tuple:
        return os.system, ("touch trace",)


def saved(value, zipped: bool = True) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


def scripted() -> bytes:
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), buffer)
    return buffer.getvalue()


def beyond_the_file() -> bytes:
    """A tensor of a million numbers, of which four are in the archive."""
    complete = zipfile.ZipFile(io.BytesIO(saved(torch.ones(1_000_000))))
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in complete.namelist():
            archive.writestr(name, complete.read(name)[: 16 if name.endswith("data/0") else None])
    return buffer.getvalue()


TENSORS = {"a": torch.ones(100)}
UNSAFE = {name: saved({**TENSORS, "b": Call()}, zipped) for name, zipped in FORMATS.items()}
REFUSED = {
    "empty": b"",
    "html": b"<html>",
    "torchscript": scripted(),
    "truncated zip": saved(TENSORS)[:700],
    "truncated legacy": saved(TENSORS, zipped=False)[:500],
    "beyond the file": beyond_the_file(),
    **UNSAFE,
}
READERS = {
    "copied": read_torch_file,
    "mapped": partial(read_torch_file, mapped=True),
    "placeholders": partial(read_torch_file, placeholders=True),
}


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch's, of protocols and archives
@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", REFUSED)
def test_read_torch_file_refuses(name, reader, tmp_path, monkeypatch):
    # A downloaded file must not run code, nor be read beyond its end.
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "a.bin"
    file.write_bytes(REFUSED[name])
    try:
        READERS[reader](file)
    except CheckpointError as error:
        assert str(error).startswith(f"{file}: ") and "\n" not in str(error)
    else:
        # A placeholder was built instead of calling the function.
        assert reader == "placeholders" and name in UNSAFE
    assert not (tmp_path / "trace").exists()


class Callback:
    """Of a training program: its state is saved with the weights."""

    def __init__(self):
        self.monitor = "loss"


def test_read_torch_file_replaces_unknown_classes(tmp_path):
    # Stable Diffusion's original checkpoint holds objects of a program that is not installed.
    file = tmp_path / "a.ckpt"
    file.write_bytes(saved({"state_dict": TENSORS, "callbacks": {Callback: Callback()}}))
    with pytest.raises(CheckpointError, match=r"a\.ckpt"):
        read_torch_file(file)
    assert torch.equal(read_torch_file(file, placeholders=True)["a"], TENSORS["a"])


# ---- other libraries


def load_llm(folder):
    from transformers import LlamaConfig

    from seed_multimodal.language.llm import load_llm

    LlamaConfig(hidden_size=8, num_attention_heads=2, vocab_size=8).save_pretrained(folder)
    load_llm(folder)


def load_clip(folder):
    from transformers import CLIPVisionConfig

    from seed_multimodal.nn.vision.clip import load_clip_vision

    CLIPVisionConfig(hidden_size=8, num_attention_heads=2).save_pretrained(folder)
    load_clip_vision(folder)


def load_hub_vision(folder):
    from transformers import ViTConfig

    from seed_multimodal.images.transforms import ImageTransform
    from seed_multimodal.nn.vision.hub import HubVisionConfig

    network = ViTConfig(hidden_size=8, num_attention_heads=2)
    network.save_pretrained(folder)
    HubVisionConfig(
        network=network.to_dict(), preprocessing=ImageTransform(image_size=224)
    ).read_weights(str(folder))


def load_lora(folder):
    from peft import LoraConfig
    from tiny.language import random_llm

    from seed_multimodal.compat.lora import seed_x_lora

    (folder / "pytorch_model.bin").rename(folder / "adapter_model.bin")
    LoraConfig(target_modules=["q_proj"]).save_pretrained(folder)
    seed_x_lora(random_llm("llama", 8), model_id=str(folder))


@pytest.mark.parametrize("load", [load_llm, load_clip, load_hub_vision, load_lora])
def test_loaders_of_other_libraries_refuse_an_unsafe_file(load, tmp_path, monkeypatch):
    # transformers and PEFT read torch files themselves, without our reader's checks.
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "pytorch_model.bin").write_bytes(UNSAFE["zip"])
    with pytest.raises(CheckpointError, match=str(folder)):
        load(folder)
    assert not (tmp_path / "trace").exists()
