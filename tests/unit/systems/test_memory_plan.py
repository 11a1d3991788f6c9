"""The memory plan: sums by hand, the released sizes, and the sizes of a folder against its loaded parts."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from seed_multimodal.device import Runtime
from seed_multimodal.errors import CheckpointError
from seed_multimodal.systems.memory_plan import GB, MemoryPlan, Part, Sizes, llm_sizes, plan_memory, read_sizes
from seed_multimodal.systems.seed_x import SeedX

CARD = Runtime(torch.device("cuda"), torch.float16)


def test_what_comes_and_goes_counts_once() -> None:
    plan = MemoryPlan((Part("a", "cuda", 5 * GB, GB), Part("b", "cuda", 3 * GB, stays=False),
                       Part("c", "cuda", 2 * GB, 4 * GB, stays=False), Part("d", "cuda:1", GB)))
    assert plan.most("cuda") == 11 * GB and plan.most("cuda:1") == GB and plan.most("cpu") == 0
    assert "Memory on cuda: 11.0 GB at most" in str(plan) and "only while it works" in str(plan)


def test_the_released_language_model_s_sizes() -> None:
    config = {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40,
              "vocab_size": 32330, "max_position_embeddings": 2048}
    assert llm_sizes(config) == (Sizes.llm_layers, Sizes.llm_rest, Sizes.cache)
    assert Sizes.llm_layers + Sizes.llm_rest == 13_019_243_520  # 13,019.2 M


@pytest.mark.parametrize(("quantization", "offload", "limit"), [
    (None, False, 48), ("8bit", True, 24), ("4bit", False, 24), ("4bit", True, 16)])
def test_the_released_model_fits(quantization: str | None, offload: bool, limit: float) -> None:
    assert plan_memory(Sizes(), CARD, CARD, CARD, quantization, offload).most("cuda") <= limit * GB


def test_parts_on_two_cards() -> None:
    other = Runtime(torch.device("cuda:1"), torch.float16)
    plan = plan_memory(Sizes(), CARD, other, other)
    assert {part.device for part in plan.parts} == {"cuda", "cuda:1"}
    assert plan.most("cuda:1") < 16 * GB < plan.most("cuda")


def test_sizes_of_a_folder_are_those_of_its_parts(tiny_x: SeedX) -> None:
    def count(*modules: torch.nn.Module) -> int:
        return sum(parameter.numel() for module in modules for parameter in module.parameters())

    sizes = read_sizes(tiny_x.spec)
    decoder = tiny_x.pictures.decoder
    assert sizes.llm_layers + sizes.llm_rest == count(tiny_x.llm)
    assert sizes.agent == count(tiny_x.agent) - count(tiny_x.llm) and sizes.tower == count(tiny_x.pictures.model)
    assert sizes.adapter == count(decoder.adapter) and sizes.vae == count(decoder.pipeline.vae)
    assert sizes.pixels == 16 * 16
    assert tiny_x.memory is not None and {part.device for part in tiny_x.memory.parts} == {"cpu"}


@pytest.mark.parametrize(("file", "text", "sentence"), [
    ("unet/config.json", "{}", "unet/config.json gives no sample_size"),
    ("unet/config.json", '{"sample_size": null}', "unet/config.json gives no sample_size"),
    ("vae/config.json", "{}", "vae/config.json no block_out_channels"),
    ("scheduler/scheduler_config.json", "{}", "scheduler_config.json: names no scheduler")])
def test_an_sdxl_without_its_sizes(tiny_x_folder: Path, tmp_path: Path, file: str, text: str, sentence: str) -> None:
    damaged = shutil.copytree(tiny_x_folder, tmp_path / "copy")
    (damaged / "sdxl" / file).write_text(text)
    with pytest.raises(CheckpointError, match=sentence):
        _ = SeedX.from_pretrained(damaged, device="cpu", log=None).pictures.decoder


def test_a_freed_unet_draws_the_same(tiny_x: SeedX) -> None:
    plain = tiny_x.reconstruct(torch.zeros(3, 3, dtype=torch.uint8).numpy(), seed=1)[0]
    decoder = tiny_x.pictures.decoder
    features = tiny_x.pictures.whole([plain])
    generator = torch.Generator().manual_seed(1)
    first = decoder.decode(features, generator=generator)[0]
    decoder.frees_unet = True
    try:
        again = decoder.decode(features, generator=torch.Generator().manual_seed(1))[0]
    finally:
        decoder.frees_unet = False
    assert first.tobytes() == again.tobytes()


def test_offloading_is_asked_for_at_loading(tiny_x_folder: Path) -> None:
    system = SeedX.from_pretrained(tiny_x_folder, device="cpu", offload=True, log=None)
    assert system.pictures.offload_encoder and system.pictures.offload_decoder
    assert not any(part.stays for part in system.memory.parts if part.name != "resamplers")  # type: ignore[union-attr]
    assert system.draw("a fish").size == (16, 16)
