"""Fixtures of the tests of programs."""

from collections.abc import Callable

import pytest
from torch import Tensor

from starfire_prune.sparse.module import CompiledModel
from tests.support.program_files import Content
from tests.support.programs import MODELS, content_of

Compiled = Callable[[str], tuple[CompiledModel, Tensor]]


@pytest.fixture(scope="session")
def compiled(native_kernels) -> Compiled:
    """The compiled model of that name, with an example of its input."""
    models: dict[str, tuple[CompiledModel, Tensor]] = {}

    def get(name: str) -> tuple[CompiledModel, Tensor]:
        if name not in models:
            models[name] = MODELS[name]()
        return models[name]

    return get


@pytest.fixture(scope="session")
def contents(compiled) -> dict[str, Content]:
    """What the files of all models hold."""
    return {name: content_of(compiled(name)[0]) for name in MODELS}
