"""LoRA training of the language model: trained parameters, optimizer groups, the adapter's file,
the merge, the logits.

peft 0.4 listed `original_module` copies as trained; here they have no gradient and are not in the
optimizer. The recording holds references to the parameters, which later steps changed:
* the base has LoRA merged in, which is subtracted first;
* the weights are those after the two steps; those from which train.*, eval.*, left.*, gradients and
  losses were recorded are lost. Of these only the median of the logits is compared, within what two
  steps of 1.5e-4 change.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from runner import Recording, Tensors, assert_same

from seed_multimodal.language.vocabulary import ImageVocabulary
from seed_multimodal.training.config import OptimSettings
from seed_multimodal.training.llm.config import LlmModelSettings
from seed_multimodal.training.llm.lora import (
    MODULES_TO_SAVE,
    TARGET_MODULES,
    adapter_state,
    save_adapter,
)
from seed_multimodal.training.llm.model import build_llm
from seed_multimodal.training.optimizers import build_optimizer

LOGITS = (1e-4, 1e-4)  # atol, rtol


def build(case: dict[str, Any], base: Path, weights: Tensors) -> Any:
    """Base of the recorded size on disk, resized by our code, LoRA by our code, then the recorded
    weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from seed_multimodal.language.llm import LLAMA_IDS

    LlamaForCausalLM(LlamaConfig(**case["llm"], tie_word_embeddings=False)).save_pretrained(base)
    # Its table gets rows for codes and the ends of images.
    first = case["llm"]["vocab_size"]
    image_vocabulary = ImageVocabulary(
        n_text=first, n_codes=case["resized_vocab"] - first - 2, tokens_per_image=4
    )
    model = build_llm(
        LlmModelSettings(path=str(base), dtype="fp32", attention="sdpa", lora=case["lora"]),
        SimpleNamespace(vocabulary=image_vocabulary, special_ids=LLAMA_IDS),
        "cpu",
    )
    # Newer peft calls q_proj.weight q_proj.base_layer.weight.
    names: Any = {name.replace(".base_layer.", "."): name for name in model.state_dict()}
    model.load_state_dict({names[name]: value for name, value in weights.items()})
    return model


def check_parameters(model: Any, meta: dict[str, Any]) -> None:
    rows = {
        name.replace(".base_layer.", "."): (list(p.shape), p.requires_grad)
        for name, p in model.named_parameters()
    }
    assert_same(
        rows,
        {
            name: (entry["shape"], entry["trainable"] and ".original_module." not in name)
            for name, entry in meta["parameters"].items()
        },
        "parameters: shape and whether trained",
    )
    # The library's own settings are the published ones.
    original = meta["released_peft_config"]
    assert_same(list(MODULES_TO_SAVE), original["modules_to_save"], "original modules_to_save")
    assert_same(
        sorted(TARGET_MODULES), sorted(original["target_modules"]), "original target_modules"
    )
    adapter = {name: list(value.shape) for name, value in adapter_state(model).items()}
    assert_same(adapter, meta["adapter_file_keys"], "names and shapes in the adapter's file")


def check_groups(model: Any, meta: dict[str, Any]) -> None:
    """One group of all trained parameters with the recorded decay."""
    recorded = meta["optimizer"]
    settings = recorded["defaults"]
    group = recorded["groups"][0]
    optimizer = build_optimizer(
        model,
        OptimSettings(
            name="adamw_hf",
            learning_rate=settings["lr"],
            adam_beta1=settings["betas"][0],
            adam_beta2=settings["betas"][1],
            adam_epsilon=settings["eps"],
            weight_decay=group["weight_decay"],
        ),
    )
    # Copies of frozen originals are not given to it.
    names = {id(p): name for name, p in model.named_parameters()}
    assert_same(
        sorted(names[id(p)] for g in optimizer.param_groups for p in g["params"]),
        sorted(n for n in group["params"] if ".original_module." not in n),
        "parameters with weight decay",
    )
    assert_same(
        [g["weight_decay"] for g in optimizer.param_groups], [group["weight_decay"]], "groups"
    )


def check_merge(
    model: Any, base: Path, folder: Path, inputs: Tensors, want: Tensors, meta: dict[str, Any]
) -> None:
    """The merge of the base and the adapter's file."""
    from seed_multimodal.language.llm import load_llm
    from seed_multimodal.language.lora import merge_adapter

    adapter = save_adapter(model, folder / "adapter")
    out = folder / "merged"  # by the command's function, then opened as a user does
    merge_adapter(base, adapter, out, dtype="fp32")
    merged = load_llm(out)
    assert_same(
        sorted(merged.state_dict()), sorted(meta["merged_keys"]), "names in the merged model"
    )
    weights = want.part("merged.model")
    weights.compare("", (1e-5, 0.0), **{name: merged.model.state_dict()[name] for name in weights})
    with torch.no_grad():
        length = want["merged.logits"].shape[1]
        logits = merged(input_ids=inputs["input_ids"][:1, :length]).logits
    want.close("merged.logits", logits, LOGITS)


def without_lora(weights: Tensors, scale: float) -> Tensors:
    """The weights with the products of the adapter subtracted from the base."""
    parts = dict(weights)
    for name in (n for n in weights if n.endswith(".lora_A.default.weight")):
        stem = name.removesuffix("lora_A.default.weight")
        parts[f"{stem}weight"] = weights[f"{stem}weight"] - scale * (
            weights[f"{stem}lora_B.default.weight"] @ weights[name]
        )
    return parts


def check_near(model: Any, inputs: Tensors, want: Tensors) -> None:
    """The outputs after the steps are near those of the lost start."""
    model.eval()
    with torch.no_grad():
        out = model(**{key: inputs[key] for key in ("input_ids", "attention_mask", "labels")})
    real = inputs["attention_mask"].bool()  # not padding
    moved = (out.logits - want["eval.logits"])[real].abs().median()
    assert moved < 0.05 * want["eval.logits"][real].std(), (
        f"eval.logits: typically {moved:.3g} away after two steps"
    )
    # Training lowers the loss, in two small steps by little.
    assert want["eval.loss"] - 0.3 < out.loss < want["eval.loss"], (
        f"eval.loss after two steps: {out.loss:.4f}"
    )


def check(recording: Recording) -> None:
    (case, weights, inputs, want) = recording.case()
    meta = recording.meta
    weights = without_lora(weights, case["lora"]["lora_alpha"] / case["lora"]["r"])
    with tempfile.TemporaryDirectory() as work:
        base = Path(work) / "base"

        # 1. The model of our code takes the recorded weights; what it trains and saves.
        model = build(case, base, weights)
        check_parameters(model, meta)
        check_groups(model, meta)

        # 2. The adapter's file merged into the base, and the outputs before the merge.
        write_base(weights, base)
        check_merge(model, base, Path(work), inputs, want, meta)
        check_near(model, inputs, want)


def write_base(weights: Tensors, base: Path) -> None:
    """Replace the random weights of the base by the recorded ones, under the names of
    transformers."""
    from safetensors.torch import save_file

    prefix = "base_model.model."
    state = {
        name.removeprefix(prefix).replace(".original_module.", "."): value.contiguous()
        for name, value in weights.items()
        if ".lora_" not in name and ".modules_to_save." not in name
    }
    save_file(state, base / "model.safetensors", metadata={"format": "pt"})
    # Its table has the added rows, too.
    config = json.loads((base / "config.json").read_text())
    config["vocab_size"] = len(state["lm_head.weight"])
    (base / "config.json").write_text(json.dumps(config))


KINDS = {"llm_lora_training": check}
# Of weights that are lost.
UNREAD = {"llm_lora_training": ("cached.*", "grad.*", "left.*", "step2.*", "train.*")}
