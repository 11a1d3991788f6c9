"""The choice of device and dtype, its log line, threads of small models."""

import argparse
import contextlib

import pytest
import torch
from yaml_tables import read_tables

from seed_multimodal import MultimodalSystem, SeedLlamaTokenizer
from seed_multimodal import device as device_module
from seed_multimodal.compat.seed_llama import Seed1
from seed_multimodal.device import (
    choose_device,
    peak_tflops,
    peak_tflops_by_name,
)
from seed_multimodal.errors import ConfigError


def report_devices(monkeypatch, cuda: bool, bf16: bool, mps: bool):
    """torch reports these devices, which are not used."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: int(cuda))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: bf16)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)


TABLES = read_tables(__file__)
BRAIN = torch.bfloat16
FULL = torch.float32


@pytest.mark.parametrize("row", TABLES["choices"].values(), ids=TABLES["choices"])
def test_choose_device(row, monkeypatch):
    report_devices(monkeypatch, *row["machine"])
    device, dtype = row["asked"]
    logged = []
    runtime = choose_device(
        device, getattr(torch, dtype, dtype), logged.append, fp16=row["reason"], notice="A notice."
    )
    # Loaded tensors have an index, so that `cuda` would never compare equal.
    assert runtime.device == torch.device(row["device"])
    assert runtime.dtype == getattr(torch, row["dtype"])
    (line,) = logged
    assert str(runtime) in line and line.endswith(". A notice.")
    # A choice has its reasons in the log, a request none.
    assert ("(" in line) == ("auto" in row["asked"])


@pytest.mark.parametrize("device, dtype", TABLES["unknown"])
def test_choose_device_of_an_unknown_name(monkeypatch, device, dtype):
    # Weights on "meta" would be dropped without an error.
    report_devices(monkeypatch, *TABLES["machines"]["GPU"])
    with pytest.raises(ConfigError, match=device if device != "cpu" else dtype):
        choose_device(device, getattr(torch, dtype, dtype))


# Class, folder and options → dtypes of the language model, if any, and of the images.
LOADED = {
    "system": (MultimodalSystem, "", {}, ["bfloat16", "float16"]),
    "8 bit": (MultimodalSystem, "", {"quantization": "8bit"}, ["float16"]),
    "8 bit, bf16": (MultimodalSystem, "", {"quantization": "8bit", "dtype": "bf16"}, ["bfloat16"]),
    "SEED-2": (SeedLlamaTokenizer, "seed_tokenizer", {}, ["float16"]),
    "SEED-2, fp16=False": (SeedLlamaTokenizer, "seed_tokenizer", {"fp16": False}, ["float32"]),
    "SEED-1": (Seed1, "seed_tokenizer", {}, ["float16"]),
}


@pytest.mark.parametrize("system_class, folder, options, dtypes", LOADED.values(), ids=LOADED)
def test_dtypes_on_a_gpu(system_class, folder, options, dtypes, tiny_folder, monkeypatch, capsys):
    # Those of the originals. They are logged before weights are loaded, which fails here.
    report_devices(monkeypatch, *TABLES["machines"]["GPU"])
    with contextlib.suppress(Exception):
        system_class.from_pretrained(tiny_folder / folder, **options)
    lines = capsys.readouterr().out.splitlines()
    chosen = [line.split(" in ")[1].split()[0].rstrip(".") for line in lines if "cuda:0" in line]
    assert chosen == dtypes


def test_dtype_and_quantization_override_yaml_files(tiny_folder, tmp_path):
    pytest.importorskip("bitsandbytes")
    from seed_multimodal.compat.part_files import seed_llama_of_files

    texts = {
        "tokenizer": "_target_: models.seed_llama_tokenizer.SeedLlamaTokenizer.from_pretrained\n"
        f"pretrained_model_name_or_path: {tiny_folder}/seed_tokenizer\nfp16: True\n"
        "load_diffusion: True\n",
        "llm": "_target_: transformers.LlamaForCausalLM.from_pretrained\n"
        f"pretrained_model_name_or_path: {tiny_folder}/seed_llama\nload_in_8bit: True\n",
        "image_transform": "_target_: models.transforms.get_transform\nimage_size: 32\n",
    }
    files = {}
    for name, text in texts.items():
        files[name] = tmp_path / f"{name}.yaml"
        files[name].write_text(text)

    def dtypes_of(**options: str) -> list[torch.dtype]:
        """Of a quantized layer, the embedding and the images."""
        config, loading = seed_llama_of_files(files, **options)
        system = MultimodalSystem.from_pretrained(config, device="cpu", **loading)
        language = system.llm.model
        layer = language.layers[0].mlp.up_proj
        return [layer.weight.dtype, language.embed_tokens.weight.dtype, system.images.model.dtype]

    assert dtypes_of() == [torch.int8, FULL, FULL]
    assert dtypes_of(dtype="bf16", quantization="4bit") == [torch.uint8, BRAIN, BRAIN]


@pytest.mark.parametrize("name, peak", TABLES["peaks"].items())
def test_peak_tflops_by_name(name, peak):
    # A wrong peak makes the logged utilization of a training wrong.
    assert peak_tflops_by_name(name) == peak
    assert peak_tflops(torch.device("cpu"), BRAIN) is None


@pytest.mark.parametrize("variable, n_threads", [("OMP_NUM_THREADS", 2), ("UNSET", 1)])
def test_load_images_limits_threads_of_small_models(monkeypatch, variable, n_threads):
    # A number that the user has set is kept.
    from seed_multimodal.cli.common import load_images

    before = torch.get_num_threads()
    monkeypatch.setattr(device_module, "_DEFAULT_THREADS", 2)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, "2")
    try:
        torch.set_num_threads(2)
        load_images(argparse.Namespace(model="nano", device="cpu", dtype="auto", debug=False))
        assert torch.get_num_threads() == n_threads
    finally:
        torch.set_num_threads(before)
