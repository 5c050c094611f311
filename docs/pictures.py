"""Draw the README's pictures from two runs of recipes/quickstart.yaml, one with pruning=none.

python docs/pictures.py runs/quickstart runs/quickstart-dense
"""

import json
import sys
from pathlib import Path

from safetensors.torch import load_file

from starfire_prune import ck_mask, fc_block_mask, intra_mask, window_mask
from starfire_prune.plots import plot_masks, plot_training


def main() -> None:
    """Draw masks of one layer's dense weights by each method, and the pruned run's curves."""
    run, dense, docs = Path(sys.argv[1]), Path(sys.argv[2]), Path(__file__).parent
    weights = load_file(dense / "export" / "model.safetensors")
    conv, pointwise = weights["layer2.1.conv1.weight"], weights["layer3.0.downsample.0.weight"]
    masks = {
        "window": window_mask(conv, 5),
        "CK (whole kernels)": ck_mask(conv, 0.6),
        "intra (both)": intra_mask(conv, 0.6),
        "FC blocks of 4x4": fc_block_mask(pointwise.flatten(1), 0.6),
    }
    plot_masks(masks, docs / "masks.png")
    rows = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    plot_training([json.loads(row) for row in rows], docs / "quickstart.png", "quickstart.yaml")


if __name__ == "__main__":
    main()
