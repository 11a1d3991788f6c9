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

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from runner import DEFAULT_DIR, Recording, Tensors, assert_close, assert_gradients, assert_same

from seed_multimodal.compat.seed_x import ContinuousLVLM, Resampler
from seed_multimodal.images.views import AnyResolution, patch_positions
from seed_multimodal.inference.backends.torch import TorchBackend
from seed_multimodal.inference.engine import Engine
from seed_multimodal.inference.image_constraints import ImageConstraints, ImageLogitsProcessor
from seed_multimodal.inference.prompt import GenerationSettings, HiddenStates, Prompt
from seed_multimodal.language.answer import AnswerReader, ImagePart
from seed_multimodal.language.llama_tokenizer import LlamaTokenizer
from seed_multimodal.language.llm import ROTARY, force_special_ids
from seed_multimodal.language.prompts import SEED_X_TASKS
from seed_multimodal.language.tokenizer import MultimodalTokenizer
from seed_multimodal.models.seed_x.processing import (
    Box,
    SeedXPrompts,
    answer_text,
    insert_images,
    read_boxes,
    without_tags,
)
from seed_multimodal.weights import assign_strictly

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


def seedx_tokenizer(folder: Path, tokens_per_image: int) -> MultimodalTokenizer:
    """The tokenizer of a fixture, or of tests/golden/data, with this number of tokens of an
    image."""
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
        file.write_text(
            json.dumps({**json.loads(file.read_text()), "tokens_per_image": tokens_per_image})
        )
        return MultimodalTokenizer.from_pretrained(tokenizer_dir)


# ---- networks


def check_lvlm(recording: Recording) -> None:
    (config, weights, inputs, outputs) = recording.case()
    meta = recording.meta
    for variant in config["variants"]:
        check_losses(variant, build(config, weights, variant), inputs, outputs, meta)
    model = build(config, weights, "released")
    tokenizer = seedx_tokenizer(recording.folder, config["resampler"]["grid_size"] ** 2)
    check_processor(meta, inputs, tokenizer)
    for case in meta["generation"]:
        check_generation(case, model, weights, inputs, outputs, tokenizer)


def build(config: dict[str, Any], weights: Tensors, variant: str) -> ContinuousLVLM:
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


def check_losses(
    variant: str, model: ContinuousLVLM, inputs: Tensors, outputs: Tensors, meta: dict[str, Any]
) -> None:
    wanted = {tuple(key.split(".")[1:3]) for key in outputs if key.startswith(f"{variant}.")}
    assert wanted, f"{variant}: no losses recorded"
    for mode, name in sorted(wanted):
        location = f"{variant}.{mode}.{name}"
        model.train(mode == "train")
        batch: dict[str, Any] = {
            "image_embeds": None,
            "embeds_gen_mask": None,
            "embeds_cmp_mask": None,
            **inputs.part(name),
        }
        if not model.settings.vit_down and batch["image_embeds"] is not None:
            batch["image_embeds"] = batch["image_embeds"][
                :, : model.output_resampler.query.shape[0]
            ]
        model.zero_grad(set_to_none=True)
        losses, recorded = run_watched(model, batch)
        expected = outputs.part(location)
        real = batch["attention_mask"].bool()
        for key in LOSSES:
            expected.close(key, losses[key], (1e-6, 1e-4))
        if "logits" in expected:
            recorded["logits"] = model.llm.lm_head(recorded["last_hidden_state"])
        for key, value in recorded.items():
            if key in expected:
                rows = real if value.shape[:2] == real.shape else ...
                assert_close(value[rows], expected[key][rows], 1e-4, 1e-4, f"{location}.{key}")
        if mode == "train":
            losses["total_loss"].backward()
            norms = meta.get(f"{location}.grad_norms", {})
            assert not norms or norms.keys() == dict(model.named_parameters()).keys(), (
                f"{location}: parameters"
            )
            assert_gradients(model, expected.part("grad"), norms, 1e-5)


def run_watched(model: ContinuousLVLM, batch: dict[str, Any]) -> tuple[Tensors, Tensors]:
    """Losses and activations."""
    recorded: Tensors = {}
    hooks = [
        getattr(model, name).register_forward_hook(
            lambda module, inputs, output, name=name: recorded.update({f"{name}_out": output})
        )
        for name in ("input_resampler", "output_resampler")
    ]
    hooks += [
        model.llm.model.register_forward_hook(
            lambda module, inputs, options, output: recorded.update(
                inputs_embeds=options["inputs_embeds"], last_hidden_state=output.last_hidden_state
            ),
            with_kwargs=True,
        )
    ]
    losses = model(**batch)
    for hook in hooks:
        hook.remove()
    return losses, recorded


def check_processor(meta: dict[str, Any], inputs: Tensors, tokenizer: Any) -> None:
    processor = ImageLogitsProcessor(ImageConstraints(tokenizer.vocabulary, original=True))
    assert_same(tokenizer.vocabulary.run(), meta["img_ids_list"], "ids of a run")
    assert meta["logits_processor"], "no table of the logits processor"
    for case in meta["logits_processor"]:
        scores = inputs[f"logits_processor.{case['input_ids'][0][-1]}"]
        run = tokenizer.vocabulary.run()
        for row, ids in enumerate(case["input_ids"]):
            full = (
                [*ids[:-1], *run[: run.index(ids[-1]) + 1]] if ids[-1] in run else ids
            )  # as in answers
            allowed = torch.isfinite(processor(torch.tensor([full]), scores[row : row + 1]))[0]
            changed = {token: value for index, token, value in case["changed"] if index == row}
            forced = [token for token, value in changed.items() if value != 0.0]
            what = f"logits processor after {case['input_ids'][row]}"
            if forced:
                assert_same(allowed.nonzero().flatten().tolist(), forced, what)
            else:
                assert_same((~allowed).nonzero().flatten().tolist(), sorted(changed), what)


@torch.no_grad()
def check_generation(
    case: dict[str, Any],
    model: ContinuousLVLM,
    weights: Tensors,
    inputs: Tensors,
    outputs: Tensors,
    tokenizer: Any,
) -> None:
    name = case["label"]
    boi = tokenizer.vocabulary.boi_id
    head = model.llm.lm_head.weight
    before = head.clone()
    if name.startswith("forced_image"):
        head[boi] = weights["gen.forced_image.lm_head.weight_row_img"]
    positions = tokenizer.vocabulary.placeholder_positions(case["input_ids"])
    assert_same(
        positions,
        [position for position, here in enumerate(case["ids_cmp_mask"]) if here],
        f"{name}: places",
    )
    embeds = model.eval().embed(
        torch.tensor([case["input_ids"]]),
        torch.tensor([case["ids_cmp_mask"]]).bool(),
        inputs.get(f"gen.{name}.image_embeds"),
        inputs.get(f"gen.{name}.patch_positions"),
    )[0]
    prompt = Prompt.of_embeddings(embeds)
    prompt.answered = [boi] if case["input_ids"][-1:] == [boi] else []
    states = HiddenStates()
    settings = GenerationSettings(do_sample=False, **case["kwargs"])
    engine = Engine(TorchBackend(model.llm), tokenizer, original_constraints=True)
    answer = engine.generate([prompt], settings, states=states)[0]
    output = model.generate(
        LlamaTokenizer(tokenizer),
        input_ids=torch.tensor([case["input_ids"]]),
        image_embeds=inputs.get(f"gen.{name}.image_embeds"),
        ids_cmp_mask=torch.tensor([case["ids_cmp_mask"]]),
        patch_positions=inputs.get(f"gen.{name}.patch_positions"),
        num_img_gen_tokens=tokenizer.vocabulary.tokens_per_image,
        **case["kwargs"],
    )
    head.copy_(before)
    drawings = [
        model.output_features(
            states.at(0, range(image.position, image.position + len(image.codes)))[None]
        )
        for image in AnswerReader(tokenizer).read_all(answer).parts
        if isinstance(image, ImagePart)
    ]
    assert_same(answer_text(answer, tokenizer), case["text"], f"{name}: text")
    assert_same(
        (len(drawings) > 0, len(drawings)),
        (case["has_img_output"], case["num_gen_imgs"]),
        f"{name}: images",
    )
    for key in ("text", "has_img_output", "num_gen_imgs"):
        assert_same(output[key], case[key], f"{name}: {key} of the original's method")
    if f"gen.{name}.img_gen_feat" in outputs:
        for features in (torch.cat(drawings), output["img_gen_feat"]):
            outputs.close(f"gen.{name}.img_gen_feat", features, (1e-4, 1e-4))


# ---- scripts


def check_inference(recording: Recording) -> None:
    cases = recording.cases
    tokenizer = seedx_tokenizer(recording.folder, 64)
    assert cases["runs"] and cases["extract_box"], "the fixture holds no runs"
    for run in cases["runs"]:
        check_run(run, tokenizer)
    for case in cases["extract_box"]:
        for key, opened in (("chat_model", False), ("base_model", True)):
            boxes, problems = read_boxes(
                case["text"], opened
            )  # those that the scripts can draw, errors for the rest
            expected_boxes = [Box(*values) for values in case[key] or [] if len(values) == 4]
            assert_same(
                [box for box in boxes if box in expected_boxes], boxes, f"boxes of {case['text']!r}"
            )
            assert all(problem.endswith(".") for problem in problems)


def check_run(run: dict[str, Any], tokenizer: Any) -> None:
    script = run["script"]
    size = tuple(run["image_size"])
    vocabulary = tokenizer.vocabulary
    prompts = SeedXPrompts(tokenizer)
    grid = AnyResolution(grids=("1x1",) if "img2edit" in script else AnyResolution().grids).grid(
        size
    )
    views = [grid[0] * grid[1] + 1]

    def tuned(text: str, views: list[int]) -> list[int]:
        return prompts.dialogue([("user", insert_images(text, views))])

    prompt_ids = {
        "eval_img2text_seed_x.py": lambda: [
            prompts.completion(insert_images(QUESTION, views)),
            prompts.completion(insert_images(PHRASE, views), "detect"),
        ],
        "eval_img2text_seed_x_i.py": lambda: [tuned(text, views) for text in TUNED],
        "eval_img2edit_seed_x_edit.py": lambda: [tuned(EDIT, views)],
        "eval_text2img_seed_x.py": lambda: [
            [*prompts.completion([CAPTION], "draw"), vocabulary.boi_id]
        ],  # forced
        "eval_text2img_seed_x_i.py": lambda: [
            tuned(SEED_X_TASKS.draw.format(caption=TUNED_CAPTION), [])
        ],
    }[script]()
    assert_same(len(prompt_ids), len(run["llm_calls"]), f"{script}: calls")
    for ids, call in zip(prompt_ids, run["llm_calls"], strict=True):
        assert_same([ids], call["input_ids"], f"{script}: ids")
        if call.get("ids_cmp_positions") is not None:
            assert_same(
                vocabulary.placeholder_positions(ids),
                call["ids_cmp_positions"],
                f"{script}: places of features",
            )
            assert_same([True] * views[0], call["embeds_cmp_mask"], f"{script}: input views")
            assert_close(
                patch_positions(grid),
                call["patch_positions"],
                1e-6,
                what=f"{script}: positions of views",
            )
    texts = [output["text"] for output in run["stub_outputs"]]
    if "img2edit" in script:
        assert_same(f"{without_tags(texts[0])}\n", run["printed"], "printed")
    elif "img2text" in script:
        assert_same(f"{without_tags(texts[0])}\n{texts[1]}\n", run["printed"], "printed")
        boxes, problems = read_boxes(texts[1], script == "eval_img2text_seed_x.py")
        assert_same(problems, [], "malformed boxes")
        corners = [box.corners(size, clip=False) for box in boxes]
        assert_same(
            [[[c[0], c[1]], [c[2], c[3]]] for c in corners], run["rectangles"], "rectangles"
        )


KINDS = {"seedx_lvlm": check_lvlm, "seedx_inference": check_inference}
