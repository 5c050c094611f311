"""Pictures of a run."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from starfire_prune.files import replaced_file

__all__ = ["plot_training"]


def plot_training(metrics: Sequence[Mapping[str, Any]], path: Path, title: str = "") -> None:
    """Draw accuracy, threshold and reached sparsity over the epochs, as in Figures 4 and 7 to 9.

    Args:
        metrics: the objects of a run's `metrics.jsonl`, an epoch each.
        path: of the PNG file.
        title: of the picture.

    Raises:
        ModuleNotFoundError: without matplotlib (`pip install 'starfire-prune[plots]'`).
    """
    from matplotlib.figure import Figure

    epochs = [row["epoch"] + 1 for row in metrics]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    accuracy = figure.subplots()
    accuracy.plot(epochs, [100 * row["top1"] for row in metrics], "o-", ms=3, label="top-1")
    accuracy.set_xlabel("epoch")
    accuracy.set_ylabel("top-1 on held-out images [%]", color="C0")
    sparsity = accuracy.twinx()
    for key, style, label in (("threshold", "--", "threshold"), ("sparsity", "-", "reached")):
        values = [100 * row[key] for row in metrics]
        sparsity.plot(epochs, values, style, color="C1", lw=3 if style == "--" else 1, label=label)
    sparsity.set_ylim(-2, 102)
    sparsity.set_ylabel("zero weights [%]", color="C1")
    era = [row["epoch"] for row in metrics if row["phase"] == "era"]
    if era:
        accuracy.axvspan(era[0], era[-1] + 1, color="0.9", label="pruning era")
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    accuracy.set_title(title)
    with replaced_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
