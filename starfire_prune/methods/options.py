"""Types of options that several methods share, with their ranges and descriptions."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from starfire_prune.utils.settings import got, settings_error

__all__ = ["BlockSize", "Count", "Fraction", "Scope", "Seed", "Then"]


def _block_size(value: object) -> object:
    sides = list(value) if isinstance(value, (list, tuple)) else []
    if len(sides) == 2 and all(type(side) is int and side >= 1 for side in sides):
        return value
    raise settings_error(
        f"must be two whole numbers [out, in] from 1 {got(value)}; [4, 1] is four neighbouring "
        f"output channels of one input channel"
    )


BlockSize = Annotated[tuple[int, int], BeforeValidator(_block_size), Field(strict=False)]
Count = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Scope = Literal["channel", "layer"]
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]  # NumPy accepts no larger seed
Then = Literal["fine", "block"]
