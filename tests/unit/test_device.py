"""The choice of device and dtype, its log line, threads of small models, flags of all programs."""

from __future__ import annotations

import argparse
import contextlib
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from repository import ROOT

from seed_multimodal import device as device_module
from seed_multimodal.device import (
    FP16_AS_ORIGINAL,
    FP16_WITH_8BIT,
    choose_device,
    choose_for_images,
    peak_tflops,
    peak_tflops_by_name,
)
from seed_multimodal.errors import ConfigError


@pytest.mark.parametrize(
    ("device", "dtype", "sentence"),
    [
        (
            "auto",
            "auto",
            r"Running on cpu in float32 \(no GPU found; float32 is the safe precision on cpu\)\.",
        ),
        ("cpu", "auto", r"Running on cpu in float32 \(float32 is the safe precision on cpu\)\."),
        ("auto", torch.float16, r"Running on cpu in float16 \(no GPU found\)\."),
        ("cpu", "bf16", r"Running on cpu in bfloat16\."),
    ],
)
def test_choose_device_logs_the_reasons(device, dtype, sentence, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    printed: list[str] = []
    choose_device(device, dtype, log=printed.append)  # type: ignore[arg-type]
    assert len(printed) == 1 and re.fullmatch(sentence, printed[0]), printed


@pytest.fixture
def gpu(monkeypatch) -> None:
    """A GPU with bfloat16 is reported, but not used."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)


def test_choose_for_images_on_a_gpu(gpu: None):
    printed: list[str] = []
    language = choose_device("auto", "auto", printed.append)
    images = choose_for_images(language.device, "auto", language, printed.append)
    assert (language.dtype, images.dtype) == (torch.bfloat16, torch.float16)
    assert printed[1].startswith(
        "Image encoder and decoder run on cuda:0 in float16 (float16 as in the original"
    )
    packed = choose_device("cuda:0", "auto", printed.append, fp16=FP16_WITH_8BIT)
    assert (
        packed.dtype == torch.float16
        and printed[2] == "Running on cuda:0 in float16 (float16 with 8-bit weights)."
    )
    del printed[:]
    for dtype in ("float32", "bf16", torch.float16):  # for both, logged once
        runtime = choose_device("cuda", dtype, printed.append, fp16=FP16_AS_ORIGINAL)
        assert choose_for_images("cuda", dtype, runtime, printed.append) == runtime
    assert (
        len(printed) == 3
        and choose_device("cpu", "auto", None, fp16=FP16_AS_ORIGINAL).dtype == torch.float32
    )


@pytest.mark.parametrize(
    ("device", "resolved"), [("auto", "cuda:0"), ("cuda", "cuda:0"), ("cuda:0", "cuda:0")]
)
def test_choose_device_fills_in_the_index(gpu: None, device, resolved):
    assert choose_device(device, log=None).device == torch.device(resolved)


def test_choose_device_fills_in_the_index_of_mps(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert (
        choose_device("auto", log=None).device
        == choose_device("mps", log=None).device
        == torch.device("mps:0")
    )


def test_choose_device_with_an_unknown_name(gpu: None):
    for device in ("meta", "xla", "cuda:1"):
        with pytest.raises(ConfigError, match="Unknown device|this machine has 1 CUDA devices"):
            choose_device(device)
    with pytest.raises(ConfigError, match="Unknown dtype"):
        choose_device("cpu", "float8")


def test_dtype_of_each_image_encoder_on_a_gpu(gpu: None, tiny_folder: Path, monkeypatch):
    """Recorded where the models would be loaded."""
    from seed_multimodal.compat import seed_llama as original
    from seed_multimodal.models.seed import pipeline
    from seed_multimodal.pipelines import code_system
    from seed_multimodal.pipelines.images import open_images

    dtypes: list[tuple[str, torch.dtype]] = []

    class Loaded(Exception):
        pass

    def stop(*args: object, **options: object) -> None:
        dtypes.append((str(options["device"]), options["dtype"]))
        raise Loaded

    monkeypatch.setattr(pipeline.Seed2Tokenizer, "from_pretrained", stop)
    monkeypatch.setattr(original.Seed1Tokenizer, "from_pretrained", stop)

    def stop_language_model(*args: object, **options: object) -> None:
        dtypes.append((str(options["quantization"]), options["dtype"]))
        raise Loaded

    def images_first(*args: object) -> None:
        with contextlib.suppress(Loaded):
            load_images(*args)

    load_images: Callable[..., object] = pipeline.load_images
    monkeypatch.setattr(pipeline, "load_images", images_first)
    monkeypatch.setattr(code_system, "load_llm_or_adapter", stop_language_model)
    tokenizer_folder = tiny_folder / "seed_tokenizer"
    for load in (
        lambda: pipeline.SeedLlama.from_pretrained(tiny_folder, log=None),
        lambda: pipeline.SeedLlama.from_pretrained(tiny_folder, quantization="8bit", log=None),
        lambda: pipeline.SeedLlama.from_pretrained(
            tiny_folder, dtype="bf16", quantization="8bit", log=None
        ),
        lambda: open_images(tiny_folder),
        lambda: original.SeedLlamaTokenizer.from_pretrained(tokenizer_folder),
        lambda: original.SeedLlamaTokenizer.from_pretrained(tokenizer_folder, fp16=False),
        lambda: original.Seed1.from_pretrained(tokenizer_folder),
    ):
        with contextlib.suppress(Loaded):
            load()
    half = torch.float16
    full = torch.float32
    brain = torch.bfloat16
    assert dtypes == [
        ("cuda:0", half),
        ("None", brain),
        ("cuda:0", half),
        ("8bit", half),
        ("cuda:0", brain),
        ("8bit", brain),
        ("cuda:0", half),
        ("cuda:0", half),
        ("cuda:0", full),
        ("cuda:0", half),
    ]


def test_dtype_and_quantization_override_yaml_files(tiny_folder: Path, tmp_path):
    pytest.importorskip("bitsandbytes")
    from seed_multimodal.compat.seed_llama_yaml import system_from_configs

    (tmp_path / "words.yaml").write_text(
        "_target_: models.seed_llama_tokenizer.SeedLlamaTokenizer.from_pretrained\n"
        f"pretrained_model_name_or_path: {tiny_folder}/seed_tokenizer\nfp16: True\n"
        "load_diffusion: True\n"
    )
    (tmp_path / "llm.yaml").write_text(
        "_target_: transformers.LlamaForCausalLM.from_pretrained\n"
        f"pretrained_model_name_or_path: {tiny_folder}/seed_llama\nload_in_8bit: True\n"
    )
    (tmp_path / "transform.yaml").write_text(
        "_target_: models.transforms.get_transform\nimage_size: 32\n"
    )
    files = {
        "model": tmp_path / "llm.yaml",
        "tokenizer": tmp_path / "words.yaml",
        "image_transform": tmp_path / "transform.yaml",
    }
    devices = {"llm_device": "cpu", "tokenizer_device": "cpu"}
    plain = system_from_configs(**files, **devices)
    assert plain.llm.model.layers[0].mlp.up_proj.weight.dtype == torch.int8
    assert plain.llm.model.embed_tokens.weight.dtype == plain.images.model.dtype == torch.float32
    other = system_from_configs(**files, **devices, dtype="bf16", quantization="4bit")
    assert other.llm.model.layers[0].mlp.up_proj.weight.dtype == torch.uint8
    assert other.llm.model.embed_tokens.weight.dtype == other.images.model.dtype == torch.bfloat16


def test_programs_with_a_model_have_the_same_flags(capsys, monkeypatch):
    from seed_multimodal.cli import evaluate
    from seed_multimodal.cli.main import main
    from seed_multimodal.compat import seed_llama_programs as seed
    from seed_multimodal.compat.seed_x_programs import SCRIPTS, seed_x_script
    from seed_nano import quickstart
    from seed_nano.report import __main__ as report

    def help_of(program: Callable[[list[str]], object], *flags: str) -> str:
        with pytest.raises(SystemExit) as ended:
            program([*flags, "--help"])
        assert ended.value.code == 0
        return " ".join(capsys.readouterr().out.split())

    monkeypatch.syspath_prepend(str(ROOT / "gradio_demo"))
    backend = __import__("seed_llama_flask").build_parser()
    answering = [help_of(main, name) for name in ("describe", "ask", "draw", "edit", "chat")]
    answering += [help_of(partial(seed.llama_script, size)) for size in ("8b", "14b")]
    answering += [
        help_of(program)
        for program in (
            seed.tokenizer_script,
            backend.parse_args,
            quickstart.main,
            report.main,
            *(
                partial(evaluate.eval_program, name, "")
                for name in ("eval_vqa.py", "eval_caption.py", "eval_caption_to_images.py")
            ),
        )
    ]
    answering += [help_of(partial(seed_x_script, name)) for name in SCRIPTS if SCRIPTS[name].model]
    drawing = [help_of(partial(seed_x_script, name)) for name in SCRIPTS if not SCRIPTS[name].model]
    drawing += [help_of(main, name) for name in ("tokenize", "reconstruct")] + [
        help_of(seed.recon_script),
        help_of(main, "eval", "tokenizer"),
    ]
    for text in answering:
        assert "--quantization {8bit,4bit,int8,int4} " in text, text[:200]
    for text in answering + drawing:
        assert "--dtype DTYPE auto, float32, bfloat16 or float16 (default: " in text, text[:200]


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA A10G", None),
        ("NVIDIA H200 MIG 1g.18gb", None),
        ("AMD Instinct MI300X", None),
    ],
)
def test_peak_of(name, peak):
    assert (
        peak_tflops_by_name(name) == peak
        and peak_tflops(torch.device("cpu"), torch.bfloat16) is None
    )


def test_load_images_limits_threads_of_small_models(monkeypatch):
    from seed_multimodal.cli.common import load_images

    threads = torch.get_num_threads()
    monkeypatch.setattr(device_module, "_DEFAULT_THREADS", 2)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    try:
        for variable, expected in (("OMP_NUM_THREADS", 2), ("UNSET", 1)):
            torch.set_num_threads(2)
            with monkeypatch.context() as context:
                context.setenv(variable, "2")
                load_images(
                    argparse.Namespace(model="nano", device="cpu", dtype="auto", debug=False)
                )
            assert torch.get_num_threads() == expected, variable
    finally:
        torch.set_num_threads(threads)
