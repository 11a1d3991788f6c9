"""Fixtures of the server's tests: each family behind Flask's test client."""

import pytest
from served import PROMPTS


@pytest.fixture(scope="session")
def client_of():
    """Builds a client of a system's server: `client_of(system, **limits)`."""

    def build(system, **limits):
        from seed_multimodal.serving.app import create_app
        from seed_multimodal.serving.schema import Limits

        return create_app(system, limits=Limits(**limits)).test_client()

    return build


@pytest.fixture(scope="module")
def client(client_of, tiny):
    """Of SEED-LLaMA with random weights, whose answers never end by themselves."""
    return client_of(tiny)


@pytest.fixture(scope="module", params=["tiny", "tiny_x", "tiny_lavit"])
def system(request: pytest.FixtureRequest):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def family_client(client_of, system):
    return client_of(system)


@pytest.fixture(scope="module")
def prompt(system) -> str:
    """The text of `/generate` for a first message, to be formatted with the message."""
    return PROMPTS[system.config.system]
