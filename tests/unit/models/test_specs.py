"""Families' specifications: the objects that they name by their paths exist."""

from __future__ import annotations

import pkgutil

import pytest

from seed_multimodal.models.registry import families


@pytest.mark.parametrize("spec", families(), ids=lambda spec: spec.name)
def test_names_in_a_spec_exist(spec):
    # They are imported on first use: a wrong one would fail in a user's training only.
    names = [spec.system, spec.images, *spec.decoders.values(), *spec.evaluators.values()]
    names += [exported.function for exported in spec.exports.values()]
    names += [training.task for training in spec.trainings.values()]
    for name in names:
        assert callable(pkgutil.resolve_name(name)), name
    for name, path in spec.decoders.items():
        assert pkgutil.resolve_name(path).name == name
