"""`seed eval tokenizer` of SEED-2: retrieval before and after quantization, decoded embeddings.

Retrieval is measured with features before quantization and from codes; the difference is due to the
codebook.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from seed_multimodal.device import Runtime
from seed_multimodal.errors import CheckpointError
from seed_multimodal.evaluation.clip import ClipEncoder, TextEncoder
from seed_multimodal.evaluation.tokenizer import NONE, OpenedTokenizer, Route
from seed_multimodal.evaluation.tokenizer_settings import TokenizerSettings
from seed_multimodal.models.seed.captions import caption_text, load_caption_tokenizer
from seed_multimodal.models.seed.checkpoints import VISION
from seed_multimodal.models.seed.modeling import Seed2Tokenizer
from seed_multimodal.models.seed.pipeline import SeedImageCodec
from seed_multimodal.models.seed.spec import SeedLlamaConfig
from seed_multimodal.nn.pretrained import without_memory
from seed_multimodal.nn.vision.clip import CLIP_FOLDER
from seed_multimodal.recipes.seed.losses import Stage1Model, Stage1TrainingOptions
from seed_multimodal.state_dicts import assign_strictly, load_state_dict, require_tensor
from seed_multimodal.weights.find import locate

BERT = Path("pretrained/bert-base-uncased")
MAX_PIECES = 35  # maximum text length, as in LAVIS
STAGE1_IGNORED = ("Qformer.cls.*", "itm_head.*", "embedding_head.*")
WORDS_TABLE = "Qformer.bert.embeddings.word_embeddings.weight"


@dataclass
class PooledEncoder:
    """A tokenizer's own vision encoder, whose feature of an image it decodes to."""

    codec: SeedImageCodec

    @torch.no_grad()
    def embed(self, images: Sequence[Image.Image]) -> Tensor:
        """Pooled features of images of any sizes, float32 [N, E]."""
        tokenizer = self.codec.model
        pixels = self.codec.transform.batch(images).to(tokenizer.device, tokenizer.dtype)
        return tokenizer.visual_encoder.features_and_pooled(pixels)[1].float()


class OpenedSeed2(OpenedTokenizer):
    """SEED-2's tokenizer, with the text path of its first stage and what it aims at.

    Further features:

    decoded [B, E], mse [B]: see `Pass`.
    causal [B, P], rebuilt [B, P]: unit features of the last query under stage 1, before the codes
        and from them.
    """

    codec: SeedImageCodec
    network: Seed2Tokenizer
    has_stage1 = True
    routes = {
        "causal_embeddings": Route(
            "causal", "stage1", "last query of the Q-Former, before the codes"
        ),
        "codes_by_blocks": Route("rebuilt", "stage1", "codes, queries rebuilt by stage 2's blocks"),
        "codes_by_embedding": Route("decoded", "clip", "codes, decoded image embedding"),
        "images_by_clip": Route(
            "target", "clip", "the images under CLIP, what the decoded embedding aims at"
        ),
    }

    def __init__(
        self,
        config: SeedLlamaConfig,
        codec: SeedImageCodec,
        runtime: Runtime,
        settings: TokenizerSettings,
    ) -> None:
        if not isinstance(codec.model, Seed2Tokenizer):
            raise CheckpointError(f"{config.name}: is a SEED-1 tokenizer; this measures SEED-2's.")
        sizes = codec.model.config
        aims_at_encoder = sizes.alignment_target == "encoder"
        has_clip = settings.clip not in (None, NONE) or settings.clip_text is not None
        if aims_at_encoder and has_clip:
            raise CheckpointError(
                f"{config.name}: decodes to embeddings of its vision encoder, not of a CLIP: leave "
                "out --clip and --clip-text."
            )
        super().__init__(config, codec, runtime, settings)

        # 1. The target's embeddings have the width of the decoded ones.
        width = sizes.image_features_dim
        if aims_at_encoder:
            self.target = PooledEncoder(codec)
            self.target_source = "the tokenizer's vision encoder"
        elif isinstance(self.target, ClipEncoder):
            clip_width = self.target.model.config.projection_dim
            _check_width(self.target_source, "image", clip_width, width)
        if settings.clip_text is not None:
            text_width = self.texts["clip"](["a"]).shape[1]
            _check_width(settings.clip_text, "text", text_width, width)

        # 2. Stage 1, by default with the word pieces in the tokenizer's folder, else BERT's.
        self.stage1: Stage1Model | None = None
        if settings.stage1 is not None:
            folder = config.path("tokenizer")
            pieces: str | Path = BERT if BERT.is_dir() else BERT.name
            if (folder / "tokenizer.model").is_file():
                pieces = folder
            self.stage1 = load_stage1(settings.stage1, self.network)
            self.texts["stage1"] = stage1_texts(self.stage1, settings.text_tokenizer or pieces)

    def default_clip(self) -> Path | None:
        """The CLIP encoder in the de-tokenizer's folder, else the original one."""
        if self.network.config.alignment_target == "encoder":
            return None
        decoder_folder = self.codec.decoder_folder
        if decoder_folder is not None and (decoder_folder / "image_encoder/config.json").is_file():
            return decoder_folder / "image_encoder"
        return locate(f"pretrained/{CLIP_FOLDER}")

    @torch.no_grad()
    def features(self, images: Sequence[Image.Image]) -> dict[str, Tensor]:
        tokenizer = self.network
        pixels = self.codec.transform.batch(images)
        pixels = pixels.to(tokenizer.device, tokenizer.dtype)  # [B, 3, S, S]

        # 1. Codes, and the embedding that is decoded from them.
        vision = tokenizer.visual_encoder(pixels)
        down = tokenizer.encode_task_layer(tokenizer.query_features_from(vision))
        codes = tokenizer.quantize.nearest(down)  # [B, 32]
        up = tokenizer.decode_task_layer(tokenizer.quantize.lookup(codes))
        decoded = tokenizer.project(tokenizer.decoder_tokens(up)).float()  # [B, E]
        features = {"codes": codes, "decoded": F.normalize(decoded, dim=-1)}

        # 2. The embedding that it aims at.
        if self.target is not None:
            target = self.target.embed(images)
            features["target"] = F.normalize(target, dim=-1)
            features["mse"] = (decoded - target).square().mean(1)

        # 3. Queries under stage 1: only the last one attends to all others.
        stage1 = self.stage1
        if stage1 is not None:
            stage1_vision = vision
            if stage1.visual_encoder is not tokenizer.visual_encoder:
                stage1_vision = stage1.visual_encoder(pixels)
            queries = {"causal": stage1.query_features_from(stage1_vision)}
            if tokenizer.config.recon_s:
                queries["rebuilt"] = tokenizer.rebuild_queries(up)
            for name, query_features in queries.items():
                last_query = stage1.vision_proj(query_features[:, -1])
                features[name] = F.normalize(last_query, dim=-1).float()
        return features


def _check_width(source: object, what: str, has: int, needs: int) -> None:
    if has != needs:
        raise CheckpointError(
            f"{source}: gives {what} embeddings of width {has}, this tokenizer decodes to width "
            f"{needs}: they do not belong together."
        )


def stage1_texts(model: Stage1Model, tokenizer: str | Path) -> TextEncoder:
    """Stage 1's text path (`blip_caption`, word pieces, first token, projection).

    Args:
        tokenizer: folder or hub id of stage 1's BERT or multimodal tokenizer.

    Raises:
        CheckpointError: no tokenizer, or one of another size.
    """
    pieces = load_caption_tokenizer(tokenizer, MAX_PIECES, full=False)
    size = model.Qformer.bert.embeddings.word_embeddings.num_embeddings
    if size not in (pieces.size, pieces.size - 1):  # the row of [DEC] may be missing
        raise CheckpointError(
            f"{tokenizer}: has {pieces.size - 1} word pieces; the stage-1 checkpoint's word table "
            f"has {size} rows (one more than the pieces is right); name stage 1's by "
            "--text-tokenizer."
        )

    @torch.no_grad()
    def embed(texts: Sequence[str]) -> Tensor:
        ids, mask = pieces([caption_text(text) for text in texts])
        device = model.query_tokens.device
        return model.text_features(ids.to(device), mask.to(device))

    return embed


def load_stage1(file: str | Path, tokenizer: Seed2Tokenizer) -> Stage1Model:
    """A stage-1 checkpoint in eval mode on the tokenizer's device.

    It gets the tokenizer's vision encoder if the file has none.

    Raises:
        CheckpointError: not a stage-1 checkpoint, or of other sizes than the tokenizer.
    """
    # 1. A model of the file's sizes, without memory for its initial weights; without a vision
    #    encoder of its own it gets the tokenizer's.
    state = load_state_dict(file)
    for name in (WORDS_TABLE, "text_proj.weight", "vision_proj.weight"):
        require_tensor(state, name, file, "a stage-1 checkpoint")
    model = without_memory(
        lambda: Stage1Model(
            tokenizer.config,
            options=Stage1TrainingOptions(
                embed_dim=len(state["vision_proj.weight"]), lm_head=False
            ),
            vocab_size=len(state[WORDS_TABLE]),
        )
    )
    has_vision = any(name.startswith(VISION) for name in state)
    if not has_vision:
        model.visual_encoder = tokenizer.visual_encoder

    # 2. Its weights.
    vit = tokenizer.config.vit
    assign_strictly(
        model,
        vit.fit_weights(state, VISION),
        file,
        allow_missing=["*position_ids"] if has_vision else ["*position_ids", f"{VISION}*"],
        allow_unexpected=[*STAGE1_IGNORED, *(VISION + name for name in vit.unused)],
        foreign=True,
    )
    return model.to(tokenizer.device, tokenizer.dtype).requires_grad_(False).eval()
