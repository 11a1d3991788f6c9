"""The choice of device and dtype is printed with reasons for what was chosen, and for nothing else."""

from __future__ import annotations

import re

import pytest
import torch

from seed_multimodal.device import choose_device


@pytest.mark.parametrize(("device", "dtype", "sentence"), [
    ("auto", "auto", r"Running on cpu in float32 \(no GPU found; float32 is the safe precision on cpu\)\."),
    ("cpu", "auto", r"Running on cpu in float32 \(float32 is the safe precision on cpu\)\."),
    ("auto", torch.float16, r"Running on cpu in float16 \(no GPU found\)\."),
    ("cpu", "bf16", r"Running on cpu in bfloat16\.")])
def test_reasons_are_given_for_what_is_chosen_here(device: str, dtype: object, sentence: str,
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    said: list[str] = []
    choose_device(device, dtype, log=said.append)  # type: ignore[arg-type]
    assert len(said) == 1 and re.fullmatch(sentence, said[0]), said
