"""Top-1 of the networks of a sweep in int8 without training for it: quantized by calibration alone.

    CIFAR10=… python tools/sweep.py recipes/tables/cifar10_blocks.yaml --output RUNS
    python benchmarks/calibrated.py RUNS --images "$CIFAR10"
    python benchmarks/tables.py

Each run's network after its last epoch in floats, from the checkpoint that a run keeps before its
epoch of training for int8, is quantized with 512 training images, compiled, and evaluated on all
validation images. Its top-1 in floats is that of the run's log. The record is made in parts: runs
that are in it are not measured again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import torch
from blocks import CALIBRATED, EPOCHS
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import DataLoader

from starfire_prune.data import load_datasets
from starfire_prune.models import create_model
from starfire_prune.quantization import quantize
from starfire_prune.recipe import load_recipe
from starfire_prune.runs.folder import checkpoints_of
from starfire_prune.sparse import compile as compile_sparse
from starfire_prune.utils.files import write_text

IMAGE_SIZE: Final = 48
CALIBRATION_IMAGES: Final = 512
BATCH: Final = 250


def top1(run: Path, calibration: Tensor, validation: DataLoader[Any]) -> float:
    """The accuracy of a run's network that is quantized by calibration."""
    settings = load_recipe(run / "recipe.yaml").model
    model = create_model(settings.name, settings.num_classes, **settings.options).eval()
    model.load_state_dict(load_file(checkpoint_of(run) / "model.safetensors"))
    quantized = quantize(model, list(torch.split(calibration, 64)))
    compiled = compile_sparse(quantized, calibration[:BATCH])
    right = sum(int((compiled(x).argmax(1) == labels).sum()) for x, labels in validation)
    return right / len(validation.dataset)  # type: ignore[arg-type]


def checkpoint_of(run: Path) -> Path:
    """The checkpoint after the last epoch in floats."""
    return checkpoints_of(run) / f"epoch-{EPOCHS:04d}"


def finished_runs(runs: Path) -> Iterator[Path]:
    """The runs that have trained all epochs in floats."""
    return (run for run in sorted(runs.iterdir()) if checkpoint_of(run).exists())


def main() -> None:
    """Quantize and evaluate the runs that are not in the record, and write it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, help="the folder of a sweep")
    parser.add_argument("--images", type=Path, required=True, help="with train/ and val/")
    arguments = parser.parse_args()
    parts: Any = load_datasets(
        "folder",
        root=arguments.images,
        image_size=IMAGE_SIZE,
        crop_pct=1.0,
        crop_scale=(1.0, 1.0),  # training images as in an evaluation
        hflip=0.0,
    )
    validation: DataLoader[Any] = DataLoader(parts.val, batch_size=BATCH)
    order = torch.randperm(len(parts.train), generator=torch.Generator().manual_seed(0))
    calibration = torch.stack([parts.train[int(i)][0] for i in order[:CALIBRATION_IMAGES]])
    record = json.loads(CALIBRATED.read_text(encoding="utf-8")) if CALIBRATED.exists() else {}
    with torch.no_grad():
        for run in finished_runs(arguments.runs):
            if run.name not in record:
                record[run.name] = top1(run, calibration, validation)
                print(f"{run.name}: {record[run.name]:.4f}", flush=True)
                text = json.dumps(dict(sorted(record.items())), indent=1)
                write_text(CALIBRATED, text + "\n")


if __name__ == "__main__":
    main()
