"""SEED-LLaMA in a system folder (fixture `tiny_folder`); tokenizers of SEED-1 and SEED-2, the files
of SEED-1's training, and a decoder of codes."""

import dataclasses
from pathlib import Path

import torch
from random_images import noise
from torch import Tensor
from yaml_tables import read_tables

from seed_multimodal import MultimodalTokenizer
from seed_multimodal.images.transforms import seed_image_processor
from seed_multimodal.language.hub_tokenizer import HubTokenizer
from seed_multimodal.models.seed.code_adapter import CODE_ADAPTER, CodeAdapter, CodeAdapterConfig
from seed_multimodal.models.seed.configuration import QFormerConfig, Seed1Config, Seed2Config
from seed_multimodal.models.seed.modeling import Seed1Tokenizer, Seed2Tokenizer
from seed_multimodal.models.seed.qformer import QFormer
from seed_multimodal.nn.vision.eva import EvaConfig, EvaVit
from seed_multimodal.pipelines.assemble import assemble_system
from seed_multimodal.recipes.seed.losses import (
    Seed1Stage2Model,
    Stage1Model,
    Stage1TrainingOptions,
    Stage2Model,
    Stage2TrainingOptions,
)
from seed_nano.train.words import train_text_tokenizer
from tiny import spread, write_json
from tiny.diffusion import (
    CROSS,
    DENOISER_SIZES,
    EMBEDDING,
    TEXT_TOKENS,
    TEXT_WIDTH,
    autoencoder,
    write_unclip,
)
from tiny.language import llama, random_llm, write_hub_tokenizer

SENTENCES = [
    "USER: Please provide an accurate and concise description of the given image.\n"
    "ASSISTANT: a red apple.",
    "What colour is it? Please provide an accurate answer consisting of only one word or phrase.",
    "Please draw a blue fish in the style of a flat drawing.\nASSISTANT: Here is the picture.",
    "Make it green.\nASSISTANT: Here it is.",
    "USER: What is this animal?\nASSISTANT: It is a cat, and the cat sits on the grass under a "
    "tall tree.",
]
IMAGE_SIZE = 32
N_CODES = 16
QFORMER_WIDTH = 24
# Of SEED-1 and SEED-2, where a test has a tokenizer alone.
SIZES = {
    "vit": EvaConfig(image_size=16, patch_size=8, width=16, depth=2, heads=2, mlp_width=24),
    "qformer": QFormerConfig(
        width=QFORMER_WIDTH, depth=3, heads=2, mlp_width=32, max_positions=40, dropout=0.1
    ),
    "codebook_size": 50,
    "codebook_dim": 6,
    "decode_depth": 1,
}


def build_seed_llama(folder: str | Path, *, hub: bool = False) -> Path:
    """Write the whole system into `folder` and return it; `hub`: with a Qwen 3, whose tables have
    rows of padding, and a hub tokenizer."""
    root = Path(folder)
    torch.manual_seed(0)
    tokenizer_dir = root / "seed_tokenizer"
    if hub:
        base = write_hub_tokenizer(root / "hub", SENTENCES)
        tokenizer = HubTokenizer.create(base, N_CODES, 32)
        tokenizer.save_pretrained(tokenizer_dir)
        llm = random_llm("qwen3", len(tokenizer) + 14, **tokenizer.special_ids)
        llm.save_pretrained(root / "seed_llama")
    else:
        tokenizer = train_text_tokenizer(
            MultimodalTokenizer, SENTENCES * 4, tokenizer_dir, vocab_size=340, n_codes=N_CODES
        )
    # The image tokenizer and its decoder lie below the words, as published.
    write_seed2(tokenizer_dir)
    if not hub:
        llama(len(tokenizer)).save_pretrained(root / "seed_llama")
    write_unclip(root / "seed_tokenizer" / "diffusion_model")
    write_json(root / "system.json", read_tables(__file__))
    return root


def assemble_hub_seed_llama(root) -> Path:
    """A system with a Qwen 3 and a hub tokenizer, assembled of its parts."""
    seed = build_seed_llama(root / "seed", hub=True)
    parts = {"llm": seed / "seed_llama", "tokenizer": seed / "seed_tokenizer"}
    generation = {"max_new_tokens": 12, "do_sample": False}
    settings = {"image_size": IMAGE_SIZE, "generation": generation}
    return assemble_system("seed_llama", root / "assembled", parts, settings)


def write_seed2(folder):
    """The image tokenizer of the system."""
    config = Seed2Config(
        vit=EvaConfig(
            image_size=IMAGE_SIZE, patch_size=8, width=24, depth=1, heads=2, mlp_width=48
        ),
        qformer=QFormerConfig(width=QFORMER_WIDTH, depth=2, heads=2, mlp_width=48),
        codebook_size=N_CODES,
        codebook_dim=8,
        decode_depth=1,
        decode_heads=2,
        image_features_dim=EMBEDDING,
    )
    model = Seed2Tokenizer(config).eval()
    # Initial codebooks lie within 1/K of 0, where nearly all queries select one code.
    with torch.no_grad():
        model.quantize.embedding.weight.copy_(torch.randn(N_CODES, 8) * 0.05)
    model.save_pretrained(folder)


def write_code_decoder(folder) -> Path:
    """A decoder of codes: SANA's transformer and autoencoder as a flow."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SanaTransformer2DModel

    torch.manual_seed(1)
    # It reads what the adapter makes of codes.
    denoiser = SanaTransformer2DModel(
        **DENOISER_SIZES["SanaTransformer2DModel"],
        in_channels=32,
        out_channels=32,
        sample_size=8,
        caption_channels=CROSS,
    )
    adapter = CodeAdapter(CodeAdapterConfig(width=QFORMER_WIDTH, tokens=32, context_dim=CROSS))
    spread(denoiser, 0.6).save_pretrained(folder / "transformer")
    spread(adapter, 0.6).save_pretrained(folder / CODE_ADAPTER)
    autoencoder("dc").save_pretrained(folder / "vae")
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(folder / "scheduler")
    return folder


def seed1_config() -> Seed1Config:
    return Seed1Config(
        **SIZES, reverse_depth=2, text_tokens=TEXT_TOKENS, text_features_dim=TEXT_WIDTH
    )


def seed1_tokenizer() -> Seed1Tokenizer:
    torch.manual_seed(0)
    return loud(Seed1Tokenizer(seed1_config())).eval()


def loud(model):
    """Weights of a Q-Former and its tokenizer so large that images give different codes."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and not name.startswith("text_encoder."):
                parameter.normal_(
                    std=1.0 if parameter.ndim == 3 or name.startswith("quantize") else 0.3
                )
    return model


def save_as_lavis(model, file) -> Path:
    """A checkpoint as LAVIS saves it: without frozen parameters, with buffers and tied copies."""
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    state = {name: value for name, value in model.state_dict().items() if name not in frozen}
    torch.save({"model": state, "optimizer": {"state": {}}, "epoch": 0}, file)
    return file


def write_stages(config, folder, *, vocab_size=40, freeze_vit: bool = True, **options):
    """`stage1.pth`, `stage2.pth` and `eva_vit_g.pth` of random weights; returns the second stage.

    options: of the second stage.
    """
    sizes = Seed2Config(vit=config.vit, qformer=config.qformer)
    options1 = Stage1TrainingOptions(embed_dim=8, freeze_vit=freeze_vit)
    first = loud(Stage1Model(sizes, options=options1, vocab_size=vocab_size))
    stage2 = Stage2Model if isinstance(config, Seed2Config) else Seed1Stage2Model
    second = loud(stage2(config, options=Stage2TrainingOptions(**options))).eval()
    if second.options.freeze_qformer:
        second.load_stage1(first.state_dict())
    else:
        second.visual_encoder.load_state_dict(first.visual_encoder.state_dict())
    # Rows of the codebook at the features of an image, so that its codes differ.
    pixels = seed_image_processor(config.vit.image_size)(noise(1))[None]
    with torch.no_grad():
        second.quantize.embedding.weight[: config.num_query] = second.pre_quant(pixels)[0]
    deeper = EvaVit(dataclasses.replace(config.vit, depth=3)).state_dict()
    torch.save(deeper | first.visual_encoder.state_dict(), folder / "eva_vit_g.pth")
    save_as_lavis(first, folder / "stage1.pth")
    save_as_lavis(second, folder / "stage2.pth")
    return second


def training_name(name) -> str:
    """Name of a weight in the original checkpoint → its name in the original training code."""
    return name.replace("Reverse_Qformer.", "Reverse_Qformer_text.").replace(
        "reverse_tokens", "reverse_tokens_text"
    )


def write_released_seed1(model: Seed1Tokenizer, folder) -> Path:
    """causal_qformer.pth, seed_tokenizer.pth and eva_vit_g.pth as the original training writes
    them: weights under the key "model", next to other keys, with tensors of training only."""
    folder.mkdir(parents=True, exist_ok=True)
    # Each with what only a run that goes on needs.
    first, second, vision = _stage_files(model)
    torch.save(
        {"model": first, "epoch": 3, "config": {"run": {"amp": True}}, "scaler": None},
        folder / "causal_qformer.pth",
    )
    torch.save(
        {"model": second, "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]}},
        folder / "seed_tokenizer.pth",
    )
    torch.save(vision, folder / "eva_vit_g.pth")
    return folder


def _stage_files(model: Seed1Tokenizer) -> tuple[dict[str, Tensor], ...]:
    """State dicts of the first stage, of the second, and of the whole vision encoder."""
    first = {}
    second = {}
    # The first stage trained the queries, the second all behind them.
    for name, value in model.state_dict().items():
        part = name.split(".")[0]
        if part != "visual_encoder":
            (first if part in ("query_tokens", "ln_vision", "Qformer") else second)[name] = value
    sizes = model.config.qformer
    state = QFormer(sizes, model.config.vit.width, vocab_size=30, lm_head=True).state_dict()
    first = {f"Qformer.{name}": value for name, value in state.items()} | first
    # Tensors of training only, which a reader must leave out.
    first |= {
        "temp": torch.tensor(0.07),
        "vision_proj.weight": torch.zeros(4, sizes.width),
        "vision_proj.bias": torch.zeros(4),
        "text_proj.weight": torch.zeros(4, sizes.width),
        "text_proj.bias": torch.zeros(4),
    }
    second |= {"pos_embed": torch.zeros_like(model.pos_embed_text)}
    second |= {f"blocks.{name}": value for name, value in model.blocks_text.state_dict().items()}
    # EVA has one more layer than SEED uses.
    deeper = EvaVit(
        dataclasses.replace(model.config.vit, depth=model.config.vit.depth + 1)
    ).state_dict()
    return first, second, deeper | model.visual_encoder.state_dict()
