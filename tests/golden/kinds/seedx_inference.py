"""Kind `seedx_inference`: prompts, masks, places of views, settings, printed texts and boxes of the released scripts.

Left out: names of the files that the scripts write (the commands' matter) and what they hand to the de-tokenizer.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from runner import assert_close, assert_same, read_json
from seedx_common import seedx_tokenizer

from seed_multimodal.language.tasks import SEED_X_TASKS
from seed_multimodal.seed_x.processing import Box, SeedXPrompts, place_images, read_boxes, without_words
from seed_multimodal.seed_x.views import AnyResolution, patch_positions

KIND = "seedx_inference"
QUESTION, PHRASE = "Describe this image briefly.", "In ths background with a blue sky on the road, there is a car"
TUNED = ("Can I conntect with an advisor on Sunday?",
         "Is there anything in the image that can protect me from catching the flu virus when I go out? "
         "Show me the location.")
CAPTION = "A super math wizard cat, richly textured oil painting."
TUNED_CAPTION = ("A cybernetic soldier, enhanced with advanced weapons systems and tactical analysis software, on a "
                 "mission behind enemy lines.")
EDIT = "Make it under the sunset"


def check(folder: Path) -> None:
    cases = read_json(folder / "cases.json")
    with tempfile.TemporaryDirectory() as place:
        tokenizer = seedx_tokenizer(folder, 64, Path(place, "tokenizer"))
    assert cases["runs"] and cases["extract_box"], "the fixture holds no runs"
    for run in cases["runs"]:
        check_run(run, tokenizer)
    for case in cases["extract_box"]:
        for key, opened in (("chat_model", False), ("base_model", True)):
            check_boxes(case["text"], opened, case[key] or [])


def check_boxes(text: str, opened: bool, recorded: list[list[int]]) -> None:
    """Ours keeps what the scripts could draw and has a sentence for the rest."""
    boxes, problems = read_boxes(text, opened)
    whole = [Box(*numbers) for numbers in recorded if len(numbers) == 4]
    assert_same([box for box in boxes if box in whole], boxes, f"boxes of {text!r}")
    assert all(problem.endswith(".") for problem in problems)


def check_run(run: dict[str, Any], tokenizer: Any) -> None:
    script, size = run["script"], tuple(run["image_size"])
    words = tokenizer.vocabulary
    prompts = SeedXPrompts(tokenizer)
    grid = AnyResolution(grids=("1x1",) if "img2edit" in script else AnyResolution().grids).grid(size)
    views = [grid[0] * grid[1] + 1]

    def tuned(text: str, views: list[int]) -> list[int]:
        return prompts.dialogue([("user", place_images(text, views))])

    ours = {
        "eval_img2text_seed_x.py": lambda: [prompts.alone(place_images(QUESTION, views)),
                                            prompts.alone(place_images(PHRASE, views), "detect")],
        "eval_img2text_seed_x_i.py": lambda: [tuned(text, views) for text in TUNED],
        "eval_img2edit_seed_x_edit.py": lambda: [tuned(EDIT, views)],
        "eval_text2img_seed_x.py": lambda: [[*prompts.alone([CAPTION], "draw"), words.boi_id]],  # forced
        "eval_text2img_seed_x_i.py": lambda: [tuned(SEED_X_TASKS.draw.format(caption=TUNED_CAPTION), [])],
    }[script]()
    assert_same(len(ours), len(run["llm_calls"]), f"{script}: calls")
    for ids, call in zip(ours, run["llm_calls"], strict=True):
        assert_same([ids], call["input_ids"], f"{script}: ids")
        if call.get("ids_cmp_positions") is not None:
            assert_same(words.places(ids), call["ids_cmp_positions"], f"{script}: places of features")
            assert_same([True] * views[0], call["embeds_cmp_mask"], f"{script}: views that are read")
            assert_close(patch_positions(grid), call["patch_positions"], 1e-6, what=f"{script}: places of views")
    check_output(run, size)


def check_output(run: dict[str, Any], size: tuple[int, int]) -> None:
    texts = [output["text"] for output in run["stub_outputs"]]
    opened = run["script"] == "eval_img2text_seed_x.py"
    if "img2text" in run["script"]:
        assert_same(f"{without_words(texts[0])}\n{texts[1]}\n", run["printed"], "printed")
        boxes, problems = read_boxes(texts[1], opened)
        assert_same(problems, [], "boxes that are none")
        corners = [box.corners(size, clip=False) for box in boxes]
        assert_same([[[c[0], c[1]], [c[2], c[3]]] for c in corners], run["rectangles"], "rectangles")
    elif "img2edit" in run["script"]:
        assert_same(f"{without_words(texts[0])}\n", run["printed"], "printed")
