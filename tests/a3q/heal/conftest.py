"""What the tests of healing share."""

from __future__ import annotations

import pytest

from a3q.model import Model
from converters.hf_reader import open_huggingface
from tests.a3q.heal.chatty import TEMPLATE
from tests.damaged import with_damage
from tests.pico import write_model


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return open_huggingface(write_model(tmp_path_factory.mktemp("heal"), "llama", initializer_range=0.2))


@pytest.fixture(scope="session")
def smaller(original: Model) -> Model:
    return with_damage(original)


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return open_huggingface(write_model(tmp_path_factory.mktemp("plain")))


@pytest.fixture(scope="session")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """With a chat template."""
    folder = write_model(tmp_path_factory.mktemp("chat"))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return open_huggingface(folder)
