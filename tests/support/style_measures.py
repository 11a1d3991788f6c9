#!/usr/bin/env python3
"""How easy the code is to read, in figures: style_measures.py [DIR ...] (default:
src/seed_multimodal).

In brackets: model codebases of the field (open_clip, torchtitan, nanochat; November 2026).

    decisions per body line  if, for, while, except, assert, ternary, comprehension, and/or
                             (0.13-0.21)
    nodes per line           syntax tree without annotations and docstrings (3.8-5.5)
    comments                 per 1,000 tokens (12-31)
    comprehensions, ternaries, tuple assignments, Any: per 1,000 lines (9-14, 4-14, 0.6-6, 0-5)
    private words            share of assigned names and arguments with a word of PRIVATE_WORDS
                             (0.1-0.2 %)
    tokens                   names, operators, numbers, strings outside docstrings: the size
"""

from __future__ import annotations

import ast
import io
import sys
import tokenize
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

# Words that say nothing of what a name holds, or that only this project used.
PRIVATE_WORDS = set(
    "one ones place places number numbers found words where given own written made drawn known "
    "seen said told how away held kept shown around beside whole there most least few several due "
    "begun tried asked usual home".split()
)
LARGE_FUNCTION = 150  # nodes
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
DOCUMENTED = (ast.Module, ast.ClassDef, *FUNCTIONS)
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
BRANCHES = (ast.If, ast.For, ast.While, ast.ExceptHandler, ast.IfExp, ast.Assert, ast.comprehension)
COUNTED_TOKENS = (tokenize.NAME, tokenize.OP, tokenize.NUMBER, tokenize.STRING)


class WithoutAnnotations(ast.NodeTransformer):
    """Removes what the density measures do not count: annotations and docstrings of functions."""

    def visit_arg(self, node: ast.arg) -> ast.AST:
        node.annotation = None
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:  # noqa: N802
        self.generic_visit(node)
        node.returns = None
        if ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
        return node

    visit_AsyncFunctionDef = visit_FunctionDef  # noqa: N815


def source_files(folder: Path) -> list[Path]:
    return [folder] if folder.is_file() else sorted(folder.rglob("*.py"))


def count_decisions(function: ast.AST) -> int:
    total = 0
    for node in ast.walk(function):
        total += isinstance(node, BRANCHES)
        if isinstance(node, ast.BoolOp):
            total += len(node.values) - 1
        if isinstance(node, ast.comprehension):
            total += len(node.ifs)
    return total


def is_private(name: str) -> bool:
    return any(word in PRIVATE_WORDS for word in name.strip("_").split("_"))


def assigned_names(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Assigned names and arguments of functions, with their lines."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id, node.lineno
        if isinstance(node, ast.arg) and node.arg not in ("self", "cls"):
            yield node.arg, node.lineno


def count_text(text: str, tree: ast.AST, counts: Counter[str]) -> list[int]:
    """Count tokens and comments; returns the lines of the comments."""
    docstrings = set()
    for node in ast.walk(tree):
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node):
            docstrings.add((node.body[0].lineno, node.body[0].col_offset))
    comment_lines = []
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            counts["comments"] += 1
            comment_lines.append(token.start[0])
        elif token.type in COUNTED_TOKENS and token.start not in docstrings:
            counts["tokens"] += 1
    return comment_lines


def count_constructs(tree: ast.AST, counts: Counter[str]) -> None:
    """Count dense constructs and names."""
    for node in ast.walk(tree):
        counts["comprehensions"] += isinstance(node, COMPREHENSIONS)
        counts["ternaries"] += isinstance(node, ast.IfExp)
        counts["any"] += isinstance(node, ast.Name) and node.id == "Any"
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple):
            counts["tuples"] += isinstance(node.targets[0], ast.Tuple)
    for name, _ in assigned_names(tree):
        counts["names"] += 1
        counts["private"] += is_private(name)


def count_functions(tree: ast.AST, comment_lines: list[int], counts: Counter[str]) -> None:
    """Count decisions, body lines, and large functions without a comment, in a tree without
    annotations.
    """
    counts["nodes"] += sum(1 for _ in ast.walk(tree))
    for node in ast.walk(tree):
        if not isinstance(node, FUNCTIONS):
            continue
        end = node.end_lineno or node.lineno
        first = getattr(node.body[0], "lineno", end)
        counts["decisions"] += count_decisions(node)
        counts["body lines"] += end - first + 1
        if sum(1 for _ in ast.walk(node)) >= LARGE_FUNCTION:
            counts["large functions"] += 1
            has_comment = any(node.lineno <= line <= end for line in comment_lines)
            counts["large without comment"] += not has_comment


def measure(folder: str | Path) -> dict[str, float]:
    """All measures of the Python files in a folder, or of one file."""
    counts: Counter[str] = Counter()
    for file in source_files(Path(folder)):
        text = file.read_text(encoding="utf-8")
        tree = ast.parse(text)
        counts["lines"] += text.count("\n")
        comment_lines = count_text(text, tree, counts)
        count_constructs(tree, counts)
        count_functions(WithoutAnnotations().visit(tree), comment_lines, counts)

    def per(count: str, total: str, factor: float, digits: int) -> float:
        return round(factor * counts[count] / max(counts[total], 1), digits)

    return {
        "tokens": counts["tokens"],
        "lines": counts["lines"],
        "decisions per body line": per("decisions", "body lines", 1, 2),
        "nodes per line": per("nodes", "lines", 1, 1),
        "comments per 1,000 tokens": per("comments", "tokens", 1000, 1),
        "large functions without a comment, %": per(
            "large without comment", "large functions", 100, 0
        ),
        "comprehensions": per("comprehensions", "lines", 1000, 1),
        "ternaries": per("ternaries", "lines", 1000, 1),
        "tuple assignments": per("tuples", "lines", 1000, 1),
        "Any": per("any", "lines", 1000, 1),
        "private words, %": per("private", "names", 100, 1),
    }


def main(folders: list[str]) -> None:
    rows = [measure(folder) for folder in folders]
    print(" " * 38 + "".join(f"{Path(folder).name:>18}" for folder in folders))
    for key in rows[0]:
        print(f"{key:38}" + "".join(f"{row[key]:>18}" for row in rows))


if __name__ == "__main__":
    main(sys.argv[1:] or ["src/seed_multimodal"])
