"""The documentation's site: a strict build, no requests to other hosts, and commands that the
parser accepts."""

from __future__ import annotations

import os
import re
import shlex
import sys

import pytest
from real_processes import run_process
from repository import ROOT

from seed_multimodal.cli.main import build_parser

LOADED = re.compile(
    r"<(?:(?:script|img|iframe|source)[^>]*\ssrc|link[^>]*\shref)=\"?(https?:[^\s\">]+)"
)


@pytest.mark.process
@pytest.mark.slow
def test_build_strict_makes_every_page_without_other_hosts(tmp_path):
    """`--strict` fails on broken links and anchors. No page or style sheet loads anything from
    another host."""
    site = tmp_path / "site"
    done = run_process(
        f"{sys.executable} -m mkdocs build --strict --site-dir {site}".split(),
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
    )
    assert done.returncode == 0, done.stderr
    files = {
        page.relative_to(ROOT / "docs").with_suffix(".html")
        for page in (ROOT / "docs").rglob("*.md")
    }
    assert not {page for page in files if not (site / page).is_file()}
    commands = (site / "reference" / "cli.html").read_text(encoding="utf-8")
    assert "seed-reconstruct" in commands and "--guidance-scale" in commands
    assert "gradient_accumulation_steps" in (site / "reference" / "training.html").read_text(
        encoding="utf-8"
    )
    assert "from_pretrained" in (site / "reference" / "python.html").read_text(encoding="utf-8")
    pages = list(site.rglob("*.html"))
    assert len(pages) > 20
    assert not [
        (page.name, link)
        for page in pages
        for link in LOADED.findall(page.read_text(encoding="utf-8"))
    ]
    assert not [
        sheet for sheet in site.rglob("*.css") if re.search(r"url\(\"?https?:", sheet.read_text())
    ]


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
