"""SEED-X's parts out of their files, checked to belong together."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from seed_multimodal.device import Runtime
from seed_multimodal.disk import read_json_object
from seed_multimodal.errors import CheckpointError, ConfigError
from seed_multimodal.language.llama import load_llm
from seed_multimodal.language.lora import merge_into
from seed_multimodal.language.seed_x import seed_x_words
from seed_multimodal.seed_x.modeling import AgentSettings, ContinuousLVLM, load_agent
from seed_multimodal.seed_x.views import AnyResolution, read_grids
from seed_multimodal.seed_x.vision import INPUT_RESAMPLER, OUTPUT_RESAMPLER, QwenVit, Resampler, ResamplerConfig
from seed_multimodal.settings import read_settings
from seed_multimodal.system.config import SystemConfig
from seed_multimodal.system.domain import load_domain
from seed_multimodal.systems.picture_half import off_loaded
from seed_multimodal.systems.seed_x_pictures import FeaturePictures

if TYPE_CHECKING:
    from seed_multimodal.language.tokenizer import MultimodalTokenizer
    from seed_multimodal.seed_x.diffusion import SdxlDetokenizer


@dataclass(frozen=True)
class AgentSizes:
    """`agent/config.json`: sizes of both resamplers, and `AgentSettings`; the defaults are the original ones."""

    input_resampler: ResamplerConfig = INPUT_RESAMPLER
    output_resampler: ResamplerConfig = OUTPUT_RESAMPLER
    settings: AgentSettings = AgentSettings()


def read_agent_sizes(spec: SystemConfig) -> AgentSizes:
    """Sizes of a system's agent: given, beside its weights (`config.json`, of a tuning `agent.json`), or the original
    ones."""
    if spec.sizes.get("agent") is not None:
        sizes: AgentSizes = spec.sizes["agent"]
        return sizes
    folder = _agent_folder(spec)
    if (folder / "config.json").is_file():
        return read_settings(AgentSizes, read_json_object(folder / "config.json", ConfigError), f"{folder}/config.json")
    tuned = _tuned(folder)
    given: dict[str, Any] = {key: tuned[key] for key in ("input_resampler", "output_resampler") if key in tuned}
    return read_settings(AgentSizes, {**given, "settings": tuned.get("losses", {})}, f"{folder}/agent.json")


def read_lora(spec: SystemConfig) -> Mapping[str, Any] | None:
    """Fields of the LoRA that the agent was tuned with; None for none."""
    found = spec.lora if spec.lora is not None else _tuned(_agent_folder(spec)).get("lora")
    if found is not None and not isinstance(found, Mapping):
        raise ConfigError(f"{spec.agent}/agent.json: lora must hold the fields of a LoRA.")
    return found


def _agent_folder(spec: SystemConfig) -> Path:
    assert spec.agent is not None
    return spec.agent if spec.agent.is_dir() else spec.agent.parent


def _tuned(folder: Path) -> dict[str, Any]:
    """The `agent.json` of a tuning's checkpoint; empty for other agents."""
    file = folder / "agent.json"
    return read_json_object(file, ConfigError) if file.is_file() else {}


def load_agent_model(spec: SystemConfig, words: MultimodalTokenizer, runtime: Runtime, quantization: str | None = None,
                     offload_llm: bool = False) -> ContinuousLVLM:
    """The language model with its two resamplers, in eval mode and frozen.

    Args:
        quantization: "8bit" or "4bit", of the language model alone.
        offload_llm: the language model is read onto the CPU.

    Raises:
        CheckpointError: missing or damaged files, or parts of different sizes. ConfigError: another tokenizer.
    """
    assert spec.llm is not None and spec.agent is not None
    vocabulary = seed_x_words(words)
    llm = load_llm(spec.llm, device="cpu" if offload_llm else runtime.device, dtype=runtime.dtype,
                   quantization=quantization, vocabulary=vocabulary)
    sizes = read_agent_sizes(spec)
    read, write = sizes.input_resampler, sizes.output_resampler
    for what, here, there in (
            ("input resampler writes", read.embed_dim, llm.config.hidden_size),
            ("output resampler reads", write.kv_dim or write.embed_dim, llm.config.hidden_size)):
        if here != there:
            raise CheckpointError(f"{spec.agent}: its {what} width {here}, but the language model {spec.llm} has width "
                                  f"{there}; they do not belong together.")
    for config in (read, write):
        if config.grid_size**2 != vocabulary.tokens_per_image:
            raise CheckpointError(f"{spec.agent}: its resamplers give {config.grid_size**2} embeddings of a picture, "
                                  f"but the tokenizer has {vocabulary.tokens_per_image} words for them.")
    fields = read_lora(spec)
    if fields is not None and quantization is not None:
        raise ConfigError(f"{spec.agent}: a LoRA is put into the language model's weights, so these cannot be in "
                          f"{quantization}: leave the quantisation out, or take the folder that "
                          f"src/tools/merge_lora_weights.py makes of both once, with {quantization}.")
    if fields is not None:
        merge_into(llm, spec.agent, fields)
    agent = ContinuousLVLM(llm, Resampler(read), Resampler(write), sizes.settings)
    load_agent(agent, spec.agent, language=fields is None)
    for part in (agent.input_resampler, agent.output_resampler):
        part.to(runtime.device, runtime.dtype)
    if sizes.settings.add_patch_pos:
        agent.patch_pos_embed.data = agent.patch_pos_embed.data.to(runtime.device, runtime.dtype)
    return agent.requires_grad_(False).eval()


def load_pictures(spec: SystemConfig, here: Runtime, there: Runtime, load_decoder: bool = True,
                  offload: bool | Collection[str] = False) -> FeaturePictures:
    """The picture half: the tower now, the de-tokenizer when it is first needed.

    Args:
        here, there: where pictures are read and drawn.

    Raises:
        CheckpointError: a tower that is missing, damaged, or of another width than the agent.
    """
    tower = load_tower(spec, here, offload)
    wanted = read_agent_sizes(spec)
    reads = wanted.input_resampler.kv_dim or wanted.input_resampler.embed_dim
    if tower.config.output_dim != reads:
        raise CheckpointError(f"{spec.vision}: the tower's features have width {tower.config.output_dim}, but the "
                              f"agent {spec.agent} reads width {reads}; they do not belong together.")
    return pictures_of(spec, tower, wanted.output_resampler.embed_dim, here, there, load_decoder, offload)


def load_rebuilder(spec: SystemConfig, here: Runtime, there: Runtime,
                   offload: bool | Collection[str] = False) -> FeaturePictures:
    """As `load_pictures`, of a system of which tower and de-tokenizer alone are there: pictures are drawn again."""
    tower = load_tower(spec, here, offload)
    return pictures_of(spec, tower, tower.config.output_dim, here, there, True, offload)


def load_tower(spec: SystemConfig, here: Runtime, offload: bool | Collection[str] = False) -> QwenVit:
    """The vision tower; errors as `QwenVit.from_pretrained`."""
    assert spec.vision is not None
    device = "cpu" if "encoder" in off_loaded(offload) else here.device
    return QwenVit.from_pretrained(spec.vision, config=spec.sizes.get("vision"), device=device, dtype=here.dtype)


def pictures_of(spec: SystemConfig, tower: QwenVit, width: int, here: Runtime, there: Runtime, load_decoder: bool,
                offload: bool | Collection[str]) -> FeaturePictures:
    """The picture half around a tower; `width`: of the features that are drawn."""
    size, leaves = tower.config.image_size, off_loaded(offload)
    load = None
    if load_decoder and spec.detokenizer is not None:
        load = partial(open_decoder, spec, width, there)
    largest = max(max(grid) for grid in read_grids(spec.grids))
    half = FeaturePictures(tower, AnyResolution(size, spec.grids), AnyResolution(size, spec.edit_grids),
                           load_decoder=load, device=here.device, drawing_device=there.device,
                           at_least=2 * size * largest, offload_encoder="encoder" in leaves,
                           offload_decoder="decoder" in leaves)
    half.domain = load_domain(spec.domain, spec.domain_threshold)
    return half


def open_decoder(spec: SystemConfig, width: int, there: Runtime) -> SdxlDetokenizer:
    """SDXL with the adapter.

    Args:
        width: of the features that are drawn.

    Raises:
        CheckpointError: missing or damaged files, an adapter of another width.
    """
    from seed_multimodal.seed_x.diffusion import SdxlDetokenizer

    spec.require("sdxl", "detokenizer")
    assert spec.sdxl is not None and spec.detokenizer is not None
    made = SdxlDetokenizer.from_pretrained(spec.sdxl, spec.detokenizer, device=torch.device("cpu"), dtype=there.dtype,
                                           sizes=spec.sizes.get("detokenizer"))
    if made.embedding_dim != width:
        raise CheckpointError(f"{spec.detokenizer}: reads features of width {made.embedding_dim}, but they have width "
                              f"{width} here; the parts do not belong together.")
    return made
