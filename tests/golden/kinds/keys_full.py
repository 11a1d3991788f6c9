"""Full-size models on the meta device: names and shapes of the state dict in order, trained
parameters, buffers, numbers of parameters.

Not compared: dtypes after the originals' partial conversion to half precision (here a model has one
dtype); the CLIP vision encoder of stage 2 (`clip_model.*`, of transformers); the file of each
tensor of SEED-1; in SEED-X the order of the language model's keys (of transformers) and its rotary
buffers, which transformers no longer saves.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from runner import assert_same, files_named, read_json
from torch import nn

import seed_multimodal  # noqa: F401  (before diffusers)
from seed_multimodal.models.lavit.decoder import CodeDecoder, LavitDecoderConfig
from seed_multimodal.models.lavit.modeling import DynamicTokenizer, LavitTokenizerConfig
from seed_multimodal.models.seed.configuration import Seed1Config, Seed2Config
from seed_multimodal.models.seed.losses import Stage1Model, Stage2Model
from seed_multimodal.models.seed.modeling import Seed1Tokenizer, Seed2Tokenizer
from seed_multimodal.models.seed_x.adapter import ResamplerXLV2, SDXLAdapter
from seed_multimodal.models.seed_x.modeling import ContinuousLVLM
from seed_multimodal.nn.vision.qwen import (
    INPUT_RESAMPLER,
    OUTPUT_RESAMPLER,
    QwenVit,
    QwenVitConfig,
    Resampler,
)

Table = dict[str, dict[str, Any]]
LAVIT_PARAMETERS = {
    "encoder": 1_012_588_928,
    "token_predictor": 3_227_490,
    "causal_encoder": 398_267_392,
    "quantize": 524_288,
    "encode_task_layer": 2_028_960,
    "vit_proj": 5_771_264,
}
# The public unet/config.json of stabilityai/stable-diffusion-xl-base-1.0, where it differs from the
# class's defaults.
SDXL_UNET = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280],
    "cross_attention_dim": 2048,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "projection_class_embeddings_input_dim": 2816,
    "sample_size": 128,
    "transformer_layers_per_block": [1, 2, 10],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "use_linear_projection": True,
}
UNET = 1680, 2_567_463_684  # keys, parameters
KEY_VALUE_PARAMETERS = 545_587_200


def parameters_by_part(model: nn.Module) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        counts[name.split(".")[0]] += parameter.numel()
    return dict(counts)


def check_keys(
    model: nn.Module, table: Table, name: str, ignored: str = "-", trains: bool = True
) -> None:
    """Keys (in any order if they begin with `ignored`), shapes, buffers and trained parameters."""
    state = model.state_dict()
    assert_same(
        [key for key in state if not key.startswith(ignored)],
        [key for key in table if not key.startswith(ignored)],
        f"{name}: keys in order",
    )
    buffers = {key for key, _ in model.named_buffers()} & set(state)
    assert_same(
        sorted(key for key in buffers if not key.startswith(ignored)),
        sorted(
            key for key, row in table.items() if row.get("buffer") and not key.startswith(ignored)
        ),
        f"{name}: buffers",
    )
    for key, row in table.items():
        if key in state or not row.get("buffer"):
            assert_same(list(state[key].shape), row["shape"], f"{name}: shape of {key}")
    if trains:
        parameters = dict(model.named_parameters())
        aliases = dict(model.named_parameters(remove_duplicate=False)).keys() - parameters.keys()
        assert_same(
            [key for key in table if key in parameters and parameters[key].requires_grad],
            [key for key in table if table[key].get("trainable") and key not in aliases],
            f"{name}: trained",
        )


def check_seed1(folder: Path) -> None:
    table = read_json(folder / "inference_tokenizer.json")
    summary = read_json(folder / "summary.json")
    with torch.device("meta"):
        model = Seed1Tokenizer(Seed1Config())
    check_keys(model, table, "SEED-1")
    assert_same(len(model.state_dict()), summary["entries"], "number of keys")
    assert_same(
        sorted(key for key, row in table.items() if row.get("buffer")),
        sorted(summary["buffers"]),
        "buffers",
    )
    counts = parameters_by_part(model)
    assert_same(counts, summary["parameters_by_module"], "parameters of each part")
    assert_same(sum(counts.values()), summary["parameters"], "parameters")


def check_seed2(name: str, table: Table) -> None:
    model = {
        "inference_quantizer.default.json": lambda: Seed2Tokenizer(Seed2Config()),
        "inference_quantizer.use_qformer_image.json": lambda: Seed2Tokenizer(
            Seed2Config(use_qformer_image=True)
        ),
        "stage1_training_model.json": lambda: Stage1Model(Seed2Config()),
        "stage2_training_model.json": lambda: Stage2Model(
            Seed2Config(use_qformer_image=True, reverse_depth=4)
        ),
    }[name]()
    check_keys(
        model,
        {key: row for key, row in table.items() if not key.startswith("clip_model.")},
        name,
        trains="training" in name,
    )


def check_lavit(name: str, table: Table) -> None:
    if name == "visual_tokenizer.json":
        model: nn.Module = DynamicTokenizer(LavitTokenizerConfig())
        model.encoder.requires_grad_(False)
        assert_same(len(model.encoder.state_dict()), 528, "tensors of the vision encoder")
        assert_same(parameters_by_part(model), LAVIT_PARAMETERS, "parameters")
    else:
        head, tensors, millions = {
            "decoder_highres.json": ("highres", 287, 414.0),
            "decoder_lowres.json": ("lowres", 276, 404.1),
        }[name]
        model = CodeDecoder(LavitDecoderConfig(head=head))
        assert_same(len(model.state_dict()), tensors, f"tensors of the {head} decoder")
        counted = sum(parameters_by_part(model).values())
        assert_same(
            round(counted / 1e6, 1), millions, f"millions of parameters of the {head} decoder"
        )
    check_keys(model, table, name)


def sdxl_adapter(channels: int = 4) -> SDXLAdapter:
    from diffusers import UNet2DConditionModel

    return SDXLAdapter(
        UNet2DConditionModel.from_config({**SDXL_UNET, "in_channels": channels}), ResamplerXLV2()
    )


def check_seed_x(name: str, table: Table) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    if name == "visual_encoder.json":
        check_keys(QwenVit(QwenVitConfig()), table, name)
    elif name == "multimodal_model_with_llm.json":
        llm = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=32330,
                hidden_size=5120,
                intermediate_size=13824,
                num_hidden_layers=40,
                num_attention_heads=40,
            )
        )
        agent = ContinuousLVLM(llm, Resampler(INPUT_RESAMPLER), Resampler(OUTPUT_RESAMPLER))
        check_keys(agent, table, name, "llm.")
        parameters = sorted(key for key, row in table.items() if not row.get("buffer"))
        assert_same(sorted(agent.state_dict()), parameters, f"{name}: keys")
        stored = [key for key in agent.state_dict() if not key.startswith("llm.")]
        assert_same(
            len(stored), 23, "keys of the original agent's file, which lacks the language model"
        )
    else:
        assert_same(name, "detokenizer_resampler.json", "table")
        adapter = sdxl_adapter()
        check_keys(adapter, table, name, "unet.")
        unet = adapter.unet.state_dict()  # of diffusers, not in the table
        assert_same(
            (len(unet), sum(map(torch.numel, unet.values()))),
            UNET,
            "keys and parameters of the U-Net",
        )
        adapter.set_trainable("key_value")
        trained = sum(value.numel() for value in adapter.unet.parameters() if value.requires_grad)
        assert_same(trained, KEY_VALUE_PARAMETERS, "keys and values of the U-Net's attention")
        edits = sdxl_adapter(channels=8).state_dict()
        assert_same(list(edits), list(adapter.state_dict()), "keys of the second stage")
        assert_same(
            list(edits["unet.conv_in.weight"].shape),
            [320, 8, 3, 3],
            "the second stage's first convolution",
        )


def tables(check: Callable[[str, Table], None]) -> Callable[[Path], None]:
    def check_folder(folder: Path) -> None:
        for file in files_named(folder, "*.json"):
            with torch.device("meta"):
                check(file.name, read_json(file))

    return check_folder


KINDS = {
    "seed1_keys_full": check_seed1,
    "seed2_keys_full": tables(check_seed2),
    "seedx_keys_full": tables(check_seed_x),
    "lavit_keys_full": tables(check_lavit),
}
