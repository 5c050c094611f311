"""Draw the README's pictures from a run of recipes/quickstart.yaml.

    python docs/pictures.py runs/quickstart
"""

import json
import sys
from pathlib import Path

from safetensors.torch import load_file

from starfire_prune import ck_mask, fc_block_mask, intra_mask, window_mask
from starfire_prune.plots import plot_masks, plot_training

LAYER = "layer2.1.conv1.weight"


def main() -> None:
    """Draw masks of one trained layer by each method, and the run's curves."""
    run, docs = Path(sys.argv[1]), Path(__file__).parent
    weights = load_file(run / "export" / "model.safetensors")
    conv = weights[LAYER]
    alive = weights["layer4.1.conv2.weight"].flatten(2).abs().sum(2)  # any dense 2-D weight
    masks = {
        "window": window_mask(conv, 5),
        "CK (whole kernels)": ck_mask(conv, 0.6),
        "intra (both)": intra_mask(conv, 0.6),
        "FC blocks of 4x4": fc_block_mask(alive[:48, :48], 0.6),
    }
    plot_masks(masks, docs / "masks.png")
    rows = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    plot_training([json.loads(row) for row in rows], docs / "quickstart.png", "quickstart.yaml")


if __name__ == "__main__":
    main()
