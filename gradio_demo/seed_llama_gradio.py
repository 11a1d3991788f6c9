"""The demo's web page: a chat with images in and out, talking to gradio_demo/seed_llama_flask.py.

    python gradio_demo/seed_llama_gradio.py --model_type nano --server_port 7860 \\
        --request_address http://127.0.0.1:7890/generate
"""

import argparse
import sys
from pathlib import Path

# Runs from a checkout that is not installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from seed_multimodal.entry import run_program  # noqa: E402
from seed_multimodal.models.registry import model_cards  # noqa: E402
from seed_multimodal.proxies import without_proxy  # noqa: E402


def build_parser() -> argparse.ArgumentParser:
    """The flags: the original's, and ours."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--server_port", type=int, default=7860, help="port of the page (default: 7860)"
    )
    parser.add_argument(
        "--server_name",
        default="127.0.0.1",
        help="address of the page; 0.0.0.0 shows it to other machines",
    )
    parser.add_argument(
        "--request_address", default="http://127.0.0.1:7890/generate", help="the backend's address"
    )
    parser.add_argument(
        "--url",
        action="append",
        default=[],
        metavar="ADDRESS",
        help="a further backend, any number of times; the page asks it which model it has",
    )
    parser.add_argument(
        "--root_path",
        default="",
        help="path or URL of the page behind a reverse proxy, such as /chat",
    )
    parser.add_argument(
        "--allow-origin",
        "--allow_origin",
        nargs="+",
        type=str.lower,
        default=[],
        metavar="ORIGIN",
        help="origins of the page behind a reverse proxy, such as https://seed.example.org",
    )
    parser.add_argument(
        "--log-votes",
        "--log_votes",
        type=Path,
        metavar="DIR",
        help="folder for a log of conversations, images and votes; without it nothing is logged",
    )
    parser.add_argument(
        "--model_type",
        default="seed-llama-14b",
        choices=model_cards(),
        help="used until the backend is asked (default: seed-llama-14b)",
    )
    return parser


def run(args: argparse.Namespace) -> int:
    """Serve the page."""
    # Gradio is not imported where a SOCKS proxy is set.
    with without_proxy():
        from seed_multimodal.serving.page import launch

    launch(
        [args.request_address, *args.url],
        model_cards()[args.model_type],
        args.server_name,
        args.server_port,
        root_path=args.root_path,
        origins=args.allow_origin,
        log_folder=args.log_votes,
    )
    return 0


if __name__ == "__main__":
    sys.exit(run_program(build_parser(), run, name="seed_llama_gradio"))
