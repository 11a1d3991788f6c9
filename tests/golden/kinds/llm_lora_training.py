"""LoRA training of the language model: forward, gradients, two optimizer steps, the adapter's file,
the merge.

Not compared: `cached.step_logits`, and because the reference is wrong: `left.logits` and
`left.cached_step_logits` (its attention ignores padding on the left, and a cached step attends to
the first position only). peft 0.4 listed `original_module` copies as trained; here they have no
gradient and are not in the optimizer.

Some recordings hold references to the parameters, which later steps changed:
* `merged.*` equal to the base weights: the base has LoRA merged in, which is subtracted first;
* every `step2.*` equal to the weights: the file holds the weights after the two steps; those from
  which train.*, eval.*, left.*, gradients and losses were recorded are lost. Then only the median
  of the logits is compared, within what two steps of 1.5e-4 change.
"""

import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from llm_losses import packed_loss
from runner import Tensors, assert_close, assert_gradients, assert_same
from tiny import read_json, write_json
from torch import Tensor

from seed_multimodal.language.vocabulary import ImageVocabulary
from seed_multimodal.training.config import OptimSettings
from seed_multimodal.training.llm.config import LlmModelSettings
from seed_multimodal.training.llm.lora import (
    MODULES_TO_SAVE,
    TARGET_MODULES,
    adapter_state,
    save_adapter,
)
from seed_multimodal.training.llm.loss import LossModule
from seed_multimodal.training.llm.model import build_llm
from seed_multimodal.training.optimizers import build_optimizer

LOGITS = (1e-4, 1e-4)  # atol, rtol


def build(case, base: Path, weights: Tensors):
    """Base of the recorded size on disk, resized by our code, LoRA by our code, then the recorded
    weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from seed_multimodal.language.llm import LLAMA_IDS

    LlamaForCausalLM(LlamaConfig(**case["llm"], tie_word_embeddings=False)).save_pretrained(base)
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
    names = {name.replace(".base_layer.", "."): name for name in model.state_dict()}
    missing = set(names) ^ set(weights)
    assert not missing, f"weights under other names: {sorted(missing)[:3]}"
    model.load_state_dict({names[name]: value for name, value in weights.items()})
    return model


def check_parameters(model, meta):
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
    original = meta["released_peft_config"]
    assert_same(list(MODULES_TO_SAVE), original["modules_to_save"], "original modules_to_save")
    assert_same(
        sorted(TARGET_MODULES), sorted(original["target_modules"]), "original target_modules"
    )
    adapter = {name: list(value.shape) for name, value in adapter_state(model).items()}
    assert_same(adapter, meta["adapter_file_keys"], "names and shapes in the adapter's file")


def forward(model, inputs: Tensors, train: bool = False) -> tuple[Any, Tensor]:
    """The output, and the mask of positions that are not padding."""
    model.train(train)
    with torch.no_grad():
        out = model(**{key: inputs[key] for key in ("input_ids", "attention_mask", "labels")})
    return out, inputs["attention_mask"].bool()


def check_forward(model, inputs: Tensors, want: Tensors):
    batch = SimpleNamespace(
        position_ids=None, **{k: inputs[k] for k in ("input_ids", "labels", "attention_mask")}
    )
    for mode in ("train", "eval"):
        out, real = forward(model, inputs, mode == "train")
        losses = [
            out.loss,
            *(
                packed_loss(model, batch, chunked=chunked).mean.detach()
                for chunked in (False, True)
            ),
        ]
        assert_close(out.logits[real], want[f"{mode}.logits"][real], *LOGITS, f"{mode}.logits")
        assert_close(torch.stack(losses), want[f"{mode}.loss"].expand(3), *LOGITS, f"{mode}.loss")
    with torch.no_grad():
        want.close("left.logits_no_mask", model(inputs["left.input_ids"]).logits, LOGITS)


def check_groups(model, meta):
    """One group of all trained parameters with the recorded decay; returns the optimizer."""
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
    names = {id(p): name for name, p in model.named_parameters()}
    assert_same(
        sorted(names[id(p)] for g in optimizer.param_groups for p in g["params"]),
        sorted(n for n in group["params"] if ".original_module." not in n),
        "parameters with weight decay",
    )
    assert_same(
        [g["weight_decay"] for g in optimizer.param_groups], [group["weight_decay"]], "groups"
    )
    return optimizer


def check_steps(model, inputs: Tensors, want: Tensors, meta):
    optimizer = check_groups(model, meta)
    parameters = dict(model.named_parameters())
    model.train()
    module = LossModule(model, max_logits=1)  # in chunks
    for index, (loss, norm) in enumerate(meta["two_steps_loss_and_norm_before_clipping"]):
        parts = module(inputs["input_ids"], inputs["labels"], None, inputs["attention_mask"])
        parts.mean.backward()
        assert_close(parts.mean, loss, *LOGITS, f"loss before step {index + 1}")
        if index == 0:
            assert_gradients(model, want.part("grad"), meta["grad_norms"])
        clipped = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        assert_close(clipped, norm, 1e-3, 1e-3, f"gradient norm of step {index + 1}")
        optimizer.step()
        optimizer.zero_grad()
    second = want.part("step2")
    second.compare("", (2e-5, 0), **{name: parameters[name] for name in second})


def check_merge(model, base: Path, folder, inputs: Tensors, want: Tensors, meta):
    """The merge of the base and the adapter's file."""
    from seed_multimodal.language.llm import load_llm
    from seed_multimodal.language.lora import merge_adapter

    adapter = save_adapter(model, folder / "adapter")
    out = folder / "merged"
    embedding = adapter_state(model)["base_model.model.model.embed_tokens.weight"]
    assert list(embedding.shape) == [len(want["merged.logits"][0, 0]), model.config.hidden_size]
    merge_adapter(base, adapter, out, dtype="fp32")
    merged = load_llm(out)
    assert_same(
        sorted(merged.state_dict()), sorted(meta["merged_keys"]), "names in the merged model"
    )
    for name in (n for n in want if n.startswith("merged.model.")):
        want.close(name, merged.state_dict()[name.removeprefix("merged.")], (1e-5, 0.0))
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


def are_equal(wanted: Tensors, weights: Tensors, prefix: str = "") -> bool:
    """Whether all recorded tensors equal these weights."""
    return bool(wanted) and all(
        torch.equal(value, weights[prefix + name]) for name, value in wanted.items()
    )


def check_near(model, inputs: Tensors, want: Tensors):
    """The outputs after the steps are near those of the lost start."""
    out, real = forward(model, inputs)
    moved = (out.logits - want["eval.logits"])[real].abs().median()
    assert moved < 0.05 * want["eval.logits"][real].std(), (
        f"eval.logits: typically {moved:.3g} away after two steps"
    )
    assert want["eval.loss"] - 0.3 < out.loss < want["eval.loss"], (
        f"eval.loss after two steps: {out.loss:.4f}"
    )


def check(recording):
    (case, weights, inputs, want) = recording.case()
    meta = recording.meta
    projections = {
        name: value for name, value in want.part("merged").items() if name.endswith("_proj.weight")
    }
    if are_equal(projections, weights, "base_model.model."):  # the adapter is merged into the base
        weights = without_lora(weights, case["lora"]["lora_alpha"] / case["lora"]["r"])
    with tempfile.TemporaryDirectory() as work:
        base = Path(work) / "base"
        model = build(case, base, weights)
        check_parameters(model, meta)
        write_base(weights, base)
        check_merge(model, base, Path(work), inputs, want, meta)
        if are_equal(want.part("step2"), weights):  # the recorded weights are those after the steps
            want.read.update(want)  # the others are of weights that are lost
            check_near(model, inputs, want)
            check_groups(model, meta)
            return
        check_forward(model, inputs, want)
        check_steps(model, inputs, want, meta)


def write_base(weights: Tensors, base: Path):
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
    config = read_json(base / "config.json")
    config["vocab_size"] = len(state["lm_head.weight"])
    write_json(base / "config.json", config)


KINDS = {"llm_lora_training": check}
UNREAD = {"llm_lora_training": ("left.logits", "left.cached_step_logits", "cached.step_logits")}
