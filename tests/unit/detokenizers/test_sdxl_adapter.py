"""SDXLAdapter: released sizes and keys, stages, what is trained, files of checkpoints and their refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_sdxl
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from seed_multimodal.detokenizers.sdxl_adapter import SDXLAdapter, size_ids, widened
from seed_multimodal.detokenizers.sdxl_resampler import ResamplerSizes, ResamplerXLV2
from seed_multimodal.errors import CheckpointError, ConfigError, SeedWarning

# stabilityai/stable-diffusion-xl-base-1.0, unet/config.json: what differs from diffusers' defaults.
SDXL_UNET = {
    "sample_size": 128, "in_channels": 4, "out_channels": 4, "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), "layers_per_block": 2,
    "cross_attention_dim": 2048, "attention_head_dim": (5, 10, 20), "use_linear_projection": True,
    "transformer_layers_per_block": (1, 2, 10), "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_sdxl.sdxl_folder(tmp_path_factory.mktemp("sdxl") / "sdxl", whole=False)


@pytest.fixture
def inputs() -> dict[str, Tensor]:
    make = torch.Generator().manual_seed(0)
    return {"noisy_latents": torch.randn(2, 4, 8, 8, generator=make), "timesteps": torch.tensor([7, 900]),
            "image_embeds": torch.randn(2, 9, tiny_sdxl.WIDTH, generator=make), "time_ids": size_ids((16, 16), count=2)}


@pytest.fixture(scope="module")
def released() -> SDXLAdapter:
    """The released first stage, without memory."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        return SDXLAdapter(UNet2DConditionModel(**SDXL_UNET), ResamplerXLV2())


# ---- released sizes


@pytest.mark.slow
def test_released_keys_and_counts(released: SDXLAdapter) -> None:
    state = released.state_dict()
    assert len(state) == 1680 + 62
    assert sum(name.startswith("unet.") for name in state) == 1680
    assert sum(value.numel() for value in released.resampler.parameters()) == 61_245_696
    assert sum(value.numel() for value in released.unet.parameters()) == 2_567_463_684
    shapes = {name: list(value.shape) for name, value in state.items()}
    assert shapes["resampler.latents"] == [1, 64, 1024] and shapes["resampler.proj_in.weight"] == [1024, 4096]
    assert shapes["resampler.layers.3.0.to_kv.weight"] == [2048, 1024]
    assert shapes["resampler.layers.0.1.3.weight"] == [1024, 4096]
    assert shapes["resampler.unet_attnpool.positional_embedding"] == [65, 1024]
    assert shapes["resampler.unet_attnpool.c_proj.weight"] == [1280, 1024]
    assert shapes["resampler.unet_proj_2.weight"] == [1280, 1024]
    assert shapes["unet.conv_in.weight"] == [320, 4, 3, 3]


@pytest.mark.slow
def test_released_keys_and_values_are_trained(released: SDXLAdapter) -> None:
    released.set_trainable("key_value")
    chosen = [name for name, value in released.unet.named_parameters() if value.requires_grad]
    assert len(chosen) == 280 and all(name.endswith(("to_k.weight", "to_v.weight")) for name in chosen)
    assert sum(released.unet.get_parameter(name).numel() for name in chosen) == 545_587_200
    assert all(value.requires_grad for value in released.resampler.parameters())


@pytest.mark.slow
def test_the_second_stage_has_eight_channels(released: SDXLAdapter) -> None:
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        second = SDXLAdapter(UNet2DConditionModel(**{**SDXL_UNET, "in_channels": 8}), released.resampler)
    assert second.reads_condition and len(second.state_dict()) == 1742
    assert list(second.unet.conv_in.weight.shape) == [320, 8, 3, 3]


# ---- resampler


def test_embeddings_of_any_number() -> None:
    resampler = tiny_sdxl.adapter().resampler
    for count in (1, 4, 16):
        prompt, pooled = resampler(torch.randn(2, count, tiny_sdxl.WIDTH))
        assert prompt.shape == (2, 4, 16) and pooled.shape == (2, 10)
    embeds = torch.randn(2, 4, tiny_sdxl.WIDTH)
    together, alone = resampler(embeds)[0], resampler(embeds[1:])[0]
    torch.testing.assert_close(together[1:], alone)
    torch.testing.assert_close(resampler(embeds[:, [2, 0, 1, 3]])[0], together, msg="it knows no order")


def test_normalising_is_over_the_embeddings_of_a_picture() -> None:
    """As the released constructor's default does; released weights have it off."""
    import dataclasses

    torch.manual_seed(0)
    resampler = ResamplerXLV2(dataclasses.replace(tiny_sdxl.SIZES, normalize=True))
    embeds = torch.randn(1, 4, tiny_sdxl.WIDTH)
    torch.testing.assert_close(resampler(embeds)[0], resampler(embeds * 3)[0])


def test_sizes_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match="dim must be a multiple of heads, not 10 with 3 heads"):
        ResamplerSizes(dim=10, heads=3)
    with pytest.raises(ConfigError, match="resampler: depth must be at least 0, not -1"):
        ResamplerSizes(depth=-1)
    with pytest.raises(ConfigError, match="makes prompt embeddings of width 17, but the U-Net reads width 16"):
        SDXLAdapter(tiny_sdxl.unet(), ResamplerXLV2(ResamplerSizes(**{**vars(tiny_sdxl.SIZES), "output1_dim": 7})))
    with pytest.raises(ConfigError, match="5 input channels; an adapter has 4, or 8 to read a condition picture"):
        SDXLAdapter(tiny_sdxl.unet(5), ResamplerXLV2(tiny_sdxl.SIZES))


# ---- stages


def test_a_condition_changes_nothing_until_it_is_trained(inputs: dict[str, Tensor]) -> None:
    adapter = tiny_sdxl.adapter()
    condition = torch.randn(2, 4, 8, 8)
    with pytest.raises(ConfigError, match="first stage and reads no condition picture"):
        adapter(**inputs, condition_latents=condition)
    with torch.no_grad():
        before = adapter(**inputs)
        adapter.add_condition_channels()
        assert adapter.reads_condition and adapter.unet.config.in_channels == 8
        torch.testing.assert_close(adapter(**inputs), before)
        torch.testing.assert_close(adapter(**inputs, condition_latents=condition), before)
        adapter.add_condition_channels()
        assert adapter.unet.conv_in.weight.shape == (8, 8, 3, 3), "once is enough"
        trained = tiny_sdxl.adapter(stage=2)
        assert not torch.allclose(trained(**inputs), trained(**inputs, condition_latents=condition))


def test_a_first_convolution_keeps_its_bias_type_and_place() -> None:
    first = nn.Conv2d(4, 6, 3, padding=1, dtype=torch.bfloat16)
    wide = widened(first, 8)
    assert wide.weight.dtype == torch.bfloat16 and wide.bias is not None
    assert torch.equal(wide.bias, first.bias) and not wide.weight[:, 4:].any()


@pytest.mark.parametrize("stage", [1, 2])
def test_what_is_trained_gets_gradients_and_nothing_else(stage: int, inputs: dict[str, Tensor]) -> None:
    adapter = tiny_sdxl.adapter(stage)
    trained = adapter.set_trainable()
    adapter(**inputs).square().mean().backward()
    with_gradient = {name for name, value in adapter.named_parameters() if value.grad is not None}
    assert len(with_gradient) == len(trained)
    of_unet = {name for name in with_gradient if name.startswith("unet.")}
    first = {"unet.conv_in.weight", "unet.conv_in.bias"} if stage == 2 else set()
    assert of_unet - first and of_unet >= first
    assert all(name.split(".")[-2] in ("to_k", "to_v") for name in of_unet - first)
    assert all(bool(adapter.get_parameter(name).grad.abs().sum() > 0) for name in of_unet)
    assert len(adapter.set_trainable("all")) == len(list(adapter.parameters()))
    assert len(adapter.set_trainable("key_value")) == len(trained), "the rest is frozen again"
    with pytest.raises(ConfigError, match="What is trained must be 'key_value' or 'all', not 'full'"):
        adapter.set_trainable("full")  # type: ignore[arg-type]


# ---- checkpoints


def _as_file(place: Path) -> Path:
    torch.save(tiny_sdxl.adapter(2).state_dict(), place / "second.bin")
    return place / "second.bin"


def _as_safetensors(place: Path) -> Path:
    save_file(tiny_sdxl.adapter(2).state_dict(), place / "second.safetensors")
    return place / "second.safetensors"


def _as_released_folder(place: Path) -> Path:
    torch.save({"module": tiny_sdxl.adapter(2).state_dict()}, place / "pytorch_model.bin")
    return place


def _as_own_folder(place: Path) -> Path:
    return tiny_sdxl.adapter(2).save_pretrained(place)


@pytest.mark.parametrize("make", [_as_file, _as_safetensors, _as_released_folder, _as_own_folder])
def test_files_and_folders_load(make: Callable[[Path], Path], folder: Path, tmp_path: Path,
                                inputs: dict[str, Tensor]) -> None:
    checkpoint = make(tmp_path)
    (tmp_path / "resampler.json").write_text(json.dumps(vars(tiny_sdxl.SIZES)))
    loaded = SDXLAdapter.from_pretrained(checkpoint, folder)
    assert not loaded.training and loaded.reads_condition
    report = loaded.load_report
    assert report is not None
    assert (len(report.loaded), report.missing, report.ignored) == (len(loaded.state_dict()), [], [])
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs), tiny_sdxl.adapter(2)(**inputs))
    half = SDXLAdapter.from_pretrained(checkpoint, folder, dtype=torch.bfloat16)
    assert {value.dtype for value in half.parameters()} == {torch.bfloat16}


def test_half_precision_is_kept_when_saved(folder: Path, tmp_path: Path) -> None:
    tiny_sdxl.adapter().save_pretrained(tmp_path / "made", torch.float16)
    assert {value.dtype for value in load_file(tmp_path / "made" / "model.safetensors").values()} == {torch.float16}
    assert not SDXLAdapter.from_pretrained(tmp_path / "made", folder).reads_condition


def test_an_adapter_of_another_size_is_one_sentence(folder: Path, tmp_path: Path) -> None:
    """The tiny one against the released sizes, a resampler of other depth, a U-Net of another number of channels."""
    made = tiny_sdxl.adapter().save_pretrained(tmp_path)
    sizes = vars(tiny_sdxl.SIZES)

    def refused(said: str, **other: int) -> None:
        (made / "resampler.json").write_text(json.dumps({**sizes, **other}))
        with pytest.raises(CheckpointError, match=said) as caught:
            SDXLAdapter.from_pretrained(made, folder)
        assert "\n" not in str(caught.value)

    refused(r"tensors have another size, first 'resampler.latents': the file has \(1, 4, 16\), the model needs "
            r"\(1, 5, 16\)", num_queries=5)
    refused("tensors are missing from the file: 'resampler.layers.1", depth=2)
    refused("does not belong to the U-Net that .*sdxl/unet/config.json describes .*pooled embeddings of width 11, but "
            "the U-Net reads width 10", output2_dim=11, output1_dim=5)
    (made / "resampler.json").unlink()
    with pytest.raises(CheckpointError, match="makes prompt embeddings of width 2048, but the U-Net reads width 16"):
        SDXLAdapter.from_pretrained(made, folder)


def test_files_that_are_no_adapter(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no such file; put SEED-X's de-tokenizer .*seed_detokenizer/first_st"):
        SDXLAdapter.from_pretrained(tmp_path / "absent.bin", folder)
    with pytest.raises(CheckpointError, match="holds no model.safetensors or pytorch_model.safetensors or pytorch_m"):
        SDXLAdapter.from_pretrained(tmp_path, folder)
    save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="no SDXL adapter: it holds no tensor 'unet.conv_in.weight'"):
        SDXLAdapter.from_pretrained(tmp_path / "other.safetensors", folder)
    made = tiny_sdxl.adapter().save_pretrained(tmp_path / "made")
    with pytest.raises(CheckpointError, match="unet/config.json: there is no such file; download the diffusers folder"):
        SDXLAdapter.from_pretrained(made, tmp_path)
    state = load_file(made / "model.safetensors")
    file = made / "model.safetensors"
    save_file({**state, "unet.conv_in.weight": torch.zeros(8, 6, 3, 3)}, file)
    with pytest.raises(CheckpointError, match="6 input channels; an adapter has 4, or 8"):
        SDXLAdapter.from_pretrained(made, folder)
    save_file({name: value for name, value in state.items() if name != "unet.conv_out.bias"}, file)
    with pytest.raises(CheckpointError, match="1 tensors are missing from the file: 'unet.conv_out.bias'"):
        SDXLAdapter.from_pretrained(made, folder)
    save_file({**state, "vae.something": torch.zeros(1)}, file)
    with pytest.warns(SeedWarning, match="1 tensor that the model does not know was left out: 'vae.something'"):
        assert SDXLAdapter.from_pretrained(made, folder).load_report.ignored == ["vae.something"]  # type: ignore
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="not a complete safetensors file"):
        SDXLAdapter.from_pretrained(made, folder)
    (made / "resampler.json").write_text('{"dims": 3}')
    with pytest.raises(ConfigError, match=r"resampler.json: unknown key 'dims' \(did you mean 'dim'\?\)"):
        SDXLAdapter.from_pretrained(made, folder)
