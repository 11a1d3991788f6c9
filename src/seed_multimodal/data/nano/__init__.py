"""The nano data set: small openly licensed drawings with captions, questions, edit pairs and conversations."""

from __future__ import annotations

from seed_multimodal.data.formats.nano import find_nano
from seed_multimodal.data.nano.load import NanoSet, load_nano
from seed_multimodal.data.nano.types import QA, STYLE_NAMES, Edit, NanoConversation, NanoRecord

__all__ = ["QA", "STYLE_NAMES", "Edit", "NanoConversation", "NanoRecord", "NanoSet", "find_nano", "load_nano"]
