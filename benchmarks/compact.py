"""What compaction makes of a sparse ResNet-18: accuracy, parameters and MACs, before and after.

    python benchmarks/compact.py [--set pruning.amount=0.9 ...] [--run FOLDER]

Trains the quickstart's ResNet-18 on digits with these settings (a minute or two), or takes a
finished run of it, compacts what it exported, and evaluates both models on the validation images.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from starfire_prune import measure_sparsity
from starfire_prune.compact.compaction import compact, format_compaction
from starfire_prune.data import build_loader, load_datasets
from starfire_prune.models import create_model
from starfire_prune.recipe.load import load_recipe
from starfire_prune.training.train import train

RECIPE = Path(__file__).parents[1] / "recipes" / "quickstart.yaml"
IMAGE_SIZE = 32


def main() -> None:
    """Train or read the run, compact its model and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        dest="overrides",
        metavar="KEY=VALUE",
        help="override a key of the recipe (repeatable; pruning.amount is 0.9 by default)",
    )
    parser.add_argument("--run", type=Path, help="folder of a finished run, instead of training")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.run or trained(arguments.overrides, Path(temporary) / "run")
        model = exported(folder)
    images, labels = validation_images()
    smaller, report = compact(model, images[:2])
    print(format_compaction(report))
    print(f"\nResNet-18 on digits, {measure_sparsity(model).network:.1%} of its weights zero\n")
    print("| | top-1 | parameters | MACs at 32 px |\n|---|---|---|---|")
    for index, (name, network) in enumerate({"sparse": model, "compact": smaller}.items()):
        top1 = accuracy(network, images, labels)
        print(f"| {name} | {top1:.2%} | {report.parameters[index]:,} | {report.macs[index]:,} |")
    shares = [after / before for before, after in (report.parameters, report.macs)]
    print(f"| left | | {shares[0]:.1%} | {shares[1]:.1%} |")


def trained(overrides: list[str], folder: Path) -> Path:
    """The folder of a run of the quickstart with other settings."""
    train(load_recipe(RECIPE, ["pruning.amount=0.9", *overrides]), folder)
    return folder


def exported(folder: Path) -> nn.Module:
    """The model of a finished run, in eval mode."""
    model = create_model("resnet18", num_classes=10)
    model.load_state_dict(load_file(folder / "export" / "model.safetensors"))
    return model.eval()


def validation_images() -> tuple[Tensor, Tensor]:
    """The digits that were not trained on: images `(N, 3, 32, 32)` and labels `(N,)`."""
    digits = load_datasets("digits", image_size=IMAGE_SIZE).val
    images, labels = zip(*build_loader(digits, 100, train=False), strict=True)
    return torch.cat(images), torch.cat(labels)


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """The share of images whose largest output is their label."""
    return float((model(images).argmax(1) == labels).float().mean())


if __name__ == "__main__":
    main()
