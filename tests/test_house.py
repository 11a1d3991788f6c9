"""The repository's own rules: licences, what is installed, what imports what, where things lie."""

import ast
import functools
import graphlib
import re
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from repository import ROOT

from seed_multimodal.errors import EXTRAS, package_of

PACKAGE = ROOT / "src" / "seed_multimodal"
SOURCES = sorted(PACKAGE.rglob("*.py"))


# ---- licences


def test_licences_are_there():
    licence = (ROOT / "License.txt").read_text()
    assert "Apache License" in licence and "END OF TERMS AND CONDITIONS" in licence
    notice = (ROOT / "NOTICE").read_text()
    for name in ("data/nano/NOTICE.md", "images/NOTICE.md", "pretrained/nano-x/", "CC BY"):
        assert name in notice
    images = (ROOT / "images" / "NOTICE.md").read_text()
    for file in (ROOT / "images").iterdir():
        assert file.suffix not in (".png", ".jpg") or f"`{file.name}`" in images, file


# ---- installation

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
REQUIREMENTS = {
    "": [Requirement(text) for text in PROJECT["dependencies"]],
    **{
        extra: [Requirement(text) for text in texts]
        for extra, texts in PROJECT["optional-dependencies"].items()
    },
}
# Packages of modules with another name, besides those that `errors` knows.
DISTRIBUTIONS = {
    "PIL": "pillow",
    "yaml": "pyyaml",
    "huggingface_hub": "transformers",
    "tokenizers": "transformers",
    "fastapi": "gradio",
    "gradio_client": "gradio",
}


def packages(*extras: str) -> set[str]:
    """Names of what `pip install` of these extras installs, "" being no extra."""
    return {requirement.name.lower() for extra in extras for requirement in REQUIREMENTS[extra]}


@pytest.mark.parametrize("file", ["oldest.txt", "newest.txt"])
def test_constraints_are_within_the_bounds(file):
    text = (ROOT / "constraints" / file).read_text()
    versions = re.findall(r"(?m)^([\w-]+)==([^ ;\\]+)", text)
    for extra, requirements in REQUIREMENTS.items():
        # An environment of its own; compiled; of the cluster's version.
        if extra in ("harness", "laptop", "ray"):
            continue
        for requirement in requirements:
            pinned = [version for name, version in versions if name == requirement.name]
            assert pinned and all(map(requirement.specifier.contains, pinned)), requirement


def test_other_install_files_agree_with_pyproject():
    for bound in PROJECT["dependencies"][:2]:
        for file in ("install.sh", "Dockerfile"):
            assert f'"{bound}"' in (ROOT / file).read_text(), f"{file}: {bound}"
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    listed = [line for line in lines if not line.startswith("#")]
    assert listed[0] == "-e .[train,demo]"
    assert {Requirement(line).name.lower() for line in listed[1:]} <= packages("", "train", "demo")


def third_party(sources: Iterable[Path]) -> dict[str, str]:
    """Package that is not ours or Python's → one of the files that import it."""
    importing = {}
    for source in sources:
        for module in imports(source):
            top = module.partition(".")[0]
            if top not in sys.stdlib_module_names and top != "seed_multimodal":
                importing[DISTRIBUTIONS.get(top, package_of(module)).lower()] = source.name
    return importing


def test_imports_are_declared_and_extras_named():
    # A user without the extra must read its name, not a traceback of a missing module.
    named = {
        package_of(module).lower(): extra
        for extra, modules in EXTRAS.items()
        for module in modules.split()
    }
    used = third_party(SOURCES)
    assert {name: used[name] for name in used.keys() - packages("") - named.keys()} == {}
    for name, extra in named.items():
        assert name in packages(extra), name


def test_the_extra_demo_brings_what_the_server_imports():
    modules = modules_of(PACKAGE)
    waiting = [*(ROOT / "gradio_demo").glob("*.py")]
    reached = set()
    while waiting:
        source = waiting.pop()
        if source not in reached:
            reached.add(source)
            waiting += [modules[name] for name in imports(source) if name in modules]
    assert PACKAGE / "serving" / "app.py" in reached
    used = third_party(reached)
    assert {name: used[name] for name in used.keys() - packages("", "demo")} == {}


# ---- imports

# A package may import itself and those before it. Other modules of the root are below all packages,
# or above.
PACKAGES = (
    "weights images nn language inference diffusion models.registry pipelines models transformers "
    "data pretokenize training evaluation recipes rl serving cli compat"
).split()
ABOVE = ("__main__", "")  # "" is the package itself, which names its public objects


@functools.cache
def imports(source: Path, types: bool = False) -> set[str]:
    """Modules that a file imports anywhere; `types`: also those for type checkers only."""
    found = set()
    waiting = [ast.parse(source.read_text(encoding="utf-8"))]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING" and not types:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            # What is imported may be a module itself.
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        waiting += ast.iter_child_nodes(node)
    return found


def modules_of(package: Path) -> dict[str, Path]:
    """Dotted name → file."""
    return {
        ".".join(file.relative_to(package.parent).with_suffix("").parts): file
        for file in package.rglob("*.py")
    }


@functools.cache
def import_graph(package: Path) -> dict[str, set[str]]:
    """Module → the package's modules that it imports, for type checkers, too; without the package's
    name, and without `__init__`, which lists what is public."""
    prefix = f"{package.name}."
    modules = modules_of(package)
    graph = {}
    for name, file in modules.items():
        if not name.endswith("__init__"):
            targets = imports(file, types=True) & modules.keys() - {name}
            graph[name.removeprefix(prefix)] = {target.removeprefix(prefix) for target in targets}
    return graph


@pytest.mark.parametrize("package", [PACKAGE, ROOT / "SEED_Tokenizer" / "seed_lavis"])
def test_no_modules_import_each_other(package):
    # A circle is a CycleError, which names its modules.
    graphlib.TopologicalSorter(import_graph(package)).prepare()


def rank(name) -> int:
    """Position of a module in the import order."""
    if name == "models.registry":
        return PACKAGES.index(name)
    top = name.partition(".")[0]
    if top in PACKAGES:
        return PACKAGES.index(top)
    return len(PACKAGES) if top in ABOVE else -1


def test_imports_point_one_way():
    wrong = []
    for name, targets in import_graph(PACKAGE).items():
        for target in targets:
            if rank(target) > rank(name):
                wrong.append(f"{name} imports {target}")
    assert not wrong


def test_only_its_own_folder_imports_a_family():
    # A further family must not need an edit elsewhere; `compat` are the originals' own programs,
    # `cli.recipe` reads a YAML file of SEED's folder.
    for name, file in modules_of(PACKAGE).items():
        package = name.split(".")[1]
        if package in ("models", "recipes", "compat") or name == "seed_multimodal.cli.recipe":
            continue
        for target in imports(file):
            is_family = target.startswith(("seed_multimodal.models.", "seed_multimodal.recipes."))
            assert not is_family or "models.registry" in target, f"{name} imports {target}"


def test_the_library_does_not_import_seed_nano():
    for folder in (PACKAGE, ROOT / "SEED_Tokenizer", ROOT / "MultiModalLLM", ROOT / "gradio_demo"):
        for file in folder.rglob("*.py"):
            assert not any(name.startswith("seed_nano") for name in imports(file)), file


def test_serving_opens_its_own_files_and_decoded_texts_only():
    # `open_image` takes a text of the local user as a path; a stranger's would be read, too.
    own = "Path(upload|Path(self.path|Path(pictures[-1].path|io.decode_text(data|content|self"
    for source in (PACKAGE / "serving").glob("*.py"):
        calls = r"\b(?:open_image|StoredImage|read_string)\(([^,)]*)"
        assert {*re.findall(calls, source.read_text())} <= {*own.split("|")}, source


def test_nothing_unpickles_or_is_tied_to_one_device():
    # A file of weights or data must not run code; `.cuda()` breaks every other machine.
    for source in SOURCES:
        # One restricted reader of the originals' shards has its own Unpickler.
        if source.name != "pickled_shards.py":
            assert not imports(source) & {"pickle.load", "pickle.loads", "pickle.Unpickler"}, source
        for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            call = ast.unparse(node.func)
            position = f"{source.name}:{node.lineno}: {call}"
            assert call.startswith("torch.") or not call.endswith(".cuda"), position
            assert not re.search(
                r"\b(pickle|dill|marshal|joblib)\.(load|loads|Unpickler)$", call
            ), position
            if call == "torch.load":
                assert "weights_only=True" in ast.unparse(node), position


# Functions of torch whose result depends on its default device, and those of whole numbers, whose
# dtype is not a default.
NEW_TENSORS = set("tensor zeros ones empty full linspace eye rand randn".split())
NEW_INTEGERS = set("as_tensor arange randint randperm".split())


def test_new_tensors_name_dtype_and_device():
    # Else `torch.set_default_dtype` or `set_default_device` of a user's program breaks the library.
    # Training has a program of its own; initial values of a network are replaced by loaded ones.
    wrong = []
    folders = "inference pipelines diffusion models nn images language serving".split()
    for source in [file for folder in folders for file in (PACKAGE / folder).rglob("*.py")]:
        if re.search("train|losses|objectives|augment", source.name):
            continue
        tree = ast.parse(source.read_text(encoding="utf-8"))
        calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
        initial: set[ast.AST] = set()
        for call in calls:
            if ast.unparse(call.func) in ("nn.Parameter", "self.register_buffer"):
                initial |= set(ast.walk(call))
        for call in calls:
            library, _, name = ast.unparse(call.func).rpartition(".")
            if library != "torch" or name not in NEW_TENSORS | NEW_INTEGERS or call in initial:
                continue
            named = {keyword.arg for keyword in call.keywords}  # None: of `**options`
            needed = {"device"} if name in NEW_INTEGERS else {"device", "dtype"}
            if None not in named and not needed <= named:
                wrong.append(f"{source.name}:{call.lineno}: {ast.unparse(call)}")
    assert not wrong


# ---- layout


def test_documents_name_what_exists():
    folders = "src|scripts|tests|configs|MultiModalLLM|SEED_Tokenizer|benchmarks|docs|data"
    architecture = (ROOT / "docs" / "explanation" / "architecture.md").read_text(encoding="utf-8")
    missing = [
        f"architecture.md: {folder.parent.name}"
        for folder in PACKAGE.glob("*/__init__.py")
        if f"`{folder.parent.name}`" not in architecture
    ]
    for page in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *ROOT.glob("*/README.md")):
        text = page.read_text(encoding="utf-8")
        for link in re.findall(r"\]\(([^)#\s]+)", text):
            is_file = "://" not in link and "reference/" not in link
            if is_file and not (page.parent / link).exists():
                missing.append(f"{page.name}: {link}")
        parents = (ROOT, ROOT / "MultiModalLLM", ROOT / "SEED_Tokenizer", page.parent)
        for path in re.findall(rf"(?<![\w/.])(?:{folders})/[\w./-]+", text):
            # Beginnings of names are allowed, and PROGRAM for any.
            if "PROGRAM" not in path and not any(
                any(parent.glob(f"{path.rstrip('.')}*")) for parent in parents
            ):
                missing.append(f"{page.name}: {path}")
    assert not missing
