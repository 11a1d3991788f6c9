"""The demo's model server: POST /generate (and GET /health), on the loopback address by default.

    python gradio_demo/seed_llama_flask.py --system nano --port 7890      the shipped weights
    python gradio_demo/seed_llama_flask.py --port 7890 \\
        --image_transform configs/transform/clip_transform.yaml \\
        --tokenizer configs/tokenizer/seed_llama_tokenizer.yaml \\
        --model configs/llm/seed_llama_8b.yaml
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Runs from a checkout that is not installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from seed_multimodal.cli.common import add_flags  # noqa: E402
from seed_multimodal.entry import (  # noqa: E402
    AUTO,
    MAX_RUNNING,
    add_dtype,
    bounded_int,
    run_program,
)
from seed_multimodal.errors import CheckpointError, ConfigError, first_line  # noqa: E402
from seed_multimodal.pipelines.config import system_names  # noqa: E402

if TYPE_CHECKING:
    from seed_multimodal.pipelines.base import MultimodalSystem
    from seed_multimodal.pipelines.config import SystemConfig


def boolean(text: str) -> bool:
    """A flag's type: `--offload_encoder`, `--offload_encoder True` and `--offload_encoder False`,
    as the original accepted them."""
    if text.lower() not in ("true", "false", "1", "0", "yes", "no"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")
    return text.lower() in ("true", "1", "yes")


def origin(text: str) -> str:
    """A flag's type: the origin of a web page, as browsers send it; "*": any."""
    text = text.rstrip("/").lower()
    if not re.fullmatch(r"\*|null|[a-z][a-z0-9+.-]*://[^/\s]+", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no origin such as http://localhost:3000")
    return text


def build_parser() -> argparse.ArgumentParser:
    """The flags: the original's, and ours."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_models(parser)
    add_address(parser)
    add_loading(parser)
    add_limits(parser)
    return parser


def add_models(parser: argparse.ArgumentParser) -> None:
    """What is served: a system, or the original's three YAML files."""
    parser.add_argument(
        "--system",
        help=f"{', '.join(system_names())}, or a folder with system.json "
        "(instead of the three YAML files)",
    )
    parser.add_argument(
        "--image_transform",
        help="YAML of the image transform (of a folder as --tokenizer: its own)",
    )
    parser.add_argument(
        "--tokenizer",
        help="YAML of the SEED tokenizer, or a folder that seed export-tokenizer made",
    )
    parser.add_argument("--model", help="YAML of the language model, or its folder")


def add_address(parser: argparse.ArgumentParser) -> None:
    """Where it is served, and to whom."""
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on; 0.0.0.0 shows it to other machines, and needs a token",
    )
    parser.add_argument(
        "--token-file",
        "--token_file",
        type=Path,
        help="file with a password that clients send as a bearer token (default: $SEED_TOKEN)",
    )
    parser.add_argument(
        "--port", type=int, default=7890, help="port to listen on, 0 for a free one (default: 7890)"
    )
    parser.add_argument(
        "--allow-origin",
        "--allow_origin",
        nargs="+",
        type=origin,
        default=[],
        metavar="ORIGIN",
        help="web pages that may use the server, such as http://localhost:3000 (default: none)",
    )


def add_loading(parser: argparse.ArgumentParser) -> None:
    """How the models are loaded."""
    # Devices, precision and engine.
    parser.add_argument(
        "--llm_device", default="auto", help="device of the language model (default: auto)"
    )
    parser.add_argument(
        "--tokenizer_device", default="auto", help="device that reads and draws (default: auto)"
    )
    add_dtype(parser, "auto", f"{AUTO}; with YAML files, what they say")
    llm_flags = ("--quantization", "--compile", "--kv-cache --kv_cache")
    add_flags(parser, "language model", llm_flags)
    add_flags(parser, "engine")
    # What waits on the CPU until it works; the original's flags accept a value, too.
    parser.add_argument(
        "--offload_encoder",
        nargs="?",
        const=True,
        default=False,
        type=boolean,
        help="keep the vision encoder on the CPU while no image is read",
    )
    parser.add_argument(
        "--offload_decoder",
        nargs="?",
        const=True,
        default=True,
        type=boolean,
        help="keep the diffusion model on the CPU while no image is drawn (default: on)",
    )
    parser.add_argument("--no_offload_decoder", dest="offload_decoder", action="store_false")
    parser.add_argument(
        "--offload_llm",
        action="store_true",
        help="keep SEED-X's or LaVIT's language model on the CPU while it does not generate",
    )


def add_limits(parser: argparse.ArgumentParser) -> None:
    """Limits of requests."""
    parser.add_argument(
        "--max_megapixels",
        type=bounded_int(1),
        default=32,
        help="millions of pixels of all images of a request (default: 32)",
    )
    parser.add_argument(
        "--max_running",
        type=bounded_int(1),
        default=MAX_RUNNING,
        help="requests that are answered at once, and rows of the KV cache (default: %(default)s)",
    )
    parser.add_argument(
        "--max_waiting",
        type=bounded_int(1),
        default=16,
        help="requests that wait next to them, before others get 429 (default: 16)",
    )
    parser.add_argument(
        "--max_seconds",
        type=bounded_int(1),
        default=600,
        help="after which an answer is cut off (default: 600)",
    )


def read_token(file: Path | None) -> str:
    """The password of `--token-file`, or of the environment; empty: none. Raises ConfigError: a
    file without one."""
    if file is None:
        return os.environ.get("SEED_TOKEN", "").strip()
    try:
        token = file.read_text(encoding="utf-8-sig").strip()  # editors may write a BOM
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--token-file {file}: cannot be read ({first_line(error)}).") from error
    if not token:
        raise ConfigError(f"--token-file {file} is empty: write a password into it.")
    return token


def load_system(args: argparse.Namespace) -> MultimodalSystem:
    """The system, by its name or by its parts' files."""
    files = {
        "model": args.model,
        "tokenizer": args.tokenizer,
        "image_transform": args.image_transform,
    }

    # 1. Either a name.
    if args.system:
        named_parts = [name for name, value in files.items() if value]
        if named_parts:
            raise ConfigError(
                f"--system names all that is served, --{named_parts[0]} a part of it; give one of "
                "them."
            )
        return load_named(args, args.system)

    # 2. Or the files of all parts; a tokenizer's folder has its image transform.
    if args.engine != "torch":
        raise ConfigError(f"--engine {args.engine} needs --system.")
    if args.model and args.tokenizer and (args.image_transform or os.path.isdir(args.tokenizer)):
        return load_parts(args)
    lacking = ", ".join(f"--{name}" for name, value in files.items() if not value)
    raise ConfigError(f"Name what to serve: --system nano, or the missing {lacking}.")


def load_named(
    args: argparse.Namespace, system: str | SystemConfig, **options: object
) -> MultimodalSystem:
    """A system by its name or parts; `options` replace what the flags set."""
    from seed_multimodal.pipelines.base import MultimodalSystem

    # Parts that wait on the CPU until they work.
    parts = {
        "llm": args.offload_llm,
        "encoder": args.offload_encoder,
        "decoder": args.offload_decoder,
    }
    settings = dict[str, Any](
        device=args.llm_device,
        image_device=args.tokenizer_device,
        offload=[name for name, chosen in parts.items() if chosen],
        engine=args.engine,
        url=args.url,
        gguf=args.gguf,
        dtype=args.dtype,
        quantization=args.quantization,
        compiled=args.compiled,
        kv_cache=args.kv_cache,
        max_running=args.max_running,
    )
    return MultimodalSystem.from_pretrained(system, **settings | options)


def load_parts(args: argparse.Namespace) -> MultimodalSystem:
    """SEED-LLaMA from the original's YAML files."""
    from seed_multimodal.compat.part_files import seed_llama_of_files

    files = {
        "tokenizer": args.tokenizer,
        "llm": args.model,
        "image_transform": args.image_transform,
    }
    config, options = seed_llama_of_files(files, args.dtype, args.quantization)
    return load_named(args, config, **options)


def run(args: argparse.Namespace) -> int:
    """Load the system and serve it."""
    from seed_multimodal.device import limit_threads
    from seed_multimodal.inference.engines import EngineOptions
    from seed_multimodal.progress import quiet_libraries
    from seed_multimodal.serving.app import create_app, listen, loading, serve
    from seed_multimodal.serving.schema import Limits

    # 1. The port is taken before the weights are loaded, which takes minutes.
    token = read_token(args.token_file)
    EngineOptions(args.engine, args.url, args.gguf)  # raises for flags that exclude each other
    sock = listen(args.host, args.port, token)
    quiet_libraries(args.debug)

    # 2. The system. A missing de-tokenizer is reported now, not at the first drawing.
    with loading(sock):
        system = load_system(args)
        limit_threads(system.llm, system.images.model)
        try:
            system.images.prepare_drawing()
        except CheckpointError as error:
            if system.images.can_draw and system.config.can_draw:  # damaged rather than left out
                raise
            print(f"{error} Images are read and described.")

    # 3. The server.
    limits = Limits(
        max_pixels=args.max_megapixels * 1_000_000,
        max_running=args.max_running,
        max_waiting=args.max_waiting,
        seconds=args.max_seconds,
    )
    app = create_app(system, limits=limits, token=token, origins=args.allow_origin)
    serve(app, sock)
    return 0


if __name__ == "__main__":
    sys.exit(run_program(build_parser(), run, name="seed_llama_flask"))
