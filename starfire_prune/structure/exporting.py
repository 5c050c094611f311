"""`torch.export` of a model; an error names a part of the model that can be exported instead."""

from __future__ import annotations

import contextlib
import io
import sys
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from starfire_prune.utils.errors import TraceError
from starfire_prune.utils.modules import prunable_layers
from starfire_prune.utils.text import first_line

__all__ = ["exportable_part", "exported_program", "quiet_export"]


_MOST_TRIALS = 5  # each takes as long as an export
_LEAST_SHARE = 0.1  # of the model's layers, for a part to be worth an export


def exported_program(model: nn.Module, example: tuple[Any, ...]) -> torch.export.ExportedProgram:
    """The exported program of a model, in the mode in which the model is.

    Args:
        model: A model without hooks that prune it.
        example: The model's arguments.

    Raises:
        TraceError: If `torch.export` can't trace the forward pass. Errors that the model also
            raises without `torch.export` are raised unchanged.
    """
    try:
        with quiet_export():
            # strict=False: torch 2.6 would trace the code by default, with warnings of its own
            return torch.export.export(model, example, strict=False)
    except Exception as error:  # the model's code and torch.export raise errors of every kind
        part = exportable_part(model, example)
        raise TraceError(
            f"torch.export can't trace {type(model).__name__}: "
            f"{textwrap.shorten(first_line(error), 200)}{part}"
        ) from error


def exportable_part(model: nn.Module, example: tuple[Any, ...], *, any_batch: bool = False) -> str:
    """The end of an error: the part with the most layers that `torch.export` can export.

    The model runs once, so that the arguments of its parts are known. Its own errors are raised.

    Args:
        model: A model that can't be exported.
        example: The model's arguments.
        any_batch: Whether only parts are considered that can be exported for batches of any size.

    Returns:
        The suggestion, which may be empty.
    """
    calls = _calls(model, example)
    numbers = {name: len(prunable_layers(model.get_submodule(name))) for name in calls}
    least = max(1, _LEAST_SHARE * len(prunable_layers(model)))
    names = sorted(
        (name for name in calls if numbers[name] >= least),
        key=lambda name: (-numbers[name], name.count(".")),
    )
    for name in names[:_MOST_TRIALS]:
        arguments, keywords = calls[name]
        if _can_export(model.get_submodule(name), arguments, keywords, any_batch):
            return (
                f"; use its part `model.{name}` instead, which can be exported"
                f"{_input_of(arguments, keywords)}"
            )
    return ""


@contextlib.contextmanager
def quiet_export() -> Iterator[None]:
    """Drop what torch prints on stderr in a failing export: graphs of thousands of lines."""
    printed = io.StringIO()
    with contextlib.redirect_stderr(printed):
        yield
    sys.stderr.write(printed.getvalue())


Call = tuple[tuple[Any, ...], Mapping[str, Any]]


def _calls(model: nn.Module, example: tuple[Any, ...]) -> dict[str, Call]:
    """The arguments of the first call of each module with layers inside, by the module's name."""
    calls: dict[str, Call] = {}

    def record(name: str, arguments: tuple[Any, ...], keywords: Mapping[str, Any]) -> None:
        calls.setdefault(name, (arguments, keywords))

    handles = [
        module.register_forward_pre_hook(
            lambda _, arguments, keywords, name=name: record(name, arguments, keywords),
            with_kwargs=True,
        )
        for name, module in model.named_modules()
        if name and next(module.children(), None) is not None
    ]
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            model(*example)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _can_export(
    part: nn.Module, arguments: tuple[Any, ...], keywords: Mapping[str, Any], any_batch: bool
) -> bool:
    if any_batch and not _is_batch(arguments, keywords):
        return False
    options: Any = {"dynamic_shapes": ({0: torch.export.Dim("batch")},)} if any_batch else {}
    try:
        with quiet_export(), torch.no_grad():
            torch.export.export(part, arguments, dict(keywords), strict=False, **options)
    except Exception:
        return False
    return True


def _is_batch(arguments: tuple[Any, ...], keywords: Mapping[str, Any]) -> bool:
    return not keywords and len(arguments) == 1 and isinstance(arguments[0], Tensor)


def _input_of(arguments: tuple[Any, ...], keywords: Mapping[str, Any]) -> str:
    if not _is_batch(arguments, keywords):
        return ""
    return f" with an input of shape {tuple(arguments[0].shape)}"
