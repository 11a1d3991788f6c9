"""Folders and files of the repository that tests read."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NANO = ROOT / "pretrained" / "nano"
FOX = ROOT / "images" / "fox.png"
APPLICATION = ROOT / "MultiModalLLM"
