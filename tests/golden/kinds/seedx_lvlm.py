"""Kind `seedx_lvlm`: the agent's losses, activations and gradients; generation; the rule of image runs.

Left out: activations at padding, which the original lets see everything before them and ours does not (no loss looks
there); scores of the logits processor as numbers, since ours forbids by -inf what the original sets to 0 (checked: the
same words are forbidden, the same one is forced).
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from runner import assert_close, assert_same, read_json, read_tensors
from seedx_common import seedx_tokenizer

from seed_multimodal.language.answer import ImagePart, split_answer
from seed_multimodal.language.generation import GenerationSettings, HiddenStates, ImageSpans, Prompt, generate
from seed_multimodal.language.llama import ROTARY, force_special_ids
from seed_multimodal.seed_x.modeling import AgentSettings, ContinuousLVLM
from seed_multimodal.seed_x.processing import answer_text
from seed_multimodal.seed_x.vision import Resampler, ResamplerConfig
from seed_multimodal.weights import assign_strictly

KIND = "seedx_lvlm"
LOSSES = ("total_loss", "lm_loss", "rec_loss")


def check(folder: Path) -> None:
    config, meta = read_json(folder / "config.json"), read_json(folder / "meta.json")
    weights, inputs, outputs = (read_tensors(folder / f"{name}.safetensors")
                                for name in ("weights", "inputs", "outputs"))
    tokens = config["resampler"]["grid_size"] ** 2
    for variant in config["variants"]:
        check_losses(variant, build(config, weights, variant), inputs, outputs, meta)
    model = build(config, weights, "released")
    with tempfile.TemporaryDirectory() as place:
        tokenizer = seedx_tokenizer(folder, tokens, Path(place, "tokenizer"))
    check_processor(meta, inputs, tokenizer)
    for case in meta["generation"]:
        check_generation(case, model, weights, inputs, outputs, tokenizer)


def build(config: dict[str, Any], weights: dict[str, torch.Tensor], variant: str) -> ContinuousLVLM:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes, settings = config["resampler"], AgentSettings(**config["variants"][variant])
    grid, heads, vision, width = (*(sizes[k] for k in ("grid_size", "num_heads", "vision_dim")),
                                  config["llm"]["hidden_size"])
    llm = LlamaForCausalLM(LlamaConfig(**config["llm"]))
    force_special_ids(llm)
    model = ContinuousLVLM(llm, Resampler(ResamplerConfig(grid, width, heads, vision)),
                           Resampler(ResamplerConfig(grid, vision, heads, width)), settings)
    state = {name.removeprefix("released."): value for name, value in weights.items() if name.startswith("released.")}
    ignored = [f"*{ROTARY}"] + ([] if settings.add_patch_pos else ["patch_pos_embed"])
    assign_strictly(model, state, "weights", allow_unexpected=ignored)
    return model


def scenario_batch(name: str, variant: str, inputs: dict[str, torch.Tensor], model: ContinuousLVLM) -> dict[str, Any]:
    batch: dict[str, Any] = {key.removeprefix(f"{name}."): value for key, value in inputs.items()
                             if key.startswith(f"{name}.")}
    for key in ("image_embeds", "embeds_gen_mask", "embeds_cmp_mask"):
        batch.setdefault(key, None)
    if not model.settings.vit_down and batch["image_embeds"] is not None:
        batch["image_embeds"] = batch["image_embeds"][:, :model.output_resampler.query.shape[0]]
    return batch


def check_losses(variant: str, model: ContinuousLVLM, inputs: dict[str, torch.Tensor],
                 outputs: dict[str, torch.Tensor], meta: dict[str, Any]) -> None:
    wanted = {tuple(key.split(".")[1:3]) for key in outputs if key.startswith(f"{variant}.")}
    assert wanted, f"{variant}: no losses recorded"
    for mode, name in sorted(wanted):
        where = f"{variant}.{mode}.{name}"
        model.train(mode == "train")
        batch = scenario_batch(name, variant, inputs, model)
        model.zero_grad(set_to_none=True)
        losses, seen = run_watched(model, batch)
        for key in LOSSES:
            assert_close(losses[key].detach(), outputs[f"{where}.{key}"], 1e-6, 1e-4, f"{where}.{key}")
        real = batch["attention_mask"].bool()
        for key, value in seen.items():
            if f"{where}.{key}" in outputs:
                expected = outputs[f"{where}.{key}"]
                rows = real if value.shape[:2] == real.shape else ...
                assert_close(value.detach()[rows], expected[rows], 1e-4, 1e-4, f"{where}.{key}")
        if f"{where}.logits" in outputs:
            logits = model.llm.lm_head(seen["last_hidden_state"]).detach()
            assert_close(logits[real], outputs[f"{where}.logits"][real], 1e-4, 1e-4, f"{where}.logits")
        if mode == "train":
            losses["total_loss"].backward()
            check_gradients(where, model, meta, outputs)


def run_watched(model: ContinuousLVLM, batch: dict[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Losses, and what went through the parts."""
    seen: dict[str, torch.Tensor] = {}
    hooks = [module.register_forward_hook(lambda m, a, out, key=key: seen.__setitem__(key, out))
             for key, module in (("input_resampler_out", model.input_resampler),
                                 ("output_resampler_out", model.output_resampler))]
    hooks += [model.llm.model.register_forward_hook(lambda m, a, k, out: seen.update(
        inputs_embeds=k["inputs_embeds"], last_hidden_state=out.last_hidden_state), with_kwargs=True)]
    losses = model(**batch)
    for hook in hooks:
        hook.remove()
    return losses, seen


def check_gradients(where: str, model: ContinuousLVLM, meta: dict[str, Any], outputs: dict[str, torch.Tensor]) -> None:
    norms = meta.get(f"{where}.grad_norms")
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    if norms is not None:
        assert_same(set(gradients), set(norms), f"{where}: parameters")
        for name, norm in norms.items():
            gradient = gradients[name]
            assert_same(gradient is None, norm is None, f"{where}: {name} has a gradient")
            if gradient is not None:
                assert_close(gradient.norm(), norm, 1e-5, 1e-3, f"{where}: gradient norm of {name}")
    for key, expected in outputs.items():
        if key.startswith(f"{where}.grad."):
            assert_close(gradients[key.removeprefix(f"{where}.grad.")], expected, 1e-5, 1e-3, key)


def check_processor(meta: dict[str, Any], inputs: dict[str, torch.Tensor], tokenizer: Any) -> None:
    processor = ImageSpans(tokenizer.vocabulary, original=True)
    assert_same(tokenizer.vocabulary.run(), [meta["img_ids_list"][0], *meta["img_ids_list"][1:]], "ids of a run")
    assert meta["logits_processor"], "no table of the logits processor"
    for case in meta["logits_processor"]:
        ids = torch.tensor(case["input_ids"])
        scores = inputs[f"logits_processor.{case['input_ids'][0][-1]}"]
        allowed = torch.isfinite(processor(ids, scores))
        for row in range(len(ids)):
            changed = {token: value for number, token, value in case["changed"] if number == row}
            forced = [token for token, value in changed.items() if value != 0.0]
            what = f"logits processor after {case['input_ids'][row]}"
            if forced:
                assert_same(allowed[row].nonzero().flatten().tolist(), forced, what)
            else:
                assert_same((~allowed[row]).nonzero().flatten().tolist(), sorted(changed), what)


def check_generation(case: dict[str, Any], model: ContinuousLVLM, weights: dict[str, torch.Tensor],
                     inputs: dict[str, torch.Tensor], outputs: dict[str, torch.Tensor], tokenizer: Any) -> None:
    name = case["label"]
    head = model.llm.lm_head.weight
    before = head.detach().clone()
    if name.startswith("forced_image"):
        with torch.no_grad():
            head[tokenizer.vocabulary.boi_id] = weights["gen.forced_image.lm_head.weight_row_img"]
    places = tokenizer.vocabulary.places(case["input_ids"])
    assert_same(places, [place for place, here in enumerate(case["ids_cmp_mask"]) if here], f"{name}: places")
    ids, features = torch.tensor([case["input_ids"]]), inputs.get(f"gen.{name}.image_embeds")
    states, opened = HiddenStates(), case["input_ids"][-1:] == [tokenizer.vocabulary.boi_id]
    settings = GenerationSettings(do_sample=False, **case["kwargs"])
    with torch.no_grad():
        embeds = model.eval().embed(ids, torch.tensor([case["ids_cmp_mask"]]).bool(), features,
                                    inputs.get(f"gen.{name}.patch_positions"))[0]
        prompt = Prompt(case["input_ids"], embeds, answered=[tokenizer.vocabulary.boi_id] if opened else [])
        answer = generate(model.llm, tokenizer, [prompt], settings, states=states, original=True)[0]
        head.copy_(before)
        pictures = [part for part in split_answer(answer, tokenizer) if isinstance(part, ImagePart)]
        drawn = [model.written_features(states.at(0, range(part.place, part.place + len(part.codes)))[None])
                 for part in pictures]
    assert_same(answer_text(answer, tokenizer), case["text"], f"{name}: text")
    assert_same((len(drawn) > 0, len(drawn)), (case["has_img_output"], case["num_gen_imgs"]), f"{name}: pictures")
    if f"gen.{name}.img_gen_feat" in outputs:
        assert_close(torch.cat(drawn), outputs[f"gen.{name}.img_gen_feat"], 1e-4, 1e-4, f"{name}: features")
