"""The memory of calls: made once for each size of the batch, and never for two calls at once."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from starfire_prune import sparse
from starfire_prune.sparse import module as compiled
from starfire_prune.sparse import ops as operator
from starfire_prune.sparse import workspace as arenas
from starfire_prune.sparse.workspace import Arenas


def arena() -> Tensor:
    return torch.empty(1)


@pytest.mark.usefixtures("native_kernels", "one_thread")
def test_each_size_of_the_batch_has_its_arena(monkeypatch):
    torch.manual_seed(0)
    model = sparse.compile(nn.Conv2d(3, 4, 3, padding=1).eval(), torch.randn(1, 3, 8, 8))
    made = []

    def new_arena(program: Tensor, batch: int) -> Tensor:
        made.append(batch)
        return operator.new_arena(program, batch)

    monkeypatch.setattr(compiled, "new_arena", new_arena)
    inputs = [torch.randn(batch, 3, 8, 8) for batch in (1, 5, 2)]
    first = [model(x) for x in inputs]
    assert all(torch.equal(model(x), y) for x, y in zip(inputs, first, strict=True))
    assert made == [1, 5, 2]


def test_what_is_taken_is_nobody_elses():
    kept = Arenas()
    given = [arena(), arena()]
    for each in given:
        kept.give(2, each)
    taken = {id(kept.take(2)), id(kept.take(2))}
    assert taken == {id(each) for each in given}
    assert kept.take(2) is None


def test_arenas_of_other_sizes_are_left():
    kept, given = Arenas(), arena()
    kept.give(2, given)
    assert kept.take(3) is None
    assert kept.take(2) is given


def test_the_longest_unused_are_dropped():
    kept = Arenas()
    for batch in range(arenas.MOST_ARENAS + 2):
        kept.give(batch, arena())
    assert len(kept) == arenas.MOST_ARENAS
    assert [kept.take(batch) is None for batch in range(4)] == [True, True, False, False]


@pytest.mark.parametrize("again", [copy.deepcopy, lambda a: pickle.loads(pickle.dumps(a))])
def test_copies_have_none(again):
    kept = Arenas()
    kept.give(1, arena())
    assert len(again(kept)) == 0
    assert len(kept) == 1
