"""Workspaces are made once for each batch size, and two calls never share one."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from starfire_prune import sparse
from starfire_prune.sparse import module, ops
from starfire_prune.sparse.workspace import MAX_WORKSPACES, WorkspacePool


def workspace() -> Tensor:
    return torch.empty(1)


@pytest.mark.usefixtures("native_kernels")
def test_each_batch_size_has_its_workspace(monkeypatch):
    torch.manual_seed(0)
    model = sparse.compile(nn.Conv2d(3, 4, 3, padding=1).eval(), torch.randn(1, 3, 8, 8))
    made = []

    def new_workspace(program: Tensor, batch: int) -> Tensor:
        made.append(batch)
        return ops.new_workspace(program, batch)

    monkeypatch.setattr(module, "new_workspace", new_workspace)
    inputs = [torch.randn(batch, 3, 8, 8) for batch in (1, 5, 2)]
    first = [model(x) for x in inputs]
    assert all(torch.equal(model(x), y) for x, y in zip(inputs, first, strict=True))
    assert made == [1, 5, 2]


def test_an_acquired_workspace_belongs_to_one_call():
    pool = WorkspacePool()
    released = [workspace(), workspace()]
    for each in released:
        pool.release(2, each)
    acquired = {id(pool.acquire(2)), id(pool.acquire(2))}
    assert acquired == {id(each) for each in released}
    assert pool.acquire(2) is None


def test_workspaces_of_other_batch_sizes_are_kept():
    pool, released = WorkspacePool(), workspace()
    pool.release(2, released)
    assert pool.acquire(3) is None
    assert pool.acquire(2) is released


def test_the_least_recently_used_are_dropped():
    pool = WorkspacePool()
    for batch in range(MAX_WORKSPACES + 2):
        pool.release(batch, workspace())
    assert len(pool) == MAX_WORKSPACES
    assert [pool.acquire(batch) is None for batch in range(4)] == [True, True, False, False]


@pytest.mark.parametrize("again", [copy.deepcopy, lambda a: pickle.loads(pickle.dumps(a))])
def test_copies_are_empty(again):
    pool = WorkspacePool()
    pool.release(1, workspace())
    assert len(again(pool)) == 0
    assert len(pool) == 1
