"""The quickstart's accuracy, dense and pruned, from the logs of its runs.

    for seed in 0 1 2; do
        accelerate launch tools/train.py recipes/quickstart.yaml --set seed=$seed
            --output runs/ck-seed$seed
        accelerate launch tools/train.py recipes/quickstart.yaml --set seed=$seed
            --set pruning=none --output runs/dense-seed$seed
    done
    python benchmarks/quickstart.py

reads `benchmarks/results/quickstart/<name>-seed<n>.jsonl`, the runs' `metrics.jsonl`.
"""

import json
import statistics
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "quickstart"


def main() -> None:
    """Print a row for each kind of run: last epoch of each seed, and their mean."""
    print("| run | sparsity | top-1 by seed, last epoch | mean |")
    print("|---|---|---|---|")
    for name in ("dense", "ck"):
        last = [last_epoch(path) for path in sorted(RESULTS.glob(f"{name}-seed*.jsonl"))]
        top1 = [row["top1"] for row in last]
        sparsity = statistics.mean(row["sparsity_network"] for row in last)
        seeds = ", ".join(f"{value:.2%}" for value in top1)
        print(f"| {name} | {sparsity:.1%} | {seeds} | {statistics.mean(top1):.2%} |")


def last_epoch(path: Path) -> dict[str, float]:
    """The last line of a run's log."""
    row: dict[str, float] = json.loads(path.read_text(encoding="utf-8").splitlines()[-1])
    return row


if __name__ == "__main__":
    main()
