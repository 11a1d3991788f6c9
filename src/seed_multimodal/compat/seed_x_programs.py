"""The programs in `src/inference/` with SEED-X's original names; what was hard-coded there is each
flag's default.

Without flags they repeat the originals with their weights, whose parts the YAML files in `configs/`
name. Another `--model` (nano-x, a folder) gets the same requests through its own tasks. The
originals' images belong into `demo_images/`; images/fox_and_snowman.png replaces missing ones.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from seed_multimodal.cli import common
from seed_multimodal.compat.part_flags import ORIGINAL, add_part_flags, original_files
from seed_multimodal.config import project_root
from seed_multimodal.entry import DONE, bounded_int, run_program
from seed_multimodal.errors import ConfigError
from seed_multimodal.weights.find import locate

if TYPE_CHECKING:
    from seed_multimodal.models.seed_x.spec import SeedXConfig
    from seed_multimodal.pipelines.base import MultimodalSystem

# The originals' YAML files; `{}` is the language model's name.
CONFIGS = {
    "image_transform": "configs/processer/qwen_448_transform.yaml",
    "tokenizer": "configs/tokenizer/clm_llama_tokenizer_224loc_anyres.yaml",
    "visual_encoder": "configs/visual_encoder/qwen_vitg_448.yaml",
    "discrete_model": "configs/discrete_model/discrete_identity.yaml",
    "llm": "configs/clm_models/llm_{}.yaml",
    "agent": "configs/clm_models/agent_{}.yaml",
}
FIRST_STAGE = "configs/sdxl_adapter/sdxl_qwen_vit_resampler_l4_q64_pretrain_no_normalize.yaml"
SECOND_STAGE = (
    "configs/sdxl_adapter/"
    "sdxl_qwen_vit_resampler_l4_q64_full_with_latent_image_pretrain_no_normalize.yaml"
)
SEED = 42  # of the second stage's program; the first one's had it until its last change
REPLACEMENT_IMAGE = "fox_and_snowman.png"  # in images/, for the originals' images


@dataclass(frozen=True)
class Script:
    """One of the programs.

    text: its description.
    work: what it does.
    model: the original language model; "": none.
    adapter: YAML file of the stage it draws with; "": it does not draw.
    image, condition: defaults of the flags, in `demo_images/`.
    prompt: default of the flag.
    scene, phrase: image and text of a second request, for boxes.
    """

    text: str
    work: Callable[..., int]
    model: str = ""
    adapter: str = ""
    image: str = ""
    prompt: str = ""
    scene: str = ""
    phrase: str = ""
    condition: str = ""

    @property
    def files(self) -> dict[str, str]:
        """YAML files of its parts."""
        # All have the first two; those of the first stage the discrete model, too.
        parts = ["image_transform", "visual_encoder"]
        if self.model:
            parts += ["tokenizer", "llm", "agent"]
        if self.adapter == FIRST_STAGE:
            parts.append("discrete_model")
        files = {part: CONFIGS[part].format(self.model) for part in parts}
        if self.adapter:
            files["adapter"] = self.adapter
        return files


def seed_x_script(name: str, argv: Sequence[str] | None = None) -> int:
    """Run the program of that name (a key of `SCRIPTS`); returns its exit code."""
    script = SCRIPTS[name]
    parser = ArgumentParser(prog=f"{name}.py", description=script.text)

    # 1. The requests.
    if script.image:
        parser.add_argument(
            "--image",
            nargs="+",
            help=f"default: demo_images/{script.image} or images/{REPLACEMENT_IMAGE}",
        )
    if script.condition:
        parser.add_argument(
            "--condition", help=f"default: demo_images/{script.condition} or the image itself"
        )
    if script.prompt:
        parser.add_argument("--prompt", help=f"default: {script.prompt}")
    if script.phrase:
        parser.add_argument("--detect", help=f"find it in --image, or {script.scene}")

    # 2. Loading, generation and drawing.
    common.add_common(
        parser,
        model=ORIGINAL,
        seed=SEED,
        out="vis",
        language=bool(script.model),
        generation=bool(script.model),
        drawing=bool(script.adapter),
    )
    parser.add_argument("--device_2", help="where images are encoded and drawn (default: --device)")
    if not script.model:
        parser.add_argument(
            "--embeddings",
            type=bounded_int(1),
            help="draw from means of so many (default: all 256)",
        )
    if script.adapter == SECOND_STAGE:
        common.add_condition_flags(parser)

    # 3. Parts of the original model.
    add_part_flags(parser, script.files)
    if script.adapter:
        parser.add_argument(
            "--diffusion_model_path", help="SDXL base 1.0 (default: in pretrained/)"
        )

    return run_program(parser, partial(script.work, script=script), argv)


# ---- the programs


def _rebuild(args: Namespace, script: Script) -> int:
    """Draw images again from their features, with a condition image where the program has one."""
    # 1. The encoder and decoder; only SEED-X's draw from means, or with a condition.
    files = args.image or [_demo_image(script.image)]
    outputs = common.Outputs(args.out, len(files))
    args.device = args.device_2 or args.device
    codec = common.load_images(args, _config(args, script))
    embeddings = {} if args.embeddings is None else {"embeddings": args.embeddings}
    if (script.condition or embeddings) and "conditions" not in codec.codec_settings:
        raise ConfigError(
            f"{args.model} is not a SEED-X: its images have neither --embeddings nor a condition "
            f"image; take --model nano-x."
        )

    # 2. Each image again.
    def rebuild(name: str, image: Image.Image) -> None:
        settings = common.chosen_settings(args)
        ending = "_recon"
        if script.condition:
            # By flag, else the original's for the original's image, else the image itself.
            condition = args.condition
            if not condition and not args.image:
                condition = locate(f"demo_images/{script.condition}")
            settings["conditions"] = [codec.open(condition or image)]
            ending = "_recon_with_condition"
        features = codec.encode([image], **embeddings)
        rebuilt = codec.draw(list(features), seeds=[args.seed], **settings)[0]
        print(outputs.save(rebuilt, common.source_stem(name), ending, ".jpg"))

    return common.run_each(args, files, rebuild, codec.open)


def _read(args: Namespace, script: Script) -> int:
    """Answer a question about images, find something in one; without flags both, as the
    original."""
    both = not (args.image or args.prompt or args.detect)
    outputs = common.Outputs(args.out, len(args.image or [0]) if args.detect else 1)
    system = _load(args, script)
    options = {"seed": args.seed, **common.chosen_settings(args)}
    # The question, about all images at once.
    if both or args.detect is None or args.prompt:
        images = [Path(file) for file in args.image or [_demo_image(script.image)]]
        print(system.ask([images], args.prompt or script.prompt, **options)[0])
    # The search, in each image.
    if both or args.detect is not None:
        images = [Path(file) for file in args.image or [_demo_image(script.scene)]]
        detections = system.detect(images, args.detect or script.phrase, **options)
        for file, detection in zip(images, detections, strict=True):
            print(detection.text)
            print(outputs.save(detection.drawn(), common.source_stem(str(file))))
    return DONE


def _draw(args: Namespace, script: Script) -> int:
    """Draw a caption."""
    caption = args.prompt or script.prompt
    outputs = common.Outputs(args.out)
    system = _load(args, script)
    # The original models get the original programs' prompts.
    is_original = args.model == ORIGINAL
    text = caption
    if is_original and script.model != "seed_x":
        text = f"Generate an image: {caption}"
    options = common.chosen_settings(args)
    image = system.draw(text, seed=args.seed, verbatim=is_original, **options)
    print(outputs.save(image, _stem(caption)))
    return DONE


def _edit(args: Namespace, script: Script) -> int:
    """Change images as instructed."""
    # Results are numbered in the order of the files.
    files = args.image or [_demo_image(script.image)]
    instruction = args.prompt or script.prompt
    outputs = common.Outputs(args.out, len(files))
    system = _load(args, script)

    def edit(name: str, image: Image.Image) -> None:
        changed = system.edit(image, instruction, seed=args.seed, **common.chosen_settings(args))
        stem = f"{files.index(name) + 1}_{_stem(instruction)}"
        print(outputs.save(changed, stem, suffix=".jpg"))

    return common.run_each(args, files, edit, system.images.open)


# ---- their parts


def _config(args: Namespace, script: Script) -> str | SeedXConfig:
    """What `--model` names: a system, or the original parts that the YAML files describe."""
    files = original_files(args)
    if files is None:
        return args.model
    from seed_multimodal.compat.part_files import config_of_files

    sdxl = getattr(args, "diffusion_model_path", None)
    options = {"sdxl": sdxl} if sdxl else {}
    return config_of_files(files, tuned=script.model != "seed_x", **options)


def _load(args: Namespace, script: Script) -> MultimodalSystem:
    return common.load_system(
        args,
        _config(args, script),
        image_device=args.device_2,
        load_decoder=bool(script.adapter),
    )


def _demo_image(name: str) -> str:
    """The original's image if it is there, else `REPLACEMENT_IMAGE`."""
    replacement = project_root(Path(__file__).parent) / "images" / REPLACEMENT_IMAGE
    return str(locate(f"demo_images/{name}") or replacement)


def _stem(text: str) -> str:
    """A text as the originals name its image."""
    return text.replace(".", "").replace("/", "_")


SCRIPTS = {
    "eval_seed_x_detokenizer": Script(
        "An image is drawn again from its features, by the first stage.",
        _rebuild,
        adapter=FIRST_STAGE,
        image="men.jpg",
    ),
    "eval_seed_x_detokenizer_with_condition": Script(
        "An image is drawn again from its features and a condition image, by the second stage.",
        _rebuild,
        adapter=SECOND_STAGE,
        image="men.jpg",
        condition="men_condition.jpg",
    ),
    "eval_img2text_seed_x": Script(
        "SEED-X describes an image and finds a car in another.",
        _read,
        "seed_x",
        image="cat_dog.jpeg",
        prompt="Describe this image briefly.",
        scene="car.jpg",
        phrase="In ths background with a blue sky on the road, there is a car",  # its spelling
    ),
    "eval_text2img_seed_x": Script(
        "SEED-X draws a caption.",
        _draw,
        "seed_x",
        FIRST_STAGE,
        prompt="A super math wizard cat, richly textured oil painting.",
    ),
    "eval_img2text_seed_x_i": Script(
        "SEED-X-I answers a question about an image and finds something in another.",
        _read,
        "seed_x_i",
        image="advisor.png",
        prompt="Can I conntect with an advisor on Sunday?",
        scene="ground.png",
        phrase="Is there anything in the image that can protect me from catching the flu virus "
        "when I go out? Show me the location.",
    ),
    "eval_text2img_seed_x_i": Script(
        "SEED-X-I draws a caption.",
        _draw,
        "seed_x_i",
        FIRST_STAGE,
        prompt="A cybernetic soldier, enhanced with advanced weapons systems and tactical analysis "
        "software, on a mission behind enemy lines.",
    ),
    "eval_img2edit_seed_x_edit": Script(
        "SEED-X-Edit changes an image.",
        _edit,
        "seed_x_edit",
        SECOND_STAGE,
        image="car.jpg",
        prompt="Make it under the sunset",
    ),
}
