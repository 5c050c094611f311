"""Fixtures of the tests of `starfire_prune.methods`."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
