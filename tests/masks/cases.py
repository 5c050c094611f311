"""How the tests of the mask functions draw weights and masks, and compare them."""

import math
import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import settings
from numpy.typing import NDArray
from torch import Tensor

from tests.support import oracle

examples = settings(max_examples=25)
more_examples = settings(max_examples=150)

Prune = Callable[..., Tensor]  # (weight, amount, *, mask, ...) -> mask
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
NAN, INF = math.nan, math.inf


def golden(
    name: str, prune: Prune, weight: Any, amount: float, expected: Any, **options: Any
) -> Any:
    """A case of `assert_golden`, written by hand."""
    return pytest.param(prune, weight, amount, options, expected, id=name)


def assert_golden(
    prune: Prune, weight: Any, amount: float, options: dict[str, Any], expected: Any
) -> None:
    if "mask" in options:
        options = {**options, "mask": torch.tensor(options["mask"], dtype=torch.bool)}
    result = prune(torch.tensor(weight, dtype=torch.float32), amount, **options)
    assert result.int().tolist() == expected


seeds = st.integers(0, 2**32 - 1)
shares = st.sampled_from([step / 16 for step in range(17)]) | st.floats(0, 1)
KINDS = ["continuous", "few", "zeros", "close", "equal"]


def draw_values(kind: str, shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Scores of one kind: all but the continuous ones tie often."""
    rng = np.random.default_rng(seed)
    values: NDArray[Any]
    if kind == "continuous":
        values = rng.standard_normal(shape)
    elif kind == "few":
        values = rng.choice([-2.0, -1.0, -0.5, -0.0, 0.0, 0.5, 1.0, 2.0], shape)
    elif kind == "zeros":
        values = rng.choice([-1.0, 1.0, 0.25], shape) * (rng.random(shape) < 0.3)
    elif kind == "close":  # neighbours in the dtype: ranking them in a narrower one ties them
        values = 1 + rng.integers(0, 4, shape) * torch.finfo(dtype).eps
    else:
        values = rng.choice([-1.0, 1.0], shape)
    return torch.from_numpy(values).to(dtype)


def values_of(weight: Tensor) -> oracle.Weight:
    """The tensor as the oracle reads it."""
    return np.ascontiguousarray(weight.detach().double().numpy())


@st.composite
def weights(draw: st.DrawFn, shape: tuple[int, ...], exact_sums: bool = False) -> Tensor:
    kind = draw(st.sampled_from(KINDS))
    dtype = draw(st.sampled_from(DTYPES))
    if exact_sums and kind == "close" and dtype == torch.float64:
        dtype = torch.float32  # float64 sums of float64 neighbours depend on the order
    return draw_values(kind, shape, dtype, draw(seeds))


@st.composite
def earlier_masks(
    draw: st.DrawFn, weight: Tensor, expect: Callable[..., oracle.Mask]
) -> Tensor | None:
    """None, or a mask of weights, of kernels (rows) or of the method itself for other weights."""
    shape = tuple(weight.shape)
    rng = np.random.default_rng(draw(seeds))
    kind = draw(st.sampled_from(["none", "weights", "kernels", "method"]))
    share = draw(st.sampled_from([0.1, 0.3, 0.5, 0.8]))
    if kind == "none":
        return None
    if kind == "weights":
        kept = rng.random(shape) >= share
    elif kind == "kernels":
        kept = np.ones(shape, dtype=bool)
        kept[rng.random(shape[: 2 if len(shape) > 2 else 1]) < share] = False
    else:
        other = values_of(draw(weights(shape)))
        kept = expect(other, share / 2, np.ones(shape, dtype=bool))
    mask = torch.from_numpy(kept)
    return mask if draw(st.booleans()) else mask.to(weight.dtype)


def amounts(units: int) -> st.SearchStrategy[float]:
    """Shares and, for a scope of `units`, numbers."""
    return shares | st.integers(0, units)


def layouts(tensor: Tensor) -> Iterator[Tensor]:
    """The same values in other orders and places of memory."""
    backwards = tuple(reversed(range(tensor.dim())))
    yield tensor.permute(backwards).contiguous().permute(backwards)
    yield tensor.transpose(0, 1).contiguous().transpose(0, 1)
    room = torch.zeros([2 * size + 1 for size in tensor.shape], dtype=tensor.dtype)
    slices = room[tuple(slice(1, None, 2) for _ in tensor.shape)]
    yield slices.copy_(tensor)
    if tensor.dim() == 4:
        yield tensor.to(memory_format=torch.channels_last)


def compare(
    data: st.DataObject,
    prune: Prune,
    expect: Callable[..., oracle.Mask],
    shape: tuple[int, ...],
    units: int | None = None,
    exact_sums: bool = False,
    **options: Any,
) -> None:
    """Draw a weight, an amount and an earlier mask; `prune` must compute what `expect` does."""
    weight = data.draw(weights(shape, exact_sums))
    amount = data.draw(shares if units is None else amounts(units))
    mask = data.draw(earlier_masks(weight, partial(expect, **options)))
    weight = data.draw(st.sampled_from([weight, *layouts(weight)]))
    assert_equals_oracle(prune, expect, weight, amount, mask, **options)


def assert_equals_oracle(
    prune: Prune,
    expect: Callable[..., oracle.Mask],
    weight: Tensor,
    amount: float,
    mask: Tensor | None,
    **options: Any,
) -> None:
    kept = np.ones(tuple(weight.shape), dtype=bool) if mask is None else mask.bool().numpy()
    result = prune(weight, amount, mask=mask, **options)
    np.testing.assert_array_equal(
        result.numpy(), expect(values_of(weight), amount, kept, **options)
    )


def assert_large_equals_oracle(
    prune: Prune,
    expect: Callable[..., oracle.Mask],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    **options: Any,
) -> None:
    """Two updates of a layer of real size, where the fast ways of selecting are used."""
    generator = torch.Generator().manual_seed(7)
    mask = None
    for amount in (0.31, 0.6):
        weight = torch.randn(shape, generator=generator).to(dtype)
        assert_equals_oracle(prune, expect, weight, amount, mask, **options)
        mask = prune(weight, amount, mask=mask, **options)


BAD_AMOUNTS = [
    *[(-0.1, ValueError), (1.5, ValueError), (NAN, ValueError), (INF, ValueError)],
    *[(-1, ValueError), (1000000, ValueError)],
    *[("0.5", TypeError), (True, TypeError), (None, TypeError), ([0.5], TypeError)],
]
bad_amounts = pytest.mark.parametrize(
    ("amount", "error"), BAD_AMOUNTS, ids=[repr(amount) for amount, _ in BAD_AMOUNTS]
)


def naming(*words: object) -> str:
    """A pattern for texts that hold all the words, in any order; numbers match as a word."""
    patterns = (
        word if isinstance(word, str) else rf"(?<![\w.-]){re.escape(str(word))}(?!\w)"
        for word in words
    )
    return "(?s)" + "".join(rf"(?=.*{pattern})" for pattern in patterns)


def error_case(
    name: str,
    error: Any,
    words: Any,
    prune: Prune,
    *shape: int,
    amount: float = 0.5,
    **options: Any,
) -> Any:
    """A call that must raise `error` with a text that holds `words`; see `naming`."""
    return pytest.param(prune, shape, amount, options, error, words, id=name)


wrong = (TypeError, ValueError)

# What is not a block size, with the text of the error.
BAD_BLOCK_SIZES: list[tuple[object, type[Exception], str]] = [
    *[(size, TypeError, repr(size)) for size in (4, True, 4.0, "44", None)],
    *[(size, TypeError, repr(size)) for size in ((True, 1), (4.0, 1), ("4", 1), (None, 1))],
    *[(size, ValueError, repr(size)) for size in ((), (4,), (4, 1, 1))],
    *[(size, ValueError, repr(size)) for size in ((0, 1), (4, 0), (-1, 2))],
]
bad_block_sizes = pytest.mark.parametrize(
    ("block_size", "error", "text"), BAD_BLOCK_SIZES, ids=[text for *_, text in BAD_BLOCK_SIZES]
)


def block_size_error(text: str) -> str:
    """A pattern for the error of a bad block size."""
    wanted = f"`block_size` (={text}) must be two ints [out, in], such as (4, 1)"
    return f"^{re.escape(wanted)}"
