"""Copies and graphs of models."""

import torch
from torch import Tensor, nn

from starfire_prune.structure.graph import dense_copy


class Caching(nn.Module):
    """Keeps a computed tensor in a dictionary, as the attention of LeViT does."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.cache = nn.Linear(3, 3), {}  # type: ignore[var-annotated]

    def forward(self, input: Tensor) -> Tensor:
        self.cache["bias"] = self.layer.bias * 2
        output: Tensor = self.layer(input) + self.cache["bias"]
        return output


def test_models_that_cache_computed_tensors_are_copied():
    model = Caching()
    model(torch.ones(1, 3))
    assert torch.equal(dense_copy(model).cache["bias"], model.cache["bias"])
