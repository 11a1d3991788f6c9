"""Parts of diffusers that draw 16 x 16 pixels, and their folders: SDXL with SEED-X's adapter,
Stable Diffusion 1, stable-unCLIP with a layout decoder."""

import string
from pathlib import Path

import torch
from torch import Tensor, nn
from yaml_tables import read_tables

from seed_multimodal.models.seed_x.adapter import ResamplerXLConfig, ResamplerXLV2, SDXLAdapter
from tiny import spread, write_json

FEATURES = 24  # width of visual embeddings
CROSS = 16  # of prompt embeddings: both outputs of the resampler
POOLED = 10
EMBEDDING = 16  # width of stable-unCLIP's image embedding
LATENT = 8  # side of stable-unCLIP's latents
# Of the text encoder of Stable Diffusion 1.
TEXT_TOKENS = 7
TEXT_WIDTH = 16
# Its word pieces: letters inside of words and at their ends, the text's start and end.
LETTERS = string.ascii_lowercase
PIECES = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
START_ID = PIECES.index("<|startoftext|>")
END_ID = PIECES.index("<|endoftext|>")
RESAMPLER = ResamplerXLConfig(
    dim=16,
    depth=1,
    dim_head=4,
    heads=2,
    num_queries=4,
    embedding_dim=FEATURES,
    output1_dim=CROSS - POOLED,
    output2_dim=POOLED,
    ff_mult=2,
)
TABLES = read_tables(__file__)
DENOISER_SIZES = TABLES["denoisers"]
FLOW = TABLES["flow"]
SDXL_VAE = TABLES["sdxl_vae"]
SCHEDULE = TABLES["schedule"]
TINY_AUTOENCODER = TABLES["tiny_autoencoder"]


def unet(channels: int = 4, *, sdxl: bool = True, **changes):
    """A U-Net of SDXL or of Stable Diffusion 1."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(1)
    sizes = {
        **DENOISER_SIZES["UNet2DConditionModel"],
        "sample_size": 8,
        "in_channels": channels,
        "out_channels": 4,
        "cross_attention_dim": CROSS,
        "attention_head_dim": (2, 4),
    }
    if sdxl:
        sizes |= {
            "use_linear_projection": True,
            "transformer_layers_per_block": (1, 2),
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 6 * 8 + POOLED,
        }
    return UNet2DConditionModel(**{**sizes, **changes}).eval()


def kl(**more):
    """An autoencoder of Stable Diffusion's class."""
    from diffusers import AutoencoderKL

    torch.manual_seed(3)
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        **more,
    )


def autoencoder(name):
    """`kl`: 4 channels; `kl16`: 16 with a shift, as Stable Diffusion 3's; `dc`: 32, as SANA's;
    `tiny`: 4, of a small autoencoder."""
    from diffusers import AutoencoderDC, AutoencoderTiny

    if name == "kl":
        return kl(scaling_factor=0.5)
    if name == "kl16":
        return kl(latent_channels=16, scaling_factor=1.5, shift_factor=0.06)
    torch.manual_seed(3)
    if name == "tiny":
        return AutoencoderTiny(**TINY_AUTOENCODER)
    return AutoencoderDC(**TABLES["dc"])


def random_adapter(stage: int = 1) -> SDXLAdapter:
    """SEED-X's adapter, which tells embeddings and, in the second stage, condition images apart."""
    torch.manual_seed(2)
    model = SDXLAdapter(unet(4 * stage), ResamplerXLV2(RESAMPLER)).eval()
    return spread(model, 0.5, ("resampler", "attn2", "conv_in"))


def write_sdxl(folder, *, complete: bool = True) -> Path:
    """SDXL's diffusers folder. If not `complete`: a system's, which draws in two steps, without
    `model_index.json` and the U-Net's weights."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    StableDiffusionXLPipeline(
        vae=kl(**SDXL_VAE),
        unet=unet(),
        scheduler=EulerDiscreteScheduler(**SCHEDULE, timestep_spacing="leading"),
        text_encoder=None,
        text_encoder_2=None,
        tokenizer=None,
        tokenizer_2=None,
        add_watermarker=False,
    ).save_pretrained(folder)
    if not complete:
        write_json(folder / "seed_decode.json", {"num_inference_steps": 2})
        (folder / "model_index.json").unlink()
        for file in (folder / "unet").glob("*.safetensors"):
            file.unlink()
    return folder


class PlainTower(nn.Module):
    """Pixels `[B, 3, S, S]` → embeddings `[B, (S / side)², width]`; pixels of zero are not
    embeddings of zero."""

    def __init__(self, width=FEATURES, side=4):
        super().__init__()
        torch.manual_seed(4)
        self.conv = nn.Conv2d(3, width, side, side)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.conv(pixels).flatten(2).mT


def write_sd1(folder) -> Path:
    """Stable Diffusion 1 without a safety checker."""
    from diffusers import PNDMScheduler, StableDiffusionPipeline

    StableDiffusionPipeline(
        vae=kl(),
        text_encoder=clip_text_encoder(),
        tokenizer=_clip_tokenizer(folder),
        unet=unet(sdxl=False, cross_attention_dim=TEXT_WIDTH, attention_head_dim=2),
        scheduler=PNDMScheduler(**SCHEDULE, skip_prk_steps=True, set_alpha_to_one=False),
        requires_safety_checker=False,
        safety_checker=None,
        feature_extractor=None,
    ).save_pretrained(folder)
    return folder


def clip_text_encoder():
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(2)
    config = CLIPTextConfig(
        vocab_size=len(PIECES),
        hidden_size=TEXT_WIDTH,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=TEXT_TOKENS,
        bos_token_id=START_ID,
        eos_token_id=END_ID,
        pad_token_id=END_ID,
    )
    return CLIPTextModel(config).eval()


def write_text_encoder(folder) -> Path:
    """The tokenizer and text encoder of a diffusion folder alone."""
    clip_text_encoder().save_pretrained(folder / "text_encoder")
    _clip_tokenizer(folder)
    return folder


def write_pieces(folder):
    """The files of a CLIP tokenizer whose tokens are letters."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "vocab.json", {word: id for id, word in enumerate(PIECES)})
    (folder / "merges.txt").write_text("#version: 0.2\n")


def _clip_tokenizer(folder):
    from transformers import CLIPTokenizer

    tokenizer_dir = folder / "tokenizer"
    write_pieces(tokenizer_dir)
    return CLIPTokenizer.from_pretrained(tokenizer_dir, model_max_length=TEXT_TOKENS)


def safety_checker() -> dict:
    """A safety checker that flags no image, and its preprocessing."""
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPConfig, CLIPImageProcessor

    sizes = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    vision = {**sizes, "image_size": 8, "patch_size": 4}
    torch.manual_seed(4)
    model = StableDiffusionSafetyChecker(
        CLIPConfig(text_config=sizes, vision_config=vision, projection_dim=6)
    ).eval()
    with torch.no_grad():
        # Thresholds of cosines, of which none is larger.
        model.concept_embeds_weights.fill_(2.0)
        model.special_care_embeds_weights.fill_(2.0)
    processor = CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    return {"safety_checker": model, "feature_extractor": processor}


def write_unclip(folder):
    """A stable-unCLIP with a layout decoder."""
    from diffusers import (
        DDIMScheduler,
        DDPMScheduler,
        StableUnCLIPImg2ImgPipeline,
        UNet2DConditionModel,
    )
    from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import (
        StableUnCLIPImageNormalizer,
    )

    from seed_nano.layout import LayoutConfig, LayoutDecoder

    denoiser = UNet2DConditionModel(
        **{
            **DENOISER_SIZES["UNet2DConditionModel"],
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        },
        sample_size=LATENT,
        cross_attention_dim=CROSS,
        class_embed_type="projection",
        projection_class_embeddings_input_dim=2 * EMBEDDING,
    )
    schedule = {"beta_schedule": "squaredcos_cap_v2"}
    pipeline = StableUnCLIPImg2ImgPipeline(
        feature_extractor=None,
        image_encoder=None,
        tokenizer=None,
        text_encoder=None,
        unet=denoiser,
        vae=kl(layers_per_block=1, sample_size=2 * LATENT),
        image_normalizer=StableUnCLIPImageNormalizer(embedding_dim=EMBEDDING),
        image_noising_scheduler=DDPMScheduler(**schedule),
        scheduler=DDIMScheduler(**schedule, prediction_type="v_prediction", clip_sample=False),
    )
    pipeline.save_pretrained(folder)
    labels = {"first": 2, "second": 3, "style": 2, "background": 2, "layout": 1}
    sizes = LayoutConfig(
        EMBEDDING, 4, LATENT, CROSS, labels, [[(0, 0.5, 0.5, 0.8)]], width=16, coarse=8
    )
    LayoutDecoder(sizes).save_pretrained(folder / "layout")
    write_json(folder / "seed_decode.json", {"num_inference_steps": 2, "guidance_scale": 3.0})
