"""Contents of tensors that share their memory."""

import pytest
import torch
from torch import Tensor

from starfire_prune.serialization.tied import check_tied

MEMORY = torch.arange(12.0)
WHOLE = MEMORY.view(3, 4)


@pytest.mark.parametrize(
    ("other", "differing"),
    [
        (MEMORY.view(3, 4), WHOLE + 1),
        (WHOLE.t(), WHOLE.t() + 1),
        (MEMORY[4:8], torch.zeros(4)),
        (WHOLE.t(), WHOLE.t().masked_fill(WHOLE.t() == 5, 0.0)),
        (MEMORY.view(torch.int32)[:2], torch.tensor([1, 2], dtype=torch.int32)),
    ],
)
def test_contents_that_overwrite_each_other_are_refused(other, differing):
    targets: dict[str, Tensor] = {"a": WHOLE, "b": other, "c": torch.zeros(2)}
    before = MEMORY.clone()
    check_tied(targets, {"a": WHOLE, "b": other, "c": torch.ones(2)}.__getitem__)
    with pytest.raises(ValueError, match=r"tensors 'a' and 'b' differ, and share their memory"):
        check_tied(targets, {"a": WHOLE, "b": differing, "c": torch.ones(2)}.__getitem__)
    assert torch.equal(MEMORY, before)


def test_parts_of_one_memory_that_do_not_overlap_may_differ():
    targets = {"a": MEMORY[:6], "b": MEMORY[6:], "none": MEMORY[:0]}
    check_tied(targets, {"a": torch.ones(6), "b": torch.zeros(6)}.__getitem__)


def test_contents_of_another_dtype_are_compared_as_they_will_be():
    half = torch.zeros(2, dtype=torch.float16)
    content = torch.tensor([1.0, torch.nan], dtype=torch.float64)
    check_tied({"a": half, "b": half}, lambda _: content)
