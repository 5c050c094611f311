"""Draw the README's pictures.

    python docs/pictures.py [RUN]

draws curves from the logs in benchmarks/results/tiny_imagenet20/. With RUN, the folder of a
finished run of recipes/quickstart.yaml with pruning=none, it also draws masks of its dense weights.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from safetensors.torch import load_file

from starfire_prune import ck_mask, fc_block_mask, intra_mask, window_mask
from starfire_prune.reporting.curves import Curve, curve
from starfire_prune.reporting.figures import Series, curves
from starfire_prune.reporting.style import lines_of
from starfire_prune.training.plots import plot_masks

DOCS = Path(__file__).parent
RESULTS = DOCS.parent / "benchmarks" / "results" / "tiny_imagenet20"
# By folder: the label of its curve, and the method, which decides the colour
VARIANTS: Final[Mapping[str, tuple[str, str]]] = {
    "dense": ("dense", "dense"),
    "window-60": ("window, 60 %", "window"),
    "ck-60": ("CK, 60 %", "ck"),
    "intra-60": ("intra, 60 %", "intra"),
    "ck-80": ("CK, 80 %", "ck"),
    "ck-60-from0": ("CK, 60 %, era from 0", "ck"),
}


def main() -> None:
    """Draw the curves, and with a run its masks."""
    drawn = curves(all_series(), ("epoch", "top-1 on held-out images [%]"), verticals=(8, 12))
    (DOCS / "tiny_imagenet20.png").write_bytes(drawn.light)
    if len(sys.argv) > 1:
        draw_masks(Path(sys.argv[1]))


def all_series() -> list[Series]:
    """The curves of the variants, one per seed."""
    lines = lines_of([method for _, method in VARIANTS.values()])
    return [
        Series(label, line, tuple(top1(path) for path in sorted(RESULTS.glob(f"{name}-seed?"))))
        for (name, (label, _)), line in zip(VARIANTS.items(), lines, strict=True)
    ]


def top1(folder: Path) -> Curve:
    """Top-1 over the epochs of a run."""
    text = (folder / "metrics.jsonl").read_text(encoding="utf-8")
    return curve([json.loads(row) for row in text.splitlines()], "top1")


def draw_masks(run: Path) -> None:
    """Draw masks of dense weights by each method."""
    weights = load_file(run / "export" / "model.safetensors")
    conv, pointwise = weights["layer2.1.conv1.weight"], weights["layer3.0.downsample.0.weight"]
    masks = {
        "window": window_mask(conv, 5),
        "CK (whole kernels)": ck_mask(conv, 0.6),
        "intra (both)": intra_mask(conv, 0.6),
        "FC blocks of 4x4": fc_block_mask(pointwise.flatten(1), 0.6),
    }
    plot_masks(masks, DOCS / "masks.png")


if __name__ == "__main__":
    main()
