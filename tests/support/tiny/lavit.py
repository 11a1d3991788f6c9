"""LaVIT in a system folder (fixture `tiny_lavit_folder`); a tokenizer and the parts of its pixel
decoders (both kinds of the original)."""

import dataclasses
from pathlib import Path

import torch
from tensors import normal
from torch import Tensor
from yaml_tables import read_tables

from seed_multimodal.models.lavit.decoder import CodeDecoder, Head, LavitDecoderConfig
from seed_multimodal.models.lavit.modeling import DynamicTokenizer, LavitTokenizerConfig
from seed_multimodal.models.lavit.processing import HubLavitTokenizer, LavitTokenizer
from seed_multimodal.models.seed.checkpoints import load_vision
from seed_multimodal.nn.vision.eva import EvaConfig
from seed_multimodal.nn.vision.hub import HubVisionConfig
from seed_multimodal.state_dicts import save_state_dict
from seed_multimodal.weights.catalogue import VISUAL_WEIGHTS
from seed_nano.train.words import train_text_tokenizer
from tiny import spread, write_json
from tiny.diffusion import CROSS, POOLED, SCHEDULE, SDXL_VAE, kl, safety_checker, unet, write_sdxl
from tiny.language import LLM_WIDTH, llama, random_llm, write_hub_tokenizer
from tiny.vision import write_vision

CODES = 24
PATCHES = 16
SIZE = 16  # pixels a side of what the vision encoder reads
SIDE = 64  # of a square drawing
SENTENCES = [
    "a red apple beside a blue fish",
    "Question: What is this animal? Answer: It is a cat.",
    "an old photo of a horse and a small house",
    "two dogs run in the snow, near 3 trees",
] * 8
TOKENIZER = LavitTokenizerConfig(
    vit=EvaConfig(image_size=SIZE, patch_size=4, width=32, depth=2, heads=2, mlp_width=48),
    vit_head=6,
    merger_depth=2,
    merger_heads=2,
    merger_mlp_width=48,
    codebook_size=CODES,
    codebook_dim=8,
    llm_width=LLM_WIDTH,
)
DECODER = LavitDecoderConfig(
    tokens=PATCHES,
    code_dim=8,
    width=24,
    depth=1,
    heads=2,
    mlp_width=32,
    feature_dim=32,
    prompt_dim=CROSS - POOLED,
    pooled_dim=POOLED,
)
CONDITION_TOKENS = 8
EMPTY_TOKENS = 5  # embeddings of the empty text


def visual_weight(model) -> dict[str, Tensor]:
    """Tensors of `visual_weight`: token merger and projector."""
    names = ("causal_encoder.", "vit_proj.")
    return {key: value for key, value in model.state_dict().items() if key.startswith(names)}


def build_lavit(folder: str | Path, hub: bool = False) -> Path:
    """Write a system folder and return it; `hub`: with a Qwen 3 and a hub tokenizer."""
    root = Path(folder)
    write = write_hub_language if hub else write_language
    write(root / "llm")
    # Understanding has a merger of its own, trained with the language model.
    second = dynamic_tokenizer(merger_seed=101)
    dynamic_tokenizer().save_pretrained(root / "tokenizer")
    save_state_dict(visual_weight(second), root / "tokenizer" / VISUAL_WEIGHTS)
    torch.manual_seed(0)
    spread(CodeDecoder(DECODER)).eval().save_pretrained(root / "decoder")
    write_pixels(root / "pixels")
    write_json(root / "system.json", read_tables(__file__))
    return root


def dynamic_tokenizer(merger_seed: int | None = None) -> DynamicTokenizer:
    """A tokenizer; `merger_seed`: of a different token merger and projector."""
    torch.manual_seed(0)
    model = spread(DynamicTokenizer(TOKENIZER))
    if merger_seed is not None:
        torch.manual_seed(merger_seed)
        spread(model.causal_encoder)
        spread(model.vit_proj)
    return model.requires_grad_(False).eval()


def small_tokenizer(seed=0) -> DynamicTokenizer:
    """Built in milliseconds; about half of the tokens are selected, by clear margins, and counts
    differ by image."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = DynamicTokenizer(TOKENIZER)
        with torch.no_grad():
            for layer in (model.token_predictor.in_conv[1], *model.token_predictor.out_conv[:4:2]):
                layer.weight.mul_(3)
            last = model.token_predictor.out_conv[4]
            last.weight.mul_(20)
            last.bias.zero_()
            # The middle of the selector's scores becomes its threshold.
            features = model.patch_features(torch.randn(8, 3, SIZE, SIZE))
            lead = model.token_predictor(features)
            last.bias[0] = -(lead[..., 0] - lead[..., 1]).median()
    return model.requires_grad_(False).eval()


def write_tokenizer_of(kind: str, folder, config, **sizes: int) -> DynamicTokenizer:
    """`folder/tokenizer` of one of transformers' vision encoders (`folder/vision`)."""
    write_vision(kind, folder / "vision", **sizes)
    vit = HubVisionConfig(path=str(folder / "vision"))
    torch.manual_seed(0)
    model = spread(DynamicTokenizer(dataclasses.replace(config, vit=vit, vit_head=0))).eval()
    load_vision(model.encoder, folder / "vision", None)
    model.save_pretrained(folder / "tokenizer")
    return model


def write_hub_language(folder) -> HubLavitTokenizer:
    """As `write_language`."""
    hub = write_hub_tokenizer(folder, SENTENCES)
    HubLavitTokenizer.create(hub, CODES, PATCHES).save_pretrained(folder)
    tokenizer = HubLavitTokenizer.from_pretrained(folder)
    ids = dict(tokenizer.special_ids)
    random_llm("qwen3", len(tokenizer), **ids).save_pretrained(folder)
    return tokenizer


def write_language(folder) -> LavitTokenizer:
    """A language model with its tokenizer in the same folder."""
    tokenizer = train_text_tokenizer(LavitTokenizer, SENTENCES, folder, 330, CODES, PATCHES)
    torch.manual_seed(0)
    llama(tokenizer.vocabulary.size, mlp_width=48, context=256).save_pretrained(folder)
    return tokenizer


def write_pixels(folder):
    """The pixel decoder of the system."""
    from diffusers import DDIMScheduler

    write_sdxl(folder, complete=False)
    unet(sample_size=SIDE // 2).save_pretrained(folder / "unet")
    DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1).save_pretrained(
        folder / "scheduler"
    )


def empty_text() -> Tensor:
    return normal(2, 1, EMPTY_TOKENS, CROSS)


def write_lavit_diffusion(folder, head: Head) -> Path:
    """`{vae,scheduler,unet}`; for the low-resolution head also the empty text's embeddings and a
    safety checker that flags nothing."""
    from diffusers import DDIMScheduler

    kl(**SDXL_VAE).save_pretrained(folder / "vae")
    scheduler = DDIMScheduler(**SCHEDULE, clip_sample=False, set_alpha_to_one=False)
    scheduler.save_pretrained(folder / "scheduler")
    # It tells conditions apart.
    network = spread(unet(sdxl=head == "highres"), 0.5, ("attn2", "add_embedding"))
    network.save_pretrained(folder / "unet", safe_serialization=False)
    if head == "lowres":
        torch.save(empty_text(), folder / "uncond_embeddings.bin")
        for name, part in safety_checker().items():
            part.save_pretrained(folder / name)
    return folder


def code_decoder(head: Head = "highres") -> CodeDecoder:
    """The head in front of a pixel decoder, for codes of `small_tokenizer`."""
    torch.manual_seed(7)
    model = CodeDecoder(dataclasses.replace(DECODER, head=head)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model
