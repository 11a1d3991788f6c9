"""`install.sh` with a real environment and pip; the packages are tiny wheels in a find-links folder."""

import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest

PROJECT = """build-system = {requires = [], build-backend = "backend", backend-path = ["."]}
project = {name = "seed-multimodal", version = "1"}
"""
BACKEND = """from shutil import copy
def build_editable(folder, *_): return copy("seed_multimodal-1-py3-none-any.whl", folder).split("/")[-1]
"""
PACKAGES = {("torch", "2.13.0+cpu"): "", ("torchvision", "0.28"): "", ("transformers", "5"): "",
            ("seed_multimodal", "1"): "Requires-Dist: torchvision\nRequires-Dist: transformers\n",
            ("salesforce_lavis", "1.0.2"): "Requires-Dist: transformers==4.25.0\n"}


@pytest.mark.process
@pytest.mark.slow
def test_install_takes_the_cpu_build_and_lavis_without_its_pins(tmp_path):
    shutil.copy(Path(__file__).parents[2] / "install.sh", tmp_path)
    (tmp_path / "pyproject.toml").write_text(PROJECT)
    (tmp_path / "backend.py").write_text(BACKEND)
    for (name, version), requires in PACKAGES.items():
        with zipfile.ZipFile(tmp_path / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"{name.removeprefix('salesforce_')}.py", f"__version__ = {version!r}\n")
            info = {"METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{requires}", "RECORD": "",
                    "WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"}
            for file, text in info.items():
                wheel.writestr(f"{name}-{version}.dist-info/{file}", text)
    run = {"cwd": tmp_path, "capture_output": True, "text": True, "env": {
        "PATH": f"{Path(shutil.which('python3')).parent}:/usr/bin:/bin", "HOME": str(tmp_path),
        "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path), "https_proxy": "http://127.0.0.1:9"}}
    done = subprocess.run(["bash", "install.sh", "--lavis"], **run)
    assert "torch 2.13.0+cpu, torchvision 0.28" in done.stdout and done.returncode == 0, done.stdout + done.stderr
    assert subprocess.run([tmp_path / ".venv" / "bin" / "python", "-c", "import lavis, torchvision"]).returncode == 0
    assert "already installed" in subprocess.run(["bash", "install.sh", "--lavis"], **run).stdout
