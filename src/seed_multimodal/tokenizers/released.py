"""The released layouts: the files of each tokenizer, their origin, and their further contents.

    SEED-2    seed_quantizer.pt (no vision tower) + eva_vit_g.pth
    SEED-1    causal_qformer.pth + seed_tokenizer.pth (`{"model": …}` each, the second laid over the first)
              + eva_vit_g.pth

`eva_vit_g.pth` has 40 blocks, of which the first 39 are used. All names are data: no model class is imported here.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from seed_multimodal.tokenizers.tokenizer_config import QUERY_LAYERS

OURS = "model.safetensors"
TOWER = "visual_encoder."
ENCODER_PARTS = ("visual_encoder", "ln_vision", "Qformer", "query_tokens")
VISION_FILES = ("eva_vit_g.safetensors", "eva_vit_g.pth")
VISION_URL = "https://storage.googleapis.com/sfr-vision-language-research/LAVIS/models/BLIP2/eva_vit_g.pth"
# Tensors of stage 1's text path and heads, of target towers, and of a moving-average codebook: only training uses them.
TRAINING_ONLY = (
    "text_proj.*", "vision_proj.*", "itm_head.*", "temp", "text_encoder.*", "clip_model.*", "embedding_head.*",
    "quantize.ema_*", "Qformer.cls.*", "Qformer.bert.embeddings.word_embeddings.*",
    "Qformer.bert.embeddings.position_embeddings.*", f"{QUERY_LAYERS}.*.intermediate.*", f"{QUERY_LAYERS}.*.output.*")
IMAGE_BRANCH = ("distill_image_proj.*", "image_down.*", "blocks_image.*", "pos_embed_image")
TEXT_BRANCH = ("Reverse_Qformer_text.*", "reverse_tokens_text", "distill_text_proj.*", "blocks_text.*",
               "pos_embed_text")
REBUILDING = ("pos_embed", "blocks.*")  # of the Q-Former's output, in stage 2's loss only
IGNORED_IN_TOWER = ("norm.*", "fc_norm.*", "head.*", "mask_token", "rel_pos_bias.*", "lm_head.*")


@dataclass(frozen=True)
class ReleasedLayout:
    """How one tokenizer was released.

    Attributes:
        name: the model's in messages; `noun`: what a folder should hold.
        files: of each file but the vision tower's its names, safetensors first; later files are laid over earlier
            ones, the last is the one to open.
        needed: tensors without which a checkpoint is not this model's; the first is the decode side's own.
        ends_in: what `needed[0]` makes, for the sentence about another model's checkpoint.
        loader: name of the class that reads it; `also`: what else a user can do with its folder.
        where: which of its files come from where, as in "put … into".
        on_hub: whether a hub id may be given instead of a folder.
        usual: the folder suggested where none is there.
        wrapped: the released files hold `{"model": tensors}` (the tower's never does).
    """

    name: str
    noun: str
    files: tuple[tuple[str, str], ...]
    needed: tuple[str, ...]
    ends_in: str
    loader: str
    where: str
    also: str = ""
    on_hub: bool = False
    usual: str = ""
    wrapped: bool = False

    @property
    def main(self) -> str:
        """The released name of the file to open."""
        return self.files[-1][-1]

    def advice(self, folder: str | Path, *, missing: bool = False) -> str:
        """What to download for `folder`, without a full stop; `missing`: it is not there, so the usual one will do."""
        into = f"a folder such as {self.usual} and give its path" if missing and self.usual else folder
        return f"put {self.where} and {VISION_FILES[-1]} (from {VISION_URL}) into {into}"


SEED2 = ReleasedLayout(
    "SEED-2", "tokenizer", (("seed_quantizer.safetensors", "seed_quantizer.pt"),),
    ("distill_image_proj.weight", "query_tokens"), "one image embedding", "Seed2Tokenizer",
    "seed_quantizer.pt (from AILab-CVC/seed-tokenizer-2 on the Hugging Face hub)", on_hub=True,
    usual="pretrained/seed_tokenizer")
SEED1 = ReleasedLayout(
    "SEED-1", "SEED-1 tokenizer", (("causal_qformer.safetensors", "causal_qformer.pth"),
                                   ("seed_tokenizer.safetensors", "seed_tokenizer.pth")),
    ("distill_text_proj.weight", "reverse_tokens"), "text-like embeddings", "Seed1Tokenizer",
    "causal_qformer.pth and seed_tokenizer.pth (the two files that SEED-1.md of github.com/AILab-CVC/SEED links to)",
    also="draw with it: python demo_recon.py --model", wrapped=True)
LAYOUTS = (SEED2, SEED1)
