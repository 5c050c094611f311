"""Folders of runs without training: real recipes, masks and exports, metrics by hand."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from starfire_prune import Pruner
from starfire_prune.engine.sparsity import Sparsity, measure_sparsity
from starfire_prune.models import create_model
from starfire_prune.recipe.load import dump_recipe, load_recipe
from starfire_prune.recipe.sections import Recipe
from starfire_prune.runs.folder import exported_file
from starfire_prune.serialization.pruned import save_pruned
from tests.support.runs import RECIPE

TOP1 = (0.5, 0.75, 0.7, 0.75)


def leave_run(
    folder: Path,
    *overrides: str,
    top1: Sequence[float | None] = TOP1,
    exports: bool = True,
    finishes: bool = True,
) -> Path:
    """Leave the folder of a run of the small recipe, pruned at once and not trained.

    Args:
        folder: The folder.
        overrides: Settings of the recipe.
        top1: Top-1 of each epoch.
        exports: Whether it has exported its weights.
        finishes: Whether its pruning is finished.
    """
    folder.mkdir(parents=True)
    source = folder.parent / "small.yaml"
    source.write_text(RECIPE, encoding="utf-8")
    recipe = load_recipe(source, overrides)
    (folder / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    sparsity = _exported(recipe, folder, finishes)
    if not exports:
        exported_file(folder).unlink()
    write_metrics(folder, [_row(epoch, value, sparsity) for epoch, value in enumerate(top1)])
    return folder


def leave_dense(folder: Path, *overrides: str, **options: Any) -> Path:
    """Leave the folder of a dense run."""
    return leave_run(folder, "pruning=none", *overrides, **options)


def write_metrics(folder: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write the lines of `metrics.jsonl`."""
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metrics.jsonl").write_text(text, encoding="utf-8")


def leave_evaluation(folder: Path, *results: dict[str, Any]) -> None:
    """Leave the evaluation of a run's exported weights."""
    digest = hashlib.sha256(exported_file(folder).read_bytes()).hexdigest()
    shared = {"images": 24, "top5": 0.9, "loss": 1.5}
    content = {
        "format_version": 1,
        "weights_sha256": digest,
        "data": {},
        "images": 24,
        "environment": {},
        "results": [{**shared, **result} for result in results],
    }
    (folder / "evaluation.json").write_text(json.dumps(content), encoding="utf-8")


def _exported(recipe: Recipe, folder: Path, finishes: bool) -> Sparsity:
    torch.manual_seed(recipe.seed)
    model = create_model(recipe.model.name, recipe.model.num_classes, **recipe.model.options)
    if recipe.pruning == "none":
        save_pruned(model, exported_file(folder))
        return measure_sparsity(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    images = torch.zeros(2, 3, recipe.data.image_size, recipe.data.image_size)
    pruner = Pruner(model, recipe.pruning, updates_per_epoch=1, optimizer=optimizer)
    for epoch in range(recipe.epochs if finishes else recipe.pruning.era[1] - 1):  # type: ignore[index]
        model(images).sum().backward()
        with torch.no_grad():
            for weight in model.parameters():
                weight.mul_(1)  # as an update that changes nothing
        pruner.step()
        pruner.end_epoch(epoch)
    save_pruned(model, exported_file(folder), pruner=pruner, unfinished=not finishes)
    return pruner.sparsity()


def _row(epoch: int, top1: float | None, sparsity: Sparsity) -> dict[str, Any]:
    return {
        "epoch": epoch,
        "top1": top1,
        "top5": 0.9,
        "phase": "fixed",
        "sparsity": sparsity.selected,
        "sparsity_network": sparsity.network,
    }
