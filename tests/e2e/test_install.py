"""`install.sh` with a real environment and pip (the packages are tiny wheels in a find-links
folder); our own wheel."""

import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from real_processes import run_process
from repository import ROOT
from yaml_tables import read_tables

pytestmark = [pytest.mark.process, pytest.mark.nightly]
PROJECT = """build-system = {requires = [], build-backend = "backend", backend-path = ["."]}
project = {name = "seed-multimodal", version = "1"}
"""
BACKEND = """from shutil import copy
def build_editable(folder, *_):
    return copy("seed_multimodal-1-py3-none-any.whl", folder).split("/")[-1]
"""


def test_install_takes_the_cpu_build_and_lavis_without_its_pins(tmp_path):
    shutil.copy(ROOT / "install.sh", tmp_path)
    (tmp_path / "pyproject.toml").write_text(PROJECT)
    (tmp_path / "backend.py").write_text(BACKEND)
    for name, version, requires in read_tables(__file__):
        with zipfile.ZipFile(tmp_path / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"{name.removeprefix('salesforce_')}.py", f"__version__ = {version!r}\n")
            info = {
                "METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{requires}",
                "RECORD": "",
                "WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
            }
            for file, text in info.items():
                wheel.writestr(f"{name}-{version}.dist-info/{file}", text)
    run = {
        "cwd": tmp_path,
        "capture_output": True,
        "text": True,
        "env": {
            "PATH": f"{Path(shutil.which('python3')).parent}:/usr/bin:/bin",
            "HOME": str(tmp_path),
            "PIP_NO_INDEX": "1",
            "PIP_FIND_LINKS": str(tmp_path),
            "https_proxy": "http://127.0.0.1:9",
        },
    }
    done = subprocess.run(["bash", "install.sh", "--lavis"], **run)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "torch 2.13.0+cpu, torchvision 0.28" in done.stdout
    python = tmp_path / ".venv" / "bin" / "python"
    subprocess.run([python, "-c", "import lavis, torchvision"], check=True)

    # A second run leaves the environment as it is.
    assert "already installed" in subprocess.run(["bash", "install.sh", "--lavis"], **run).stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A new environment with the wheel that was built from the sdist; other packages are this
    environment's."""
    folder = tmp_path_factory.mktemp("wheel")
    copy = folder / "copy"
    copy.mkdir()
    for name in ("pyproject.toml", "README.md", "License.txt", "NOTICE"):
        shutil.copy(ROOT / name, copy)
    ignored = shutil.ignore_patterns("*.egg-info", "__pycache__")
    shutil.copytree(ROOT / "src", copy / "src", ignore=ignored)
    quiet = {"check": True, "stdout": subprocess.DEVNULL}
    code = f"from setuptools.build_meta import build_sdist; build_sdist({str(folder)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=copy, **quiet)
    (sdist,) = folder.glob("seed_multimodal-*.tar.gz")
    pip = f"{sys.executable} -m pip --disable-pip-version-check --no-cache-dir".split()
    subprocess.run(
        [*pip, *f"wheel --no-build-isolation --no-deps --no-index -w {folder} {sdist}".split()],
        **quiet,
    )
    (wheel,) = folder.glob("*.whl")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / "venv")], **quiet)
    subprocess.run(
        [*pip, *f"--python {folder / 'venv'} install --no-deps --no-index {wheel}".split()],
        **quiet,
    )
    packages = next((folder / "venv").glob("lib/python*/site-packages"))
    (packages / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "venv" / "bin"


@pytest.mark.parametrize("name", ["nano/seed_tokenizer/diffusion_model", "nano-lavit/pixels"])
def test_the_wheel_loads_the_layout_decoders_of_nano(installed, tmp_path, name):
    code = (
        "import sys, pathlib; from seed_multimodal.diffusion.conditioner import load_conditioner; "
        "print(sys.modules[type(load_conditioner(pathlib.Path(sys.argv[1]))).__module__].__file__)"
    )
    done = run_process(
        [installed / "python", "-c", code, ROOT / "pretrained" / name],
        cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
    )
    assert done.stdout.startswith(str(installed.parent)), done.stderr
    assert done.stdout.endswith("seed_nano/layout.py\n")


def test_the_wheel_brings_the_command_and_says_where_nano_is(installed, tmp_path):
    def seed(*argv, cwd=tmp_path):
        return run_process(
            [installed / "seed", *argv],
            cwd=cwd,
            env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"},
        )

    assert "seed describe" in seed("--help").stdout
    absent = seed("tokenize", str(ROOT / "images/cat.jpg"))
    assert absent.returncode == 2 and "in the repository's pretrained/" in absent.stderr
    assert len(seed("tokenize", "images/cat.jpg", cwd=ROOT).stdout.split()) >= 32
