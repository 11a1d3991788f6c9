"""Stages `unet` and `unet2`: the unCLIP decoder of nano, a latent U-Net that stock `StableUnCLIPImg2ImgPipeline` runs.

v-prediction under a cosine schedule that ends at a signal share of `FINAL_SIGNAL`: sampling starts from the latents
that the embedding already determines (the layout decoder), so the U-Net only has to add what they leave open. A tenth
of the conditions are dropped for guidance. Once the tokenizer is trained, `unet2` mixes in embeddings decoded from
(partly corrupted) codes, because those are what the decoder gets in use.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seed_multimodal.detokenizers.layout import LayoutDecoder
from seed_multimodal.training.distributed import ProcessGroup
from seed_multimodal.training.schedules import batch_indices
from seed_multimodal.weights import load_state_dict
from seed_nano.train.task import NanoTask
from seed_nano.train.tokenizer import load_tokenizer, pool_codes
from seed_nano.train.vae import FastGroupNorm, latents, set_group_norm
from seed_nano.train.vision import HEADS_FILE, READOUT_FILE, REDUCED, load_label_heads, pool_features
from seed_nano.train.workspace import Workspace
from seed_nano.world.targets import arranged_anchors, true_spots

TRAIN_STEPS = 1000
FINAL_SIGNAL, SUCCESSORS_SIGNAL = 0.95, 0.98  # the first noise is about twice the layout's error, so that it covers it
LAYOUT_SHARE = 3  # scenes that the layout learns from for each that the U-Net learns from: a scene costs it a quarter
CONDITIONS = (0.15, 0.6, 0.25)  # of unet2: share of true embeddings, of those of codes, of those of corrupted codes
TOKENS = 8  # side of the grid of layout tokens; attention on the latents' own grid of 16 costs four times as much
# 2 to 12 steps and guidance 1 to 4 draw equally well by the judge (docs/LOG.md): sampling starts near the layout.
DECODE_DEFAULTS = {"num_inference_steps": 4, "guidance_scale": 1.0}


def cosine_betas(steps: int = TRAIN_STEPS, final_signal: float = FINAL_SIGNAL) -> list[float]:
    """Betas whose cumulative signal share falls as cos² from 1 to `final_signal`."""
    last = math.acos(math.sqrt(final_signal))
    shares = [math.cos(last * (i / steps)) ** 2 for i in range(steps + 1)]
    return [1.0 - shares[i + 1] / shares[i] for i in range(steps)]


def new_unet(channels: Sequence[int], attends: Sequence[bool], **sizes: Any) -> Any:
    """An untrained `UNet2DConditionModel` that attends on some levels and in the middle."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        down_block_types=tuple("CrossAttnDownBlock2D" if level else "DownBlock2D" for level in attends),
        up_block_types=tuple("CrossAttnUpBlock2D" if level else "UpBlock2D" for level in reversed(attends)),
        block_out_channels=tuple(channels), norm_num_groups=8, use_linear_projection=True, **sizes)


def new_scheduler(final_signal: float) -> Any:
    """The scheduler of training and sampling."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(num_train_timesteps=TRAIN_STEPS, trained_betas=cosine_betas(final_signal=final_signal),
                         clip_sample=False, prediction_type="v_prediction", timestep_spacing="trailing",
                         set_alpha_to_one=True)


def write_successor_unet(space: Any, context: int, pooled: int, seed: int) -> None:
    """An untrained U-Net of SDXL's kind for nano's latents, the scheduler and decoding defaults, to `{decoder}`.

    Args:
        context, pooled: widths of prompt and pooled embeddings.
    """
    from diffusers import AutoencoderKL

    vae: Any = AutoencoderKL.load_config(space.autoencoder, local_files_only=True)
    sizes, folder, latent = space.config.unet, space.decoder_folder, vae["latent_channels"]
    torch.manual_seed(seed)
    attends = [level == 1 or len(sizes.channels) == 1 for level in range(len(sizes.channels))]
    new_unet(sizes.channels, attends, sample_size=space.config.image_size // 2**(len(vae["block_out_channels"]) - 1),
             in_channels=latent, out_channels=latent, layers_per_block=1, cross_attention_dim=context,
             attention_head_dim=sizes.heads, addition_embed_type="text_time", addition_time_embed_dim=8,
             projection_class_embeddings_input_dim=6 * 8 + pooled).save_pretrained(folder / "unet")
    new_scheduler(SUCCESSORS_SIGNAL).save_pretrained(folder / "scheduler")
    image_guidance = {"image_guidance_scale": 1.0} if space.system == "nano_x" else {}
    (folder / "seed_decode.json").write_text(json.dumps({**DECODE_DEFAULTS, **image_guidance}))


def build_normaliser(embeddings: Tensor) -> Any:
    """unCLIP's image normaliser with the mean and standard deviation of `embeddings [N, E]`."""
    from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer

    normaliser = StableUnCLIPImageNormalizer(embedding_dim=embeddings.shape[1])
    with torch.no_grad():
        normaliser.mean.copy_(embeddings.mean(0, keepdim=True))
        normaliser.std.copy_(embeddings.std(0, keepdim=True).clamp_min(1e-4))
    return normaliser


def class_labels(embedding: Tensor, level: Tensor, normaliser: Any, noising: Any) -> Tensor:
    """unCLIP's noised embedding and sinusoid of the level, `[B, 2E]`, as the pipeline makes them."""
    from diffusers.models.embeddings import get_timestep_embedding

    scaled = normaliser.scale(embedding)
    noised = normaliser.unscale(noising.add_noise(scaled, torch.randn_like(scaled), level))
    sinusoid = get_timestep_embedding(level, embedding.shape[1], flip_sin_to_cos=True, downscale_freq_shift=0)
    return torch.cat([noised, sinusoid], 1)


class Decoder(nn.Module):
    """U-Net and layout decoder trained together."""

    def __init__(self, unet: nn.Module, layout: LayoutDecoder) -> None:
        super().__init__()
        self.unet, self.layout = unet, layout
        layout.heads.requires_grad_(False)  # what is named has to stay what the tower means


class UnetTask(NanoTask):
    """Stage `unet`: train on latents and embeddings of the pool; goes to `{work}/unet`."""

    def __init__(self, space: Workspace, name: str = "unet") -> None:
        from diffusers import DDPMScheduler
        from diffusers.models.attention_processor import AttnProcessor

        self.out = space.work / "unet"
        self.latents, self.embeddings = latents(space), pool_features(space)
        self.spots = true_spots(space.pool)
        torch.manual_seed(space.config.seed + 3)
        unet, layout = self.start(space)
        set_group_norm(unet, FastGroupNorm).to(memory_format=torch.channels_last)
        if space.device.type == "cpu":
            unet.set_attn_processor(AttnProcessor())  # SDPA's backward in bf16 is slow on CPUs
        layout.heads.requires_grad_(False)  # labels keep the vision encoder's meaning
        self.decoder = nn.ModuleDict({"unet": unet, "layout": layout}).to(space.device)
        self.unet, self.layout = unet, layout
        self.scheduler, self.noising = new_scheduler(FINAL_SIGNAL), DDPMScheduler(beta_schedule="squaredcos_cap_v2")
        self.normaliser = build_normaliser(self.embeddings.float()).to(space.device)
        super().__init__(space, name, self.decoder)

    def start(self, space: Workspace) -> tuple[Any, LayoutDecoder]:
        """Untrained U-Net, and layout decoder whose heads and coarse image are those of stage `clip`."""
        sizes, (channels, grid), width = space.config.unet, self.latents.shape[1:3], self.embeddings.shape[-1]
        unet = new_unet(
            sizes.channels, [grid // 2**level == TOKENS for level in range(len(sizes.channels))], sample_size=grid,
            in_channels=channels, out_channels=channels, layers_per_block=sizes.layers,
            cross_attention_dim=sizes.cross_dim, attention_head_dim=sizes.heads, class_embed_type="projection",
            projection_class_embeddings_input_dim=2 * width)
        heads, readout = load_label_heads(space.work / HEADS_FILE), load_state_dict(space.work / READOUT_FILE)
        patch = next(side for side in range(max(1, grid // TOKENS), 0, -1) if grid % side == 0)
        layout = LayoutDecoder(width, channels, grid, sizes.cross_dim, heads.classes, arranged_anchors(),
                               coarse=REDUCED, patch=patch)
        layout.heads.load_state_dict(heads.state_dict())
        layout.coarse[0].load_state_dict({"weight": readout["readout"]})
        return unet, layout

    def conditions(self, chosen: Tensor) -> Tensor:
        """Embeddings `[B, E]` that the U-Net is conditioned on, of some scenes of the pool."""
        return self.embeddings[chosen].float()

    def step_loss(self, model: nn.Module, micro_step: int) -> tuple[Tensor, Mapping[str, Any]]:
        settings, device = self.settings, self.space.device
        count = settings.batch_size
        chosen = batch_indices(micro_step, LAYOUT_SHARE * count, len(self.latents), settings.seed)
        wanted, embedding = self.latents[chosen].float().to(device), self.conditions(chosen).to(device)
        mean, tokens = self.layout(embedding, self.spots[chosen].to(device))
        layout_error = F.mse_loss(mean.float(), wanted)
        x0, embedding, tokens = wanted[:count], embedding[:count], tokens[:count]
        level = torch.randint(0, 300, (count,), device=device) * (torch.rand(count, device=device) < 0.25)
        labels = class_labels(embedding, level, self.normaliser, self.noising)
        keep = (torch.rand(count, device=device) >= 0.1).float()
        noise, time = torch.randn_like(x0), torch.randint(0, TRAIN_STEPS, (count,), device=device)
        noisy = self.scheduler.add_noise(x0, noise, time)
        target = self.scheduler.get_velocity(x0, noise, time)
        output = self.unet(noisy, time, encoder_hidden_states=tokens * keep[:, None, None],
                                   class_labels=labels * keep[:, None])
        error = F.mse_loss(output.sample.float(), target)
        return error + layout_error, {"v": error.detach(), "layout": layout_error.detach()}

    def finish(self, group: ProcessGroup) -> Mapping[str, Any]:
        self.decoder.cpu()
        set_group_norm(self.unet, nn.GroupNorm)
        for model, folder in ((self.unet, "unet"), (self.scheduler, "scheduler"), (self.layout, "layout"),
                              (self.noising, "image_noising_scheduler"), (self.normaliser.cpu(), "image_normalizer")):
            model.save_pretrained(self.out / folder)
        (self.out / "seed_decode.json").write_text(json.dumps(DECODE_DEFAULTS))
        return super().finish(group)


class UnetOfCodesTask(UnetTask):
    """Stage `unet2`: train further, mostly with embeddings decoded from codes; goes to `{decoder}`."""

    def __init__(self, space: Workspace) -> None:
        self.decoded = space.cached("decoded", "tokenizer", lambda: decoded_embeddings(space))
        super().__init__(space, "unet2")
        self.out = space.decoder_folder

    def start(self, space: Workspace) -> tuple[Any, LayoutDecoder]:
        from diffusers import UNet2DConditionModel

        unet: Any = UNet2DConditionModel.from_pretrained(self.out / "unet", local_files_only=True)
        unet.register_to_config(_name_or_path="")  # else this machine's path is saved with the model
        return unet, LayoutDecoder.from_pretrained(self.out / "layout")

    def conditions(self, chosen: Tensor) -> Tensor:
        kind = torch.multinomial(torch.tensor(CONDITIONS), len(chosen), replacement=True)
        decoded = self.decoded[(kind - 1).clamp_min(0), chosen].float()
        return torch.where(kind[:, None] > 0, decoded, super().conditions(chosen))


@torch.no_grad()
def decoded_embeddings(space: Workspace, corrupt: float = 0.15) -> Tensor:
    """Embeddings float16 `[2, N, E]` of the pool's codes: as they are, and with up to 15 % of them those of another
    scene."""
    tokenizer, codes = load_tokenizer(space), pool_codes(space).long()
    generator = torch.Generator().manual_seed(space.config.seed)
    share = corrupt * torch.rand(len(codes), 1, generator=generator)
    swap = torch.rand(codes.shape, generator=generator) < share
    others = codes[torch.randperm(len(codes), generator=generator)]  # a place has codes of its own
    swapped = torch.where(swap, others, codes)
    return torch.stack([tokenizer.decode(kind, batch_size=512).half().cpu() for kind in (codes, swapped)])
