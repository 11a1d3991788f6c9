"""The originals' programs that load a system: `programs.yaml` has a row for each.

A row has the requests that were hard-coded in the original, its YAML files, and the defaults of its
flags. Without flags a program repeats the original with its weights. Another `--model` (nano, a
folder) gets the same requests through its own tasks.
"""

from __future__ import annotations

import pkgutil
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from seed_multimodal.cli import common
from seed_multimodal.config import project_root, read_table
from seed_multimodal.disk import text_stem
from seed_multimodal.entry import DONE, run_program
from seed_multimodal.errors import ConfigError
from seed_multimodal.settings import check_value
from seed_multimodal.weights.find import locate

if TYPE_CHECKING:
    from seed_multimodal.pipelines.base import MultimodalSystem
    from seed_multimodal.pipelines.config import SystemConfig
    from seed_multimodal.pipelines.images import ImageCodec

ORIGINAL = "original"  # the default of --model: the model that the YAML files describe
PARTS = "parts"  # the positional argument of images and texts
# For SEED-X's images, which belong into demo_images/.
REPLACEMENT_IMAGE = "fox_and_snowman.png"
# Values of flags that a program does not have.
NO_FLAGS = {
    **dict.fromkeys(
        ("image", "device_2", "condition", "embeddings", "diffusion_model_path", "check_safety")
    ),
    "num_return_images": 1,
}


@dataclass(frozen=True)
class Request:
    """A request of a program.

    work: the method of `Run` that makes it.
    image: the original's image. images: files of the run.
    texts: the original's texts, or those of the run. flag: of the user's; "": none.
    name: of the file of its drawing, made of {image} (the source's stem), {text}, {stem} (the
        text without blanks) and {index} (of the source).
    prompt: the original's complete prompt of a text {}.
    condition: the condition image of the original's image.
    text_alone: the user's texts have no image unless there is one of the user.
    """

    work: str
    image: str = ""
    texts: Sequence[str] = ()
    flag: str = ""
    name: str = ""
    prompt: str = ""
    condition: str = ""
    text_alone: bool = False
    images: Sequence[str] = ()


@dataclass(frozen=True)
class Program:
    """A program of the originals.

    requests: what it asks for.
    find: the function ("module:function") for the original system, from the flags and whether it
        needs a language model.
    options: of `common.add_common`.
    flags: of `cli/flags.yaml`. add_flags: the function that adds more.
    defaults: of flags, and what `find` reads.
    files: part → the original's YAML file.
    alternatives: an image or a text of the user replaces all requests but that of the flag, or the
        first one.
    others: the requests without flags of systems that are no original.
    """

    requests: Sequence[Request]
    find: str
    options: Mapping[str, Any]
    flags: Sequence[str] = ()
    add_flags: str = ""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    alternatives: bool = False
    others: Sequence[Request] = ()


def read_programs() -> dict[str, Program]:
    """Program → its row."""
    rows = read_table(__file__)["programs"]
    programs: dict[str, Program] = check_value(dict[str, Program], rows, "programs.yaml")
    return programs


def run_original(file: str, description: str | None, argv: Sequence[str] | None = None) -> int:
    """Run the program with the name of a file, a row of `programs.yaml`; returns its exit code."""
    name = Path(file).stem
    program = read_programs()[name]
    parser = common.program_parser(f"{name}.py", str(description))
    parser.set_defaults(**NO_FLAGS)

    # 1. The requests' texts, and the program's flags.
    for request in program.requests:
        text = f"default: {', '.join(request.texts)}"
        if request.flag == PARTS:
            parser.add_argument(PARTS, nargs="*", metavar="IMAGE|TEXT", help=text)
        elif request.flag:
            parser.add_argument(f"--{request.flag}", nargs="+", action="extend", help=text)
    if any(request.image and request.flag != PARTS for request in program.requests):
        parser.add_argument("--image", nargs="+", action="extend", help="default: the original's")
    common.add_flags(parser, "original programs", program.flags)
    if program.add_flags:
        pkgutil.resolve_name(program.add_flags)(parser)

    # 2. The system, and the parts of the original one.
    common.add_common(parser, **program.options)
    for part, default in program.files.items():
        parser.add_argument(
            f"--{part}", metavar="YAML", help=f"part of the original model (default: {default})"
        )
    parser.set_defaults(**program.defaults)
    return run_program(parser, partial(_work, program), argv)


def _work(program: Program, args: Namespace) -> int:
    """Make the requests of a program; returns the exit code."""
    requests = _requests(program, args)
    run = Run(program, args, requests)
    if program.others and len(requests) > 1:
        if not (run.is_original or run.system.config.found.original):
            requests = _resolve(program.others, args)
    return max(getattr(run, request.work)(request) for request in requests)


def _requests(program: Program, args: Namespace) -> list[Request]:
    """The requests that the flags choose."""
    requests = _resolve(program.requests, args)
    if not program.alternatives:
        return requests
    of_user = [request for request in requests if request.flag and getattr(args, request.flag)]
    return of_user or (requests[:1] if args.image else requests)


def _resolve(requests: Sequence[Request], args: Namespace) -> list[Request]:
    """Requests with images and texts, without those that have no text for their flag."""
    resolved = []
    for request in requests:
        texts = getattr(args, request.flag) if request.flag else None
        images = args.image
        if images is None and request.image and not (texts and request.text_alone):
            # In images/ or demo_images/, or `REPLACEMENT_IMAGE`.
            folder = project_root(Path(__file__).parent) / "images"
            image = folder / request.image
            if not image.is_file():
                image = locate(f"demo_images/{request.image}") or folder / REPLACEMENT_IMAGE
            images = [str(image)]
        texts = texts or request.texts
        if texts or not request.flag:
            resolved.append(replace(request, images=images or (), texts=texts))
    return resolved


class Run:
    """The system of a program, or its image codec, with settings and outputs.

    Raises ConfigError: `--model` names another system, and a flag a part of the original one.
    """

    system: MultimodalSystem
    codec: ImageCodec

    def __init__(self, program: Program, args: Namespace, requests: Sequence[Request]) -> None:
        self.args = args
        self.is_original = args.model == ORIGINAL
        self.settings = common.chosen_settings(args)
        self.options = {"seed": args.seed, **self.settings}

        # 1. What is wrong is reported before the weights are loaded.
        drawn = [request for request in requests if request.name]
        if drawn:
            count = sum(len(item.images or "1") * len(item.texts or "1") for item in drawn)
            self.outputs = common.Outputs(args.out, count * args.num_return_images)
        files = {part: getattr(args, part) for part in program.files if getattr(args, part)}
        if files and not self.is_original:
            raise ConfigError(
                f"--{next(iter(files))} names a part of the original model, --model all of "
                "another one; give one of them."
            )
        args.files = {**program.files, **files}

        # 2. The system, or its codec alone.
        works = {request.work for request in requests}
        needs_llm = works != {"reconstruct"}
        is_named = program.files and not self.is_original
        config = args.model if is_named else pkgutil.resolve_name(program.find)(args, needs_llm)
        if needs_llm:
            self.system = common.load_system(
                args,
                config,
                image_device=args.device_2,
                load_decoder=not works <= {"ask", "detect", "understand"},
            )
            self.codec = self.system.images
        else:
            args.device = args.device_2 or args.device
            self.codec = common.load_images(args, config)

    def save(self, request: Request, image: Image.Image, source: str = "", text: str = "") -> None:
        """Save a drawing of an image's file and a text, and print its path."""
        suffix = Path(request.name).suffix
        stem = request.name.removesuffix(suffix).format(
            image=common.source_stem(source),
            text=text.replace(".", "").replace("/", "_"),
            stem=text_stem(text),
            index=[*request.images, source].index(source) + 1,
        )
        print(self.outputs.save(image, stem, suffix=suffix))

    # ---- requests, by their `work`

    def chat(self, request: Request) -> int:
        """A message in the original's words: the text and the images of its answer."""
        message = {"role": "user", "content": [*map(Path, request.images), *request.texts]}
        answer = self.system.chat([message], seed=self.args.seed)
        print(answer.text)
        for image in answer.images:
            self.save(request, image)
        return DONE

    def ask(self, request: Request) -> int:
        """Questions about all images at once."""
        images = [Path(file) for file in request.images]
        for question in request.texts:
            print(self.system.ask([images], question, **self.options)[0])
        return DONE

    def understand(self, request: Request) -> int:
        """A caption of each image, and answers to the questions."""

        def answer(name: str, image: Image.Image) -> None:
            print(f"{name}: {self.system.describe(image, seed=self.args.seed)}")
            for question in request.texts:
                print(f"  {question} {self.system.ask(image, question, seed=self.args.seed)}")

        return common.run_each(self.args, request.images, answer, self.codec.open)

    def detect(self, request: Request) -> int:
        """What is looked for in each image, and the image with boxes."""
        for file in request.images:
            for phrase in request.texts:
                detection = self.system.detect(Path(file), phrase, **self.options)
                print(detection.text)
                self.save(request, detection.drawn(), file)
        return DONE

    def draw(self, request: Request) -> int:
        """Images of each text."""
        options = {**self.options, "num_images": self.args.num_return_images}
        template = "{}"
        if request.prompt and self.is_original:
            template = request.prompt
            options["verbatim"] = True

        def draw(text: str) -> Sequence[Image.Image]:
            return self.system.draw([template.format(text)], **options)

        def save(text: str, images: Sequence[Image.Image]) -> None:
            for image in images:
                self.save(request, image, text=text)

        return common.run_each(self.args, request.texts, save, draw)

    def edit(self, request: Request) -> int:
        """Each image changed by each instruction."""

        def edit(name: str, image: Image.Image) -> None:
            for text in request.texts:
                self.save(request, self.system.edit(image, text, **self.options), name, text)

        return common.run_each(self.args, request.images, edit, self.codec.open)

    def compose(self, request: Request) -> int:
        """An image of images and texts in order; texts with the suffix of an image are files."""
        content: list[str | Path] = []
        for part in [*request.images, *request.texts]:
            is_file = Path(part).suffix.lower() in Image.registered_extensions()
            content.append(Path(part) if is_file else part)
        image = self.system.compose(content, **self.options)
        stems = [part.stem if isinstance(part, Path) else part for part in content]
        self.save(request, image, text="_".join(stems))
        return DONE

    def reconstruct(self, request: Request) -> int:
        """Each image drawn again from its codes or features."""
        args, codec = self.args, self.codec
        is_seed_x = "conditions" in codec.codec_settings
        if not is_seed_x and (request.condition or args.embeddings):
            raise ConfigError(
                f"{args.model} is not a SEED-X: its images have neither --embeddings nor a "
                "condition image; take --model nano-x."
            )
        codec.check_drawing(**self.settings)

        def rebuild(name: str, image: Image.Image) -> None:
            settings = dict(self.settings)
            if request.condition:
                # By flag, else the original's for the original's image, else the image itself.
                condition = args.condition
                if not condition and not args.image:
                    condition = locate(f"demo_images/{request.condition}")
                settings["conditions"] = [codec.open(condition or image)]
            means = {"embeddings": args.embeddings} if args.embeddings else {}
            # The selection of patches and the noise have the same seed.
            encoded = list(codec.encode([image], seed=args.seed, **means))
            if codec.codes_per_image:
                print(*encoded[0].tolist())
            self.save(request, codec.draw(encoded, seeds=[args.seed], **settings)[0], name)

        return common.run_each(args, request.images, rebuild, codec.open)


# ---- systems


def find_seed_llama(args: Namespace, needs_llm: bool) -> SystemConfig:
    if args.engine != "torch":
        raise ConfigError(
            f"--engine {args.engine} needs --model {args.size}: YAML files describe PyTorch's "
            "model."
        )
    from seed_multimodal.compat.part_files import seed_llama_of_files
    from seed_multimodal.inference.engines import EngineOptions

    EngineOptions(args.engine, args.url, args.gguf)  # raises for flags that exclude each other
    files = dict(args.files)
    if not needs_llm:
        files.pop("llm")
    config, options = seed_llama_of_files(files, args.dtype, args.quantization)
    vars(args).update(options)
    # All missing weights are reported before any are read.
    return config.require(*(key for key in config.parts() if getattr(config, key) is not None))


def find_seed_x(args: Namespace, needs_llm: bool) -> SystemConfig:
    from seed_multimodal.compat.part_files import SDXL, config_of_files

    sdxl = args.diffusion_model_path or SDXL
    return config_of_files(args.files, tuned=args.tuned, sdxl=sdxl)


def find_lavit(args: Namespace, needs_llm: bool) -> SystemConfig:
    from seed_multimodal.models.lavit.spec import LavitConfig

    config = LavitConfig.find(args.model, head=args.pixel_decoding)
    # The safety checker's default folder is that of the pixel decoder.
    config.safety = (config.safety or config.pixels) if args.check_safety else None
    return config
