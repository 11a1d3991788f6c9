"""Which prompts a run tunes its model with: those of the model that is trained, or as the data or a source say."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from seed_multimodal.data.stream.config import LlmDataSettings, prompted_sources, with_template
from seed_multimodal.disk import read_json_object
from seed_multimodal.errors import ConfigError
from seed_multimodal.language.prompts import template_for
from seed_multimodal.training.llm.model_settings import LlmModelSettings, find_folder


def template_of(model: LlmModelSettings) -> str:
    """The template of a model: set, or by its width, as at inference."""
    if model.template is not None:
        return model.template
    sizes: Mapping[str, Any] = model.sizes or {}
    config = find_folder(str(model.path)) / "config.json"
    if model.path is not None and config.is_file():
        sizes = read_json_object(config, ConfigError)
    return template_for(sizes.get("hidden_size"))


def with_prompts(data: LlmDataSettings, model: LlmModelSettings, tokenizer: Path) -> tuple[LlmDataSettings, list[str]]:
    """The data's settings with the model's template where they leave it open, and what is said of it.

    Args:
        tokenizer: its folder; the `system.json` beside or in it, if there is one, says how its system asks.
    """
    own = template_of(model)
    data = with_template(data, own)
    used = {source.name: source.options["template"] for source in prompted_sources(data)}
    if not used:
        return data, []
    tuned = " and ".join(sorted(set(used.values())))
    remarks = [f"questions and answers are in the prompts of {tuned}."]
    for template in sorted(set(used.values()) - {own}):
        names = ", ".join(name for name, one in used.items() if one == template)
        remarks.append(f"warning: {names} has the template {template}, but the model that is trained has {own} "
                       f"(model.template).")
    file = next((place / "system.json" for place in (tokenizer, tokenizer.parent) if (place / "system.json").is_file()),
                None)
    asked = read_json_object(file, ConfigError).get("template", "vicuna") if file is not None else None
    if asked is not None and set(used.values()) != {asked}:
        remarks.append(f"warning: the tokenizer's system {file} asks with the template {asked}, and this run tunes "
                       f"with {tuned}; give the tuned model's system the same template.")
    return data, remarks
