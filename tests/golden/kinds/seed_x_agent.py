"""SEED-X's agent.

* `seedx_lvlm`: losses, activations and gradients; generation; the logits processor. Not compared:
activations at
  padding, which the original lets attend to everything before (no loss uses them); scores of the
  logits processor: the original sets to 0 what is -inf here (compared: which tokens are forbidden,
  which one is forced).
* `seedx_inference`: prompts, masks, positions of views, settings, printed texts and boxes of the
original scripts. Not
  compared: names of the files that the scripts write, inputs of the de-tokenizer.
"""

import shutil
import tempfile
from pathlib import Path

import torch
from runner import DEFAULT_DIR, Tensors, assert_close, assert_gradients, assert_same
from tiny import read_json, write_json

from seed_multimodal.compat.seed_x import ContinuousLVLM, Resampler
from seed_multimodal.images.views import AnyResolution, patch_positions
from seed_multimodal.inference.sampling import ImageConstraints
from seed_multimodal.language.llama_tokenizer import LlamaTokenizer
from seed_multimodal.language.llm import ROTARY, force_special_ids
from seed_multimodal.language.prompts import SEED_X_TASKS, interleave
from seed_multimodal.language.text_tokenizer import Part
from seed_multimodal.language.tokenizer import MultimodalTokenizer
from seed_multimodal.language.vocabulary import ImageGrammar
from seed_multimodal.models.seed_x.processing import (
    Box,
    SeedXPrompts,
    read_boxes,
    without_tags,
)
from seed_multimodal.state_dicts import assign_strictly

LOSSES = ("total_loss", "lm_loss", "rec_loss")
QUESTION = "Describe this image briefly."
PHRASE = "In ths background with a blue sky on the road, there is a car"
TUNED = (
    "Can I conntect with an advisor on Sunday?",
    "Is there anything in the image that can protect me from catching the flu virus when I go out? "
    "Show me the location.",
)
CAPTION = "A super math wizard cat, richly textured oil painting."
TUNED_CAPTION = (
    "A cybernetic soldier, enhanced with advanced weapons systems and tactical analysis software, "
    "on a mission behind enemy lines."
)
EDIT = "Make it under the sunset"


def seedx_tokenizer(folder, tokens_per_image: int) -> MultimodalTokenizer:
    """The tokenizer of a fixture, or of tests/golden/data, with this number of tokens of an
    image."""
    # A copy with another number in its settings.
    source = folder / "tokenizer"
    with tempfile.TemporaryDirectory() as work:
        tokenizer_dir = Path(work, "tokenizer")
        shutil.copytree(
            source if source.is_dir() else DEFAULT_DIR / "seedx_sequences" / "tokenizer",
            tokenizer_dir,
            copy_function=shutil.copyfile,
        )
        tokenizer_dir.chmod(0o755)
        file = tokenizer_dir / "tokenizer_config.json"
        write_json(file, {**read_json(file), "tokens_per_image": tokens_per_image})
        return MultimodalTokenizer.from_pretrained(tokenizer_dir)


# ---- networks


def check_lvlm(recording):
    (config, weights, inputs, outputs) = recording.case()
    meta = recording.meta
    for variant in config["variants"]:
        check_losses(variant, build(config, weights, variant), inputs, outputs, meta)
    model = build(config, weights, "released")
    tokenizer = seedx_tokenizer(recording.folder, config["resampler"]["grid_size"] ** 2)
    check_processor(meta, inputs, tokenizer)
    for case in meta["generation"]:
        check_generation(case, model, weights, inputs, outputs, tokenizer)


def build(config, weights: Tensors, variant: str) -> ContinuousLVLM:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = config["resampler"]
    settings = config["variants"][variant]
    grid, heads, vision = (sizes[key] for key in ("grid_size", "num_heads", "vision_dim"))
    width = config["llm"]["hidden_size"]
    llm = LlamaForCausalLM(LlamaConfig(**config["llm"]))
    force_special_ids(llm)
    model = ContinuousLVLM(
        llm,
        Resampler(grid, width, heads, vision),
        Resampler(grid, vision, heads, width),
        **settings,
    )
    ignored = [f"*{ROTARY}"] + ([] if model.settings.add_patch_pos else ["patch_pos_embed"])
    assign_strictly(model, weights.part("released"), "weights", allow_unexpected=ignored)
    return model


def check_losses(variant: str, model: ContinuousLVLM, inputs: Tensors, outputs: Tensors, meta):
    """Losses, activations and gradients of each recorded batch, in both modes."""
    batches = {tuple(key.split(".")[1:3]) for key in outputs if key.startswith(f"{variant}.")}
    n_queries = model.output_resampler.query.shape[0]
    for mode, name in sorted(batches):
        location = f"{variant}.{mode}.{name}"
        expected = outputs.part(location)
        # Batches without images lack their fields.
        model.train(mode == "train")
        model.zero_grad(set_to_none=True)
        absent = dict.fromkeys(("image_embeds", "embeds_gen_mask", "embeds_cmp_mask"))
        batch = {**absent, **inputs.part(name)}
        if batch["image_embeds"] is not None and not model.settings.vit_down:
            batch["image_embeds"] = batch["image_embeds"][:, :n_queries]
        losses, activations = run_watched(model, batch)
        expected.compare("", (1e-6, 1e-4), **{key: losses[key] for key in LOSSES})

        # Of activations of the language model only those at real tokens.
        real = batch["attention_mask"].bool()
        for key in activations.keys() & expected.keys():
            actual = activations[key]
            rows = real if actual.shape[:2] == real.shape else ...
            assert_close(actual[rows], expected[key][rows], 1e-4, 1e-4, f"{location}.{key}")
        if mode == "train":
            losses["total_loss"].backward()
            norms = meta.get(f"{location}.grad_norms", {})
            assert_gradients(model, expected.part("grad"), norms, 1e-5)


def run_watched(model: ContinuousLVLM, batch: dict) -> tuple[dict, dict[str, torch.Tensor]]:
    """Losses, and activations by their recorded names."""
    activations = {}

    def note_llm(_module, _inputs, options, output):
        activations["inputs_embeds"] = options["inputs_embeds"]
        activations["last_hidden_state"] = output.last_hidden_state
        activations["logits"] = model.llm.lm_head(output.last_hidden_state)

    hooks = [
        getattr(model, name).register_forward_hook(
            lambda _module, _inputs, output, name=name: activations.update({f"{name}_out": output})
        )
        for name in ("input_resampler", "output_resampler")
    ]
    hooks.append(model.llm.model.register_forward_hook(note_llm, with_kwargs=True))
    losses = model(**batch)
    for hook in hooks:
        hook.remove()
    return losses, activations


def check_processor(meta, inputs: Tensors, tokenizer):
    """Which tokens the original's processor changes: to 0 if forbidden, else it forces them."""
    processor = ImageConstraints([ImageGrammar(tokenizer.vocabulary, original=True)])
    image = tokenizer.vocabulary.run()
    assert_same(image, meta["img_ids_list"], "tokens of an image")
    for case in meta["logits_processor"]:
        scores = inputs[f"logits_processor.{case['input_ids'][0][-1]}"]
        for row, ids in enumerate(case["input_ids"]):
            what = f"logits processor after {ids}"
            if ids[-1] in image:  # the original reads the last token alone
                ids = [*ids[:-1], *image[: image.index(ids[-1]) + 1]]
            processed = processor(torch.tensor([ids]), scores[row : row + 1])[0]
            allowed = torch.isfinite(processed).nonzero().flatten().tolist()
            changed = {token: value for index, token, value in case["changed"] if index == row}
            expected = [token for token, value in changed.items() if value != 0.0]
            if not expected:
                expected = [token for token in range(len(processed)) if token not in changed]
            assert_same(allowed, expected, what)


@torch.no_grad()
def check_generation(
    case,
    model: ContinuousLVLM,
    weights: Tensors,
    inputs: Tensors,
    outputs: Tensors,
    tokenizer,
):
    """The answer to a prompt: its text, and the features of its images."""
    name = case["label"]
    vocabulary = tokenizer.vocabulary
    positions = vocabulary.placeholder_positions(case["input_ids"])
    # The library finds the places of features by ids; the original was given a mask.
    masked = [position for position, is_image in enumerate(case["ids_cmp_mask"]) if is_image]
    assert_same(positions, masked, f"{name}: positions of features")

    # Random weights never begin an image, so some cases have another row of the output layer.
    head = model.llm.lm_head.weight
    head_before = head.clone()
    if name.startswith("forced_image"):
        head[vocabulary.boi_id] = weights["gen.forced_image.lm_head.weight_row_img"]

    # The answer, and the row as it was.
    answer = model.eval().generate(
        LlamaTokenizer(tokenizer),
        input_ids=torch.tensor([case["input_ids"]]),
        image_embeds=inputs.get(f"gen.{name}.image_embeds"),
        ids_cmp_mask=torch.tensor([case["ids_cmp_mask"]]),
        patch_positions=inputs.get(f"gen.{name}.patch_positions"),
        num_img_gen_tokens=vocabulary.tokens_per_image,
        **case["kwargs"],
    )
    head.copy_(head_before)
    for key in ("text", "has_img_output", "num_gen_imgs"):
        assert_same(answer[key], case[key], f"{name}: {key}")
    if f"gen.{name}.img_gen_feat" in outputs:
        outputs.close(f"gen.{name}.img_gen_feat", answer["img_gen_feat"], (1e-4, 1e-4))


# ---- scripts


def check_inference(recording):
    cases = recording.cases
    tokenizer = seedx_tokenizer(recording.folder, 64)
    for run in cases["runs"]:
        check_run(run, tokenizer)
    # Boxes that the scripts can draw; the rest are errors.
    for case in cases["extract_box"]:
        for key, opened in (("chat_model", False), ("base_model", True)):
            boxes, _ = read_boxes(case["text"], opened)
            recorded = [Box(*values) for values in case[key] or [] if len(values) == 4]
            assert [box for box in boxes if box not in recorded] == [], case["text"]


def prompts_of(script: str, prompts: SeedXPrompts, views: list[int]) -> list[list[int]]:
    """The ids of each call of a script; `views`: of its image."""

    def with_images(text, views: list[int]) -> list[Part]:
        return interleave(text, [prompts.image(n_views) for n_views in views])

    def tuned(text, views: list[int]) -> list[int]:
        return prompts.dialogue([("user", with_images(text, views))])

    match script:
        case "eval_img2text_seed_x.py":
            question = prompts.completion(with_images(QUESTION, views))
            return [question, prompts.completion(with_images(PHRASE, views), "detect")]
        case "eval_img2text_seed_x_i.py":
            return [tuned(text, views) for text in TUNED]
        case "eval_img2edit_seed_x_edit.py":
            return [tuned(EDIT, views)]
        case "eval_text2img_seed_x.py":  # forces an image
            return [[*prompts.completion([CAPTION], "draw"), prompts.tokenizer.vocabulary.boi_id]]
        case "eval_text2img_seed_x_i.py":
            return [tuned(SEED_X_TASKS.draw.format(caption=TUNED_CAPTION), [])]
    raise AssertionError(f"unknown script {script}")


def check_run(run: dict, tokenizer):
    script = run["script"]
    size = tuple(run["image_size"])
    rule = AnyResolution(grids=("1x1",)) if "img2edit" in script else AnyResolution()
    columns, rows = grid = rule.grid(size)
    n_views = columns * rows + 1

    # 1. The prompts, and the views of the image.
    prompts = prompts_of(script, SeedXPrompts(tokenizer), [n_views])
    for ids, call in zip(prompts, run["llm_calls"], strict=True):
        actual = {"input_ids": [ids]}
        if call.get("ids_cmp_positions") is not None:
            actual["ids_cmp_positions"] = tokenizer.vocabulary.placeholder_positions(ids)
            actual["embeds_cmp_mask"] = [True] * n_views
            positions = patch_positions(grid)
            assert_close(positions, call["patch_positions"], 1e-6, what=f"{script}: views")
        assert_same(actual, {key: call[key] for key in actual}, f"{script}: call")

    # 2. What is printed and drawn of the answers.
    texts = [output["text"] for output in run["stub_outputs"]]
    if "img2edit" in script:
        assert_same(f"{without_tags(texts[0])}\n", run["printed"], "printed")
    elif "img2text" in script:
        assert_same(f"{without_tags(texts[0])}\n{texts[1]}\n", run["printed"], "printed")
        boxes, problems = read_boxes(texts[1], script == "eval_img2text_seed_x.py")
        assert_same(problems, [], "malformed boxes")
        corners = [box.corners(size, clip=False) for box in boxes]
        rectangles = [[[left, top], [right, bottom]] for left, top, right, bottom in corners]
        assert_same(rectangles, run["rectangles"], "rectangles")


KINDS = {"seedx_lvlm": check_lvlm, "seedx_inference": check_inference}
