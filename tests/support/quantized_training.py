"""Quick training with quantization: torchao's patterns are traced once a session."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

_TRACED: dict[tuple[object, ...], Any] = {}


def _key(pattern: Any, examples: tuple[Any, ...], options: dict[str, Any]) -> tuple[object, ...]:
    function = pattern.fn
    cells = tuple(repr(cell.cell_contents) for cell in function.__closure__ or ())
    shapes = tuple(tuple(getattr(each, "shape", ())) for each in examples)
    return function.__qualname__, cells, shapes, tuple(sorted(map(str, options.items())))


@contextmanager
def traced_once() -> Iterator[None]:
    """Let torchao trace each of its patterns once, which takes seconds for each model otherwise."""
    from torchao.quantization.pt2e import export_utils, qat_utils, utils

    trace: Callable[..., Any] = utils._get_aten_graph_module_for_pattern

    def traced(pattern: Any, examples: tuple[Any, ...], *rest: Any, **options: Any) -> Any:
        key = _key(pattern, examples, {**options, "rest": rest})
        if key not in _TRACED:
            _TRACED[key] = trace(pattern, examples, *rest, **options)
        return copy.deepcopy(_TRACED[key])

    with pytest.MonkeyPatch.context() as patch:
        for module in (export_utils, qat_utils, utils):
            if hasattr(module, trace.__name__):
                patch.setattr(module, trace.__name__, traced)
        yield
