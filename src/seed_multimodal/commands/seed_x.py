"""The programs in `src/inference/` with SEED-X's original names; what was hard-coded there is each flag's default.

Without flags they repeat the originals with the released weights, whose parts the YAML files in `configs/` name.
Another `--model` (nano-x, a system's folder) gets the same requests through its own tasks. The originals' pictures
belong into `demo_images/`; where they are not, one of ours stands in.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from seed_multimodal.commands.common import (
    Outcomes,
    OutputNames,
    add_beside,
    add_common,
    add_drawing,
    add_generation,
    drawing_settings,
    generation_settings,
    load_system,
    opened,
    save_picture,
)
from seed_multimodal.config import project_root
from seed_multimodal.entry import DONE, add_offload, add_quantization, log_line, run_program, some_text, whole_number
from seed_multimodal.errors import ConfigError
from seed_multimodal.hub import locate
from seed_multimodal.language.seed_x import DRAW_REQUEST
from seed_multimodal.quiet import quiet_libraries

CONFIGS = {
    "image_transform": "configs/processer/qwen_448_transform.yaml",
    "tokenizer": "configs/tokenizer/clm_llama_tokenizer_224loc_anyres.yaml",
    "visual_encoder": "configs/visual_encoder/qwen_vitg_448.yaml",
    "discrete_model": "configs/discrete_model/discrete_identity.yaml",
    "llm": "configs/clm_models/llm_{}.yaml",
    "agent": "configs/clm_models/agent_{}.yaml",
}
FIRST_STAGE = "configs/sdxl_adapter/sdxl_qwen_vit_resampler_l4_q64_pretrain_no_normalize.yaml"
SECOND_STAGE = "configs/sdxl_adapter/sdxl_qwen_vit_resampler_l4_q64_full_with_latent_image_pretrain_no_normalize.yaml"
SEED = 42  # of the second stage's program; the first one's had it until its last change
STAND_IN = "fox_and_snowman.png"  # in images/, for the originals' pictures
Names = tuple[str, ...]


@dataclass(frozen=True)
class Script:
    """One of the programs.

    Attributes:
        does: in words. model: the released language model that it needs ("" for none). adapter: the stage it draws
            with. image: its picture in `demo_images/`, prompt: what it asks.
        scene, phrase: picture and words of a second request, for boxes.
        instead: what is asked (and looked for) where one of our pictures stands in.
    """

    does: str
    work: Callable[[argparse.Namespace, Script], int]
    model: str = ""
    adapter: str = ""
    image: str = ""
    prompt: str = ""
    scene: str = ""
    phrase: str = ""
    instead: tuple[str, str] = ("", "")
    condition: str = ""

    @property
    def tuned(self) -> bool:
        """Whether the language model follows instructions."""
        return self.model != "seed_x"

    @property
    def files(self) -> dict[str, str]:
        """YAML files of its parts."""
        named = ["image_transform", "visual_encoder", *(("tokenizer", "llm", "agent") if self.model else ()),
                 *(("discrete_model",) if self.adapter == FIRST_STAGE else ())]
        return {name: CONFIGS[name].format(self.model) for name in named} | (
            {"adapter": self.adapter} if self.adapter else {})


def seed_x_script(name: str, argv: Sequence[str] | None = None) -> int:
    """Run the program of that name (a key of `SCRIPTS`); returns its exit code."""
    script = SCRIPTS[name]
    parser = argparse.ArgumentParser(prog=f"{name}.py", description=script.does)
    if script.image:
        parser.add_argument("--image", nargs="+", metavar="PICTURE", help=f"default: demo_images/{script.image}, or "
                            f"images/{STAND_IN} where that is not")
    if script.condition:
        parser.add_argument("--condition", metavar="PICTURE", help="what the drawing may take over (default: "
                            f"demo_images/{script.condition}, or each picture itself)")
    if script.prompt:
        parser.add_argument("--prompt", type=some_text, metavar="TEXT", help=f"default: {script.prompt}")
    if script.phrase:
        parser.add_argument("--detect", type=some_text, metavar="PHRASE", help=f"find it in --image, or {script.scene}")
    draws = bool(script.adapter)
    parser.add_argument("--out", default="vis", metavar="PATH", help="folder, or a file for one picture (default: vis)")
    add_common(parser, model="released", debug=False)
    parser.set_defaults(seed=SEED)
    add_offload(parser)
    parser.add_argument("--device_2", metavar="DEVICE", help="where pictures are read and drawn (default: as --device)")
    if script.model:
        add_quantization(parser)
        add_generation(parser)
    if draws:
        add_drawing(parser)
    if script.adapter == SECOND_STAGE:
        add_beside(parser)
    if not script.model:
        parser.add_argument("--embeddings", type=whole_number(1), metavar="N", help="draw from means of so many: 64 as "
                            "in the paper (default: all 256, as the original)")
    files = parser.add_argument_group("parts of the released model")
    for flag, file in script.files.items():
        files.add_argument(f"--{flag}", metavar="YAML", help=f"default: {file}")
    if draws:
        files.add_argument("--diffusion_model_path", metavar="FOLDER", help="SDXL base 1.0 (default: in "
                           "pretrained/)")
    return run_program(parser, lambda args: script.work(args, script), argv)


# ---- the programs


def _rebuild(args: argparse.Namespace, script: Script) -> int:
    """Draw pictures again from their features."""
    given = args.image or [str(_demo(script.image)[0])]
    ending = "_recon_with_condition" if script.condition else "_recon"
    names, outcomes = OutputNames(args.out, "vis", len(given)), Outcomes(len(given))
    pictures = _picture_half(args, script)
    options = {**drawing_settings(args), "embeddings": args.embeddings}
    for name, image in opened(given, outcomes, args.debug):
        with outcomes.one(name, args.debug):
            condition = _condition(args, script, image)
            drawn = pictures.rebuild(image, condition, args.seed, **options)[0]
            print(save_picture(drawn, names.named(Path(name).stem, ending, ".jpg")), flush=True)
    return outcomes.finish()


def _read(args: argparse.Namespace, script: Script) -> int:
    """Answer a question about pictures, find something in one."""
    plain = not (args.image or args.prompt or args.detect)
    scene, scene_there = _demo(script.scene)
    image, image_there = _demo(script.image)
    names = OutputNames(args.out, "vis", int(plain or args.detect is not None), args.image or ())
    system = _system(args, script)
    options = {"seed": args.seed, **generation_settings(args)}
    if plain or args.prompt or args.detect is None:
        shown: list[Any] = [Path(one) for one in args.image or [image]]
        prompt = args.prompt or (script.prompt if args.image or image_there else script.instead[0])
        print(system.ask(shown, prompt, **options), flush=True)
    if plain or args.detect is not None:
        where = [Path(one) for one in args.image or [scene]]
        phrase = args.detect or (script.phrase if scene_there else script.instead[1])
        found = system.detect(where, phrase, **options)
        print(found.text, flush=True)
        print(save_picture(found.drawn(), names.named(where[0].stem)), flush=True)
    return DONE


def _draw(args: argparse.Namespace, script: Script) -> int:
    """Draw a caption."""
    caption = args.prompt or script.prompt
    names = OutputNames(args.out, "vis", 1)
    system = _system(args, script)
    options = {**generation_settings(args), **drawing_settings(args)}
    if args.model == "released":
        options["verbatim"] = True
    text = DRAW_REQUEST.format(caption=caption) if args.model == "released" and script.tuned else caption
    drawn = system.draw(text, seed=args.seed, **options)
    print(save_picture(drawn, names.named(_file_stem(caption))))
    return DONE


def _edit(args: argparse.Namespace, script: Script) -> int:
    """Change pictures as instructed."""
    given, instruction = args.image or [str(_demo(script.image)[0])], args.prompt or script.prompt
    names, outcomes = OutputNames(args.out, "vis", len(given)), Outcomes(len(given))
    system = _system(args, script)
    for number, (name, image) in enumerate(opened(given, outcomes, args.debug), 1):
        with outcomes.one(name, args.debug):
            changed = system.edit(image, instruction, seed=args.seed, **generation_settings(args),
                                  **drawing_settings(args))
            print(save_picture(changed, names.named(f"{number}_{_file_stem(instruction)}", suffix=".jpg")), flush=True)
    return outcomes.finish()


# ---- their parts


def _spec(args: argparse.Namespace, script: Script) -> Any:
    """The released parts that the YAML files name."""
    from seed_multimodal.systems.seed_x_files import SDXL, spec_of_files

    return spec_of_files({flag: getattr(args, flag) or file for flag, file in script.files.items()},
                         tuned=script.tuned, sdxl=getattr(args, "diffusion_model_path", None) or SDXL)


def _refuse_files(args: argparse.Namespace, script: Script) -> None:
    given = [flag for flag in [*script.files, "diffusion_model_path"] if getattr(args, flag, None) is not None]
    if given:
        raise ConfigError(f"--{given[0]} names a part of the released model, but --model {args.model} has its own; "
                          f"leave one of them out.")


def _system(args: argparse.Namespace, script: Script) -> Any:
    if args.model != "released":
        _refuse_files(args, script)
        return load_system(args)
    quiet_libraries(args.debug)
    with contextlib.redirect_stdout(sys.stderr):
        from seed_multimodal.systems.seed_x import SeedX

        return SeedX.from_pretrained(_spec(args, script), device=args.device, dtype=args.dtype, log=log_line,
                                     quantization=args.quantization, image_device=args.device_2,
                                     load_decoder=bool(script.adapter), offload=args.offload)


def _picture_half(args: argparse.Namespace, script: Script) -> Any:
    """Tower and de-tokenizer, without a language model."""
    quiet_libraries(args.debug)
    with contextlib.redirect_stdout(sys.stderr):
        if args.model == "released":
            from seed_multimodal.device import choose_device, choose_for_pictures
            from seed_multimodal.systems.seed_x_parts import load_rebuilder

            spec = _spec(args, script)
            runtime = choose_device(args.device_2 or args.device, args.dtype, None)
            here = choose_for_pictures(runtime.device, args.dtype, runtime, log_line)
            return load_rebuilder(spec, here, here, args.offload)
        from seed_multimodal.configured import picture_half
        from seed_multimodal.device import limit_threads

        _refuse_files(args, script)
        half = picture_half(args.model, device=args.device_2 or args.device, dtype=args.dtype)
        if half.has_codes:
            raise ConfigError(f"{args.model}: its pictures have codes, they are no SEED-X's; `seed reconstruct --model "
                              f"{args.model}` draws them again.")
        limit_threads(half.model)
        half.offload(encoder=args.offload, decoder=args.offload)
        return half


def _demo(name: str) -> tuple[Path, bool]:
    """The original's picture if it is here, else the one that stands in; and whether it is here."""
    there = locate(f"demo_images/{name}")
    return there or project_root(Path(__file__).parent) / "images" / STAND_IN, there is not None


def _condition(args: argparse.Namespace, script: Script, image: Any) -> Any:
    """The condition picture of one that is drawn again."""
    if not script.condition:
        return None
    there = None if args.image else locate(f"demo_images/{script.condition}")
    return Path(args.condition) if args.condition else there or image


def _file_stem(text: str) -> str:
    """A text as the originals name its picture: without dots; what no file name holds becomes `_`."""
    return re.sub(r"[\x00-\x1f/\\:*?\"<>|]", "_", text.replace(".", "")).strip()[:120] or "picture"


SCRIPTS = {
    "eval_seed_x_detokenizer": Script(
        "A picture is drawn again from its features, by the first stage.", _rebuild, adapter=FIRST_STAGE,
        image="men.jpg"),
    "eval_seed_x_detokenizer_with_condition": Script(
        "A picture is drawn again from its features and a condition picture, by the second stage.", _rebuild,
        adapter=SECOND_STAGE, image="men.jpg", condition="men_condition.jpg"),
    "eval_img2text_seed_x": Script(
        "SEED-X describes a picture and finds a car in another.", _read, "seed_x", image="cat_dog.jpeg",
        prompt="Describe this image briefly.", scene="car.jpg",
        phrase="In ths background with a blue sky on the road, there is a car",  # its spelling is the original's
        instead=("Describe this image briefly.", "In the picture there is a fox")),
    "eval_text2img_seed_x": Script(
        "SEED-X draws a caption.", _draw, "seed_x", FIRST_STAGE,
        prompt="A super math wizard cat, richly textured oil painting."),
    "eval_img2text_seed_x_i": Script(
        "SEED-X-I answers a question about a picture and finds something in another.", _read, "seed_x_i",
        image="advisor.png", prompt="Can I conntect with an advisor on Sunday?", scene="ground.png",
        phrase="Is there anything in the image that can protect me from catching the flu virus when I go out? Show me "
               "the location.",
        instead=("What is in the picture?", "the fox")),
    "eval_text2img_seed_x_i": Script(
        "SEED-X-I draws a caption.", _draw, "seed_x_i", FIRST_STAGE, prompt="A cybernetic soldier."),
    "eval_img2edit_seed_x_edit": Script(
        "SEED-X-Edit changes a picture.", _edit, "seed_x_edit", SECOND_STAGE, image="car.jpg",
        prompt="Make it under the sunset"),
}
