"""Any vision model of transformers as a `VisionEncoder`: SigLIP, SigLIP2, DINOv2, DINOv3, CLIP, …

    HubVisionConfig(path="pretrained/siglip2-so400m-patch14-384")

Sizes and preprocessing are read from the folder (or hub id) once and then belong to the
configuration, so that a model that is saved with this encoder does not need the folder any more.
The features are the model's `last_hidden_state`.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from seed_multimodal.errors import ConfigError, ImageError, first_line
from seed_multimodal.images.transforms import PROCESSOR, ImageTransform, read_preprocessing
from seed_multimodal.nn.pretrained import CONFIG, load_library_model
from seed_multimodal.nn.vision.base import State, VisionConfig, VisionEncoder
from seed_multimodal.settings import setting
from seed_multimodal.weights.find import find_folder

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel
    from transformers.utils import ModelOutput

PREPROCESSING_ADVICE = "put that of the vision model there, or give `preprocessing` in the YAML"
ADVICE = "give the folder or hub id of a transformers vision model"
NETWORK = "network."
PATCHED = "siglip2_vision_model"  # reads patches instead of pixels (SigLIP2 NaFlex)
# Of a transformers configuration, what says nothing about the network.
NOT_SIZES = ("transformers_version", "dtype", "torch_dtype", "architectures", "_name_or_path")


@dataclass(frozen=True)
class HubVisionConfig(VisionConfig):
    """A vision model of transformers.

    path: its folder or hub id; only needed until `network` and `preprocessing` are known.
    network: its transformers configuration; empty: that of `path`.
    preprocessing: None: that of `path`.
    """

    type: str = setting("hub", choices=("hub",))
    path: str | None = None
    network: dict[str, Any] = setting(factory=dict)
    preprocessing: ImageTransform = setting(None)

    def __post_init__(self) -> None:
        if self.network and self.preprocessing:
            return
        if self.path is None:
            raise ConfigError(
                "A vision encoder of type hub needs `path`, or `network` and `preprocessing`."
            )
        folder = find_folder(self.path, (CONFIG, PROCESSOR), ADVICE)
        network = self.network or read_network(folder)
        preprocessing = self.preprocessing
        if preprocessing is None:
            preprocessing = read_preprocessing(folder, PREPROCESSING_ADVICE)
            # A file of SigLIP2 NaFlex has no image size.
            if network["model_type"] == PATCHED:
                side = network["patch_size"] * math.isqrt(network["num_patches"])
                preprocessing = dataclasses.replace(preprocessing, image_size=side)
        object.__setattr__(self, "network", network)
        object.__setattr__(self, "preprocessing", preprocessing)

    @property
    def default_weights(self) -> str | None:  # type: ignore[override]
        return self.path

    def transformers_config(self) -> PreTrainedConfig:
        """Of the network. Raises ConfigError: not one of this version of transformers."""
        from transformers import AutoConfig

        try:
            return AutoConfig.for_model(**self.network)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"The vision encoder's network: {first_line(error)}.") from error

    def with_pooled_feature(self) -> Self:
        """With the pooling head, where the network has one; the feature is its `pooler_output`."""
        network = self.network
        if "vision_use_head" in network:
            network = {**network, "vision_use_head": True}
        return dataclasses.replace(self, network=network)

    @property
    def pooled_width(self) -> int:
        pooled = self.meta_output().pooler_output
        if pooled is None:
            raise ConfigError(f"{self.network['model_type']} has no pooled feature of an image.")
        return int(pooled.shape[-1])

    def meta_output(self) -> ModelOutput:
        """The network's output for one image, without values.

        Raises ConfigError: no network for images, or not of this size.
        """
        from transformers import AutoModel

        side = self.preprocessing.image_size
        try:
            with torch.device("meta"), torch.no_grad():
                network = AutoModel.from_config(
                    self.transformers_config(), dtype=torch.get_default_dtype()
                )
                pixels = torch.zeros(1, 3, side, side, dtype=torch.float32, device="meta")
                return network(**self.network_inputs(pixels))
        except (AttributeError, RuntimeError, TypeError, ValueError) as error:
            raise ConfigError(
                f"{self.network['model_type']} encodes no images of {side} x {side} pixels "
                f"({first_line(error)})."
            ) from error

    def network_inputs(self, images: Tensor) -> dict[str, Tensor | None]:
        """Normalised pixels `[B, 3, S, S]` as the network's arguments."""
        if self.network["model_type"] != PATCHED:
            return {"pixel_values": images}

        # Patches in raster order, the values of each as (row, column, channel).
        size = self.network["patch_size"]
        patches = images.unfold(2, size, size).unfold(3, size, size)  # [B, 3, g, g, P, P]
        rows = patches.permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)  # [B, g², 3 P²]
        # Their values are read also where those of the pixels are not (`meta_output`).
        device = "cpu" if images.is_meta else images.device
        grid = torch.tensor([patches.shape[2:4]], dtype=torch.long, device=device)
        return {
            "pixel_values": rows,
            "pixel_attention_mask": None,  # no padding
            "spatial_shapes": grid.expand(len(rows), -1),
        }

    def build(self) -> HubVision:
        return HubVision(self)

    def read_weights(self, source: str) -> State:
        """The tensors of a vision model, also of one half of a CLIP or SigLIP."""
        from transformers import AutoModel

        folder = find_folder(source, (CONFIG, "*.safetensors", "*.bin", "*.index.json"), ADVICE)
        network, _ = load_library_model(
            AutoModel,
            folder,
            "vision model",
            ADVICE,
            config=self.transformers_config(),
            dtype="auto",
        )
        return {NETWORK + name: value for name, value in network.state_dict().items()}


def read_network(folder: Path) -> dict[str, Any]:
    """The configuration of a folder's vision model. Raises ConfigError: not transformers'."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"{folder}: no transformers model ({first_line(error)}).") from error
    config = getattr(config, "vision_config", config)
    # The pooling head of SigLIP is only used by `with_pooled_feature`.
    if hasattr(config, "vision_use_head"):
        config.vision_use_head = False
    values = json.loads(config.to_json_string(use_diff=False))
    return {key: value for key, value in values.items() if key not in NOT_SIZES}


class HubVision(VisionEncoder):
    """The encoder; its features are the model's `last_hidden_state`."""

    config: HubVisionConfig

    def __init__(self, config: HubVisionConfig) -> None:
        super().__init__()
        from transformers import AutoModel

        self.config = config
        sizes = config.transformers_config()
        self.network: PreTrainedModel = AutoModel.from_config(sizes)
        patch_size = getattr(sizes, "patch_size", None)
        if not isinstance(patch_size, int):
            raise ConfigError(f"{sizes.model_type}: patches of {patch_size} pixels are not read.")
        # Number and width of the tokens, as a pass without values gives them.
        features = config.meta_output().last_hidden_state
        if features.ndim != 3:
            raise ConfigError(
                f"{sizes.model_type}: its features {tuple(features.shape)} are no row of tokens "
                "for each image."
            )
        _, self.n_tokens, self.width = features.shape
        # A network that merges patches (Swin) has fewer tokens than patches.
        self.n_class_tokens = max(0, self.n_tokens - (self.image_size // patch_size) ** 2)

    def forward(self, images: Tensor) -> Tensor:
        """Normalised pixels `[B, 3, S, S]` → features `[B, N, W]`.

        Raises:
            ImageError: another size, which some of the models would accept.
        """
        return self.output(images).last_hidden_state

    def features_and_pooled(self, images: Tensor) -> tuple[Tensor, Tensor]:
        output = self.output(images)
        return output.last_hidden_state, output.pooler_output

    def output(self, images: Tensor) -> ModelOutput:
        """The network's output; arguments and errors as of `forward`."""
        if images.shape[-2:] != (self.image_size, self.image_size):
            raise ImageError(
                f"The vision encoder reads images of {self.image_size} x {self.image_size} pixels, "
                f"not {images.shape[-1]} x {images.shape[-2]}."
            )
        return self.network(**self.config.network_inputs(images))
