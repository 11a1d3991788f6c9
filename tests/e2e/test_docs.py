"""The documentation's site: a strict build, no requests to other hosts, and commands that the
parser accepts."""

import re
import shlex
import sys

import pytest
from llm_runs import environment
from real_processes import run_checked
from repository import ROOT

from seed_multimodal.cli.main import build_parser

LOADED = re.compile(
    r"<(?:(?:script|img|iframe|source)[^>]*\ssrc|link[^>]*\shref)=\"?(https?:[^\s\">]+)"
    r"|url\(\"?(https?:[^)]+)"
)


@pytest.mark.process
@pytest.mark.nightly
def test_build_strict_makes_every_page_without_other_hosts(tmp_path):
    # `--strict` fails on broken links and anchors.
    site = tmp_path / "site"
    run_checked(
        f"{sys.executable} -m mkdocs build --strict --site-dir {site}".split(),
        cwd=ROOT,
        env=environment(),
    )
    sources = [page.relative_to(ROOT / "docs") for page in (ROOT / "docs").rglob("*.md")]
    assert all((site / page.with_suffix(".html")).is_file() for page in sources)

    # The reference pages are made of the code.
    for page, name in (
        ("cli", "--guidance-scale"),
        ("training", "gradient_accumulation_steps"),
        ("python", "from_pretrained"),
        ("http", "ignored"),
    ):
        assert name in (site / "reference" / f"{page}.html").read_text(encoding="utf-8")

    # A reader's browser asks no other host.
    files = [*site.rglob("*.html"), *site.rglob("*.css")]
    loaded = {file.name: LOADED.findall(file.read_text(encoding="utf-8")) for file in files}
    assert {name: links for name, links in loaded.items() if links} == {}


def documented_commands() -> list[list[str]]:
    """Each `seed` command of the pages' code blocks, as words."""
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), ROOT / "pretrained" / "README.md"]
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages).replace("\\\n", " ")
    lines = [
        line.strip()
        for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
        for line in block.splitlines()
    ]
    return [
        shlex.split(line, comments=True)[1:]
        for line in lines
        if line.startswith("seed ") and "…" not in line
    ]


def test_documented_commands_are_understood(capsys):
    """The flags and arguments of every documented `seed` command."""
    parser = build_parser()
    unknown = []
    for argv in documented_commands():
        try:
            parser.parse_args(argv)
        except SystemExit:
            unknown.append((argv, capsys.readouterr().err.splitlines()[-1]))
    assert len(documented_commands()) > 30 and not unknown
