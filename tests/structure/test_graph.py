"""Copies and graphs of models."""

import torch
from torch import Tensor, nn

from starfire_prune.structure.graph import dense_copy


class Caching(nn.Module):
    """Keeps a computed tensor in a dictionary, as the attention of LeViT does."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.cache: dict[str, Tensor] = {}

    def forward(self, input: Tensor) -> Tensor:
        self.cache["bias"] = self.layer.bias * 2
        output: Tensor = self.layer(input) + self.cache["bias"]
        return output


def test_models_that_cache_computed_tensors_are_copied():
    model = Caching()
    model(torch.ones(1, 3))
    (copied,) = (module for module in dense_copy(model).modules() if isinstance(module, Caching))
    assert torch.equal(copied.cache["bias"], model.cache["bias"])
