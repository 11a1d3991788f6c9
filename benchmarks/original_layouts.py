"""Random weights in the layout, size and precision of the originals' files, for `rehearsal.py`.

Precisions are those that the originals' configurations record; where they record none, that of the
published code. Most files of SEED-X, Vicuna and LaVIT are sparse: each tensor has one block of
random values, then zeros.

    python benchmarks/original_layouts.py 8b FOLDER/pretrained
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import torch
from drawing import UNET, VAE
from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]
from shared import LLAMA_7B, ROOT, fill_random, plain_parser
from torch import Tensor, nn

from seed_multimodal.language.tokenizer import ADDED, MODEL
from seed_multimodal.language.vocabulary import ImageVocabulary, SeedXVocabulary
from seed_multimodal.models.lavit.processing import LavitVocabulary

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

N_TEXT = 32000  # pieces of LLaMA's tokenizer
BLOCK = 1_000_003  # random values that are repeated; a prime, so that rows of a matrix differ
LLAMA_13B = {
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "max_position_embeddings": 2048,
}
SDXL_UNET = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
SDXL_VAE = {**VAE, "sample_size": 1024, "scaling_factor": 0.13025, "force_upcast": True}
Shapes = Mapping[str, Tensor]  # tensors on the meta device


# ---- files


def write_weights(file: Path, shapes: Shapes, dtype: torch.dtype, *, sparse: bool = False) -> None:
    """A torch file of these tensors, written without holding them in memory."""
    # 1. The file with space for the tensors; memory of `empty` is not used until it is written.
    file.parent.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        is_float = shape.is_floating_point()
        tensors[name] = torch.empty(shape.shape, dtype=dtype if is_float else shape.dtype)
    with torch.serialization.skip_data():
        torch.save(tensors, file)

    # 2. The values, in the mapped file.
    del tensors
    torch.serialization.set_default_mmap_options(mmap.MAP_SHARED)
    block = 0.02 * torch.randn(BLOCK, generator=torch.Generator().manual_seed(0))
    for name, tensor in torch.load(file, mmap=True, weights_only=True).items():
        if tensor.ndim == 1 and name.endswith("weight"):
            tensor.fill_(1)  # of a normalisation
        elif tensor.is_floating_point():
            for part in tensor.flatten().split(BLOCK)[: 1 if sparse else None]:
                part.copy_(block[: len(part)])


def write_llm(
    folder: Path, sizes: Mapping[str, object], dtype: torch.dtype, shards: int, sparse: bool = False
) -> None:
    """A LLaMA with its `config.json`, in so many files."""
    from transformers import LlamaConfig, LlamaForCausalLM

    # 1. Names and shapes.
    config = LlamaConfig(**sizes, dtype=str(dtype).removeprefix("torch."))
    config.architectures = ["LlamaForCausalLM"]
    with torch.device("meta"):
        shapes = LlamaForCausalLM(config).state_dict()
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    if shards == 1:
        write_weights(folder / "pytorch_model.bin", shapes, dtype, sparse=sparse)
        return

    # 2. Files of about equal size, and their index.
    per_shard = sum(shape.numel() for shape in shapes.values()) / shards
    files: list[dict[str, Tensor]] = [{} for _ in range(shards)]
    weight_map: dict[str, str] = {}
    written = 0
    for name, shape in shapes.items():
        index = min(int(written / per_shard), shards - 1)
        files[index][name] = shape
        weight_map[name] = f"pytorch_model-{index + 1:05d}-of-{shards:05d}.bin"
        written += shape.numel()
    for index, part in enumerate(files):
        file = folder / f"pytorch_model-{index + 1:05d}-of-{shards:05d}.bin"
        write_weights(file, part, dtype, sparse=sparse)
    content = json.dumps({"metadata": {}, "weight_map": weight_map})
    (folder / "pytorch_model.bin.index.json").write_text(content)


def write_text_tokenizer(folder: Path, added: Mapping[str, int]) -> None:
    """LLaMA's number of pieces: nano's, and others that texts do not have."""
    model = ModelProto()
    model.ParseFromString((ROOT / "pretrained/nano/seed_tokenizer" / MODEL).read_bytes())
    for index in range(len(model.pieces), N_TEXT):
        model.pieces.add(piece=f"▁▁{index}", score=-1e4 - index)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MODEL).write_bytes(model.SerializeToString())
    if added:
        (folder / ADDED).write_text(json.dumps(added))


def shapes_of(build: Callable[[], nn.Module], *, without: str = "") -> Shapes:
    """Names and shapes of a network's tensors, but those that begin with `without`."""
    with torch.device("meta"):
        state = build().state_dict()
    return {name: v for name, v in state.items() if not without or not name.startswith(without)}


def diffusers_network(network: type[nn.Module], sizes: Mapping[str, object]) -> nn.Module:
    """A network of diffusers with random weights."""
    with torch.device("meta"):
        model = network(**sizes)
    return fill_random(model, torch.device("cpu"), torch.float32)


# ---- SEED-LLaMA


def write_8b(pretrained: Path) -> None:
    """SEED-2's tokenizer, SEED-LLaMA 8B, stable-unCLIP."""
    from seed_multimodal.models.seed.configuration import Seed2Config
    from seed_multimodal.models.seed.modeling import Seed2Tokenizer
    from seed_multimodal.nn.vision.eva import PREFIX, EvaConfig

    # 1. The tokenizer, and EVA with the last block, which is not used.
    folder = pretrained / "seed_tokenizer"
    write_text_tokenizer(folder, ImageVocabulary().added_tokens)
    codec = shapes_of(lambda: Seed2Tokenizer(Seed2Config()), without=PREFIX)
    write_weights(folder / "seed_quantizer.pt", codec, torch.float32)
    encoder = shapes_of(EvaConfig(depth=40).build)
    write_weights(folder / "eva_vit_g.pth", encoder, torch.float16)

    # 2. The language model, with the ids of its config.json.
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": -1}
    sizes = {**LLAMA_7B, **ids, "vocab_size": ImageVocabulary().size, "use_cache": False}
    write_llm(pretrained / "seed_llama_8b_sft", sizes, torch.bfloat16, 1)
    write_unclip(pretrained / "stable-diffusion-2-1-unclip")


def write_unclip(folder: Path) -> None:
    """Stable Diffusion 2.1 unCLIP, whose files are in fp32."""
    from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, UNet2DConditionModel
    from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import (
        StableUnCLIPImageNormalizer,
    )
    from transformers import CLIPTextConfig, CLIPTextModel

    # 1. The networks.
    diffusers_network(UNet2DConditionModel, UNET).save_pretrained(folder / "unet")
    diffusers_network(AutoencoderKL, VAE).save_pretrained(folder / "vae")
    StableUnCLIPImageNormalizer(1024).save_pretrained(folder / "image_normalizer")
    config = CLIPTextConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=23,
        num_attention_heads=16,
        projection_dim=512,
        hidden_act="gelu",
    )
    CLIPTextModel(config).save_pretrained(folder / "text_encoder")

    # 2. A tokenizer for the empty prompt, and the schedulers.
    (folder / "tokenizer").mkdir(exist_ok=True)
    vocabulary = {f"unused{index}": index for index in range(49406)}
    vocabulary |= {"<|startoftext|>": 49406, "<|endoftext|>": 49407}
    (folder / "tokenizer/vocab.json").write_text(json.dumps(vocabulary))
    limit = json.dumps({"model_max_length": 77})
    (folder / "tokenizer/tokenizer_config.json").write_text(limit)
    (folder / "tokenizer/merges.txt").write_text("#version: 0.2\n")
    beta = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    schedulers: dict[str, SchedulerMixin] = {
        "scheduler": DDIMScheduler(**beta, prediction_type="v_prediction", clip_sample=False),
        "image_noising_scheduler": DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
    }
    for name, scheduler in schedulers.items():
        scheduler.save_pretrained(folder / name)


def write_vicuna(pretrained: Path) -> None:
    """The base of SEED-LLaMA 8B, and a LoRA of the published settings, which `merge` reads."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from seed_multimodal.training.llm.lora import adapter_settings, adapter_state, add_lora

    write_text_tokenizer(pretrained / "seed_llama_tokenizer", ImageVocabulary().added_tokens)
    write_llm(
        pretrained / "vicuna-7b-v1.1", {**LLAMA_7B, "vocab_size": N_TEXT}, torch.float16, 2, True
    )
    with torch.device("meta"):
        llm = LlamaForCausalLM(LlamaConfig(**LLAMA_7B, vocab_size=ImageVocabulary().size))
        model = add_lora(llm, {})
    folder = pretrained / "lora"
    write_weights(folder / "adapter_model.bin", adapter_state(model), torch.float32)
    settings = json.dumps(adapter_settings(model), default=str)
    (folder / "adapter_config.json").write_text(settings)


# ---- SEED-X and LaVIT


def write_sdxl(folder: Path) -> None:
    """SDXL base 1.0 without the weights of its U-Net."""
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, UNet2DConditionModel

    diffusers_network(AutoencoderKL, SDXL_VAE).save_pretrained(folder / "vae")
    with torch.device("meta"):
        UNet2DConditionModel(**SDXL_UNET).save_config(folder / "unet")
    beta = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    EulerDiscreteScheduler(**beta, steps_offset=1, timestep_spacing="leading").save_pretrained(
        folder / "scheduler"
    )


def write_seed_x(pretrained: Path) -> None:
    """SEED-X-I: LLaMA2-13B in fp32, as published; resamplers, vision encoder, adapter of SDXL."""
    from diffusers import UNet2DConditionModel

    from seed_multimodal.models.seed_x.adapter import ResamplerXLV2, SDXLAdapter
    from seed_multimodal.models.seed_x.modeling import ContinuousLVLM
    from seed_multimodal.nn.vision.qwen import (
        INPUT_RESAMPLER,
        OUTPUT_RESAMPLER,
        QwenVit,
        QwenVitConfig,
        Resampler,
    )

    # 1. The language model and its agent.
    vocabulary = SeedXVocabulary()
    tokenizer = pretrained / "cvlm_llama2_tokenizer_100img_and_224loc_addpatch"
    write_text_tokenizer(tokenizer, vocabulary.added_tokens)
    sizes = {**LLAMA_13B, "vocab_size": vocabulary.size, "rms_norm_eps": 1e-5}
    write_llm(pretrained / "seed_x_i/llm", sizes, torch.float32, 6, sparse=True)
    llm = SimpleNamespace(config=SimpleNamespace(hidden_size=LLAMA_13B["hidden_size"]))
    agent = shapes_of(
        lambda: ContinuousLVLM(llm, Resampler(INPUT_RESAMPLER), Resampler(OUTPUT_RESAMPLER))
    )
    write_weights(pretrained / "seed_x_i/agent/pytorch_model.bin", agent, torch.float32)

    # 2. What reads and draws images.
    encoder = shapes_of(lambda: QwenVit(QwenVitConfig()))
    write_weights(pretrained / "QwenViT/qwen_vit_G.pt", encoder, torch.bfloat16, sparse=True)
    adapter = shapes_of(lambda: SDXLAdapter(UNet2DConditionModel(**SDXL_UNET), ResamplerXLV2()))
    file = pretrained / "seed_detokenizer/first_stage/pytorch_model.bin"
    write_weights(file, adapter, torch.float32, sparse=True)
    write_sdxl(pretrained / "stable-diffusion-xl-base-1.0")


def write_lavit(pretrained: Path) -> None:
    """LaVIT-7B-v2 with its decoder of 1024 pixels, without safety checker."""
    from diffusers import DDIMScheduler, UNet2DConditionModel

    from seed_multimodal.models.lavit.checkpoints import ENCODER, VISUAL_WEIGHT_PREFIXES
    from seed_multimodal.models.lavit.decoder import CodeDecoder, LavitDecoderConfig
    from seed_multimodal.models.lavit.modeling import DynamicTokenizer, LavitTokenizerConfig

    # 1. The language model, and the second token merger.
    folder = pretrained / "LaVIT-7B-v2"
    write_text_tokenizer(folder / "language_model", {})
    sizes = {**LLAMA_7B, "vocab_size": LavitVocabulary().size, "rms_norm_eps": 1e-5}
    write_llm(folder / "language_model", sizes, torch.bfloat16, 5, sparse=True)
    visual = shapes_of(lambda: DynamicTokenizer(LavitTokenizerConfig()))
    merger = {name: v for name, v in visual.items() if name.startswith(VISUAL_WEIGHT_PREFIXES)}
    write_weights(folder / "language_model/visual_weight.bin", merger, torch.float32)

    # 2. The tokenizer.
    encoder: dict[str, Tensor] = {}
    codec: dict[str, Tensor] = {}
    for name, shape in visual.items():
        if name.startswith(ENCODER):
            encoder[name.removeprefix(ENCODER)] = shape
        elif not name.startswith("vit_proj."):
            codec[name] = shape
    tokenizer = folder / "visual_tokenizer"
    write_weights(tokenizer / "eva_vitg_psz14.bin", encoder, torch.float16)
    write_weights(tokenizer / "tokenizer_encoder.bin", codec, torch.float32)
    decoder = shapes_of(lambda: CodeDecoder(LavitDecoderConfig()))
    write_weights(tokenizer / "highres_tokenizer_decoder.bin", decoder, torch.float32, sparse=True)

    # 3. The pixel decoder.
    pixels = folder / "highres_pixel_decoding"
    write_sdxl(pixels)
    unet = shapes_of(lambda: UNet2DConditionModel(**SDXL_UNET))
    write_weights(pixels / "unet/diffusion_pytorch_model.bin", unet, torch.float16, sparse=True)
    DDIMScheduler(clip_sample=False, steps_offset=1).save_pretrained(pixels / "scheduler")


MODELS: dict[str, Callable[[Path], None]] = {
    "8b": write_8b,
    "vicuna": write_vicuna,
    "seed-x-i": write_seed_x,
    "lavit": write_lavit,
}

if __name__ == "__main__":
    parser = plain_parser(__doc__)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    MODELS[options.model](options.folder)
