"""A short training of a random network, and what must hold at its end."""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from starfire_prune import Pruner, load_pruned_model, save_pruned
from starfire_prune.utils.errors import PruningError
from tests.zoo.impulses import UnmeasurableError, foreign_readers, reported_zeros, response
from tests.zoo.networks import Case, Network
from tests.zoo.outcomes import WrongError, sentence_fault

__all__ = ["check_case"]


def check_case(case: Case) -> str:
    """Train a network across its era, and compare the reported zeros with impulses.

    Returns:
        `right`, or the sentence that refuses the case when the pruner is built, or at the first
        update.

    Raises:
        WrongError: If something else happens.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's own code
        network = case.network()
        names = [name for name, _ in network.named_modules() if name]
        try:
            pruner = _pruner(case, network)
        except Exception as error:  # any error is judged
            fault = sentence_fault(error, names)
            if fault is not None:
                raise WrongError(f"the plan: {fault}: {type(error).__name__}: {error}") from error
            return str(error)
        try:
            network, pruner = _trained(case, network, pruner)
        except _RefusedError as error:
            return str(error)
        except Exception as error:
            if _trains_densely(case):
                raise WrongError(f"training: {type(error).__name__}: {error}") from error
            return "the network does not train"
        _check_zeros(case, network, pruner)
        _check_frozen(case, network)
        _check_file(case, network, pruner)
    return "right"


class _RefusedError(Exception):
    """A sentence of the package at the first update."""


def _pruner(case: Case, network: Network, optimizer: torch.optim.Optimizer | None = None) -> Pruner:
    return Pruner(
        network,
        case.pruning,
        updates_per_epoch=case.updates_per_epoch,
        optimizer=optimizer,
        example_input=case.images(97) if case.with_example else None,
    )


def _step(pruner: Pruner, network: Network, is_first: bool) -> None:
    try:
        pruner.step()
    except PruningError as error:
        if (
            is_first
            and sentence_fault(error, [name for name, _ in network.named_modules()]) is None
        ):
            raise _RefusedError(str(error)) from error
        raise


def _optimizer(case: Case, model: nn.Module) -> torch.optim.Optimizer:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if case.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=0.01, momentum=0.9, weight_decay=1e-3)
    return torch.optim.AdamW(parameters, lr=0.01)


def _update(case: Case, model: nn.Module, optimizer: torch.optim.Optimizer, index: int) -> None:
    optimizer.zero_grad()
    model(case.images(index)).square().mean().backward()
    optimizer.step()


def _trained(case: Case, network: Network, pruner: Pruner) -> tuple[Network, Pruner]:
    """The network and its pruner, an epoch after the era, both in a new object if resumed."""
    optimizer, update = _optimizer(case, network), 0
    for epoch in range(case.pruning["era"][1] + 1):
        for _ in range(case.updates_per_epoch):
            if update == case.resumed_at:
                network, optimizer, pruner = _resumed(case, network, optimizer, pruner)
            _update(case, network, optimizer, update)
            _step(pruner, network, is_first=update == 0)
            update += 1
        pruner.end_epoch(epoch)
    pruner.check()
    if pruner.phase != "fixed":
        raise WrongError(f"the phase after the era is {pruner.phase}")
    return network, pruner


def _resumed(
    case: Case, network: Network, optimizer: torch.optim.Optimizer, pruner: Pruner
) -> tuple[Network, torch.optim.Optimizer, Pruner]:
    """The same state in new objects, as a checkpoint gives them."""
    state = pruner.state_dict(), network.state_dict(), optimizer.state_dict()
    network = case.network()
    optimizer = _optimizer(case, network)
    pruner = _pruner(case, network, optimizer)
    pruner.load_state_dict(state[0])
    network.load_state_dict(state[1])
    optimizer.load_state_dict(state[2])
    return network, optimizer, pruner


def _trains_densely(case: Case) -> bool:
    """Whether the network trains without this package."""
    try:
        network = case.network()
        _update(case, network, _optimizer(case, network), 0)
    except Exception:
        return False
    return True


def _check_zeros(case: Case, network: Network, pruner: Pruner) -> None:
    masks, sparsity = pruner.masks(), pruner.sparsity()
    modules: dict[str, Any] = dict(network.named_modules())
    for layer in sparsity.layers:
        if layer.name not in modules:  # a projection of nn.MultiheadAttention
            continue
        try:
            answer = response(modules[layer.name])
        except UnmeasurableError:
            if layer.name in pruner.layers:
                raise WrongError(f"{layer.name} is pruned, but can't be measured") from None
            continue
        if layer.zeros > answer.zeros:
            raise WrongError(
                f"{layer.name}: {layer.zeros} zeros are reported, {answer.zeros} are true"
            )
        if layer.name in pruner.layers:
            acting = answer.acting(reported_zeros(masks, layer.name))
            if acting:
                raise WrongError(f"{layer.name}: {acting} pruned weights act")
    readers = foreign_readers(network, (case.images(99),), pruner.layers)
    if readers:
        raise WrongError(f"{readers[0]}: its weight is read without calling it")


def _check_frozen(case: Case, network: Network) -> None:
    if {"include", "exclude", "overrides"} & set(case.pruning):
        return  # which may select it by its name
    before = dict(case.network().named_parameters())
    for name, parameter in network.named_parameters():
        frozen = not before[name].requires_grad if name in before else False
        if frozen and not torch.equal(parameter, before[name]):
            raise WrongError(f"{name} is frozen, and has changed")


def _check_file(case: Case, network: Network, pruner: Pruner) -> None:
    network.eval()  # in training, reading a spectrally normed weight changes it
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        save_pruned(network, path, pruner=pruner)
        loaded = load_pruned_model(path, case.network()).eval()
    with torch.no_grad():
        images = case.images(98)
        if not torch.equal(network(images), loaded(images)):
            raise WrongError("the network that was saved and loaded has other outputs")
