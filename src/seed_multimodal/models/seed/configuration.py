"""Sizes of the SEED tokenizers. The defaults are the original models; ours have a `config.json`."""

from __future__ import annotations

import dataclasses
from collections.abc import Container
from dataclasses import dataclass, field
from typing import ClassVar, Literal, Self

from seed_multimodal.errors import ConfigError
from seed_multimodal.nn.quantizer import QuantizerKind
from seed_multimodal.nn.vision.eva import EvaConfig
from seed_multimodal.nn.vision.registry import AnyVisionConfig
from seed_multimodal.settings import fraction, non_negative, positive, setting

AlignmentTarget = Literal["clip", "encoder"]


@dataclass(frozen=True)
class QFormerConfig:
    """Sizes of a Q-Former.

    causal_queries: with exactly so many queries the self-attention among them is causal; None: with
        all of the tokenizer's.
    """

    width: int = positive(768)
    depth: int = positive(12)
    heads: int = positive(12)
    mlp_width: int = positive(3072)
    cross_attention_freq: int = positive(2)  # every so many layers read the image
    max_positions: int = positive(512)  # of the text
    dropout: float = fraction(0.1)
    causal_queries: int | None = non_negative(None)


@dataclass(frozen=True)
class TokenizerConfig:
    """Sizes that both tokenizers have; the last four fields are ours.

    normalize_codes: compare and decode codes on the unit sphere.
    codebook_sections: 1: all positions choose from the whole codebook, as in the original;
        `num_query`: each position chooses from a section of its own.
    quantizer: vq: learned codes, as in the original; fsq, lfq: fixed ones, see `nn.quantizer`.
    fsq_levels: numbers of values in the dimensions of fsq's codes.
    """

    model_type: ClassVar[str]

    vit: AnyVisionConfig = field(default_factory=EvaConfig)
    qformer: QFormerConfig = field(default_factory=QFormerConfig)
    num_query: int = positive(32)  # codes of an image
    codebook_size: int = positive(8192)
    codebook_dim: int = positive(32)
    decode_depth: int = non_negative(4)  # blocks of the decoder
    decode_heads: int = positive(12)
    reverse_depth: int = non_negative(4)  # layers of the Reverse Q-Former
    normalize_codes: bool = False
    codebook_sections: int = positive(1)
    quantizer: QuantizerKind = "vq"
    fsq_levels: tuple[int, ...] = setting((), minimum=2)

    def __post_init__(self) -> None:
        if self.codebook_sections not in (1, self.num_query):
            raise ConfigError(
                f"codebook_sections must be 1 or num_query ({self.num_query}), got "
                f"{self.codebook_sections}."
            )
        if self.qformer.causal_queries is None:
            qformer = dataclasses.replace(self.qformer, causal_queries=self.num_query)
            object.__setattr__(self, "qformer", qformer)

    def to_dict(self) -> dict[str, object]:
        """Plain values for `config.json`."""
        return {"model_type": self.model_type, **dataclasses.asdict(self)}

    @classmethod
    def of_original(cls, names: Container[str]) -> Self:
        """Sizes of an original file that holds tensors of these names."""
        return cls()


@dataclass(frozen=True)
class Seed2Config(TokenizerConfig):
    """SEED-2: codes become one image embedding of width `image_features_dim`.

    alignment_target: whose embedding of the image it is: a CLIP's, the condition of stable unCLIP,
        or the vision encoder's own pooled feature (ours), of width `vit.pooled_width`.
    use_qformer_image: the decode head is a Reverse Q-Former of `reverse_depth` layers; False:
        `image_down`.
    recon_s: keep `pos_embed` and `blocks`, which only stage 2's reconstruction loss uses.
    """

    model_type = "seed2_tokenizer"

    reverse_depth: int = non_negative(12)
    image_features_dim: int = positive(1024)
    alignment_target: AlignmentTarget = "clip"
    use_qformer_image: bool = False
    recon_s: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alignment_target == "encoder":
            object.__setattr__(self, "vit", self.vit.with_pooled_feature())

    @property
    def reverse_qformer(self) -> QFormerConfig:
        """The Reverse Q-Former differs from the Q-Former in depth only."""
        return dataclasses.replace(self.qformer, depth=self.reverse_depth)

    @classmethod
    def of_original(cls, names: Container[str]) -> Self:
        # The original file has the head `image_down`; the published training code has the other.
        if "image_down.0.weight" in names:
            return cls()
        return cls(use_qformer_image=True, reverse_depth=4)


@dataclass(frozen=True)
class Seed1Config(TokenizerConfig):
    """SEED-1: codes become text-like embeddings, the condition of Stable Diffusion 1.

    text_tokens: embeddings of an image.
    text_features_dim: their width, that of Stable Diffusion's text encoder.
    """

    model_type = "seed1_tokenizer"

    text_tokens: int = positive(77)
    text_features_dim: int = positive(768)

    @property
    def reverse_qformer(self) -> QFormerConfig:
        """The Reverse Q-Former has another depth and full attention among its queries."""
        return dataclasses.replace(self.qformer, depth=self.reverse_depth, causal_queries=0)
