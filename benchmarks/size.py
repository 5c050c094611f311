"""How small the file of a pruned ResNet-50 is, and how fast it loads, beside the alternatives.

    python benchmarks/size.py [--sparsities 0.6 0.7 0.8] [--repeats 11] [--no-zstd] [--json PATH]

Weights are timm's Kaiming-normal initial ones of a fixed seed, pruned in one step by the engine:
their values deflate about as those of trained networks do. Networks pruned by CK are quantized to
int8 as well, after training. For each method, sparsity and dtype, the bytes of

- the dense file, with all zeros, and of three of them under `zstd -19`, if that command is there;
- CSR: values, an int32 column a value and an int32 pointer a row, other tensors dense;
- the compressed file, raw and deflated.

The bound of the raw file: non-zero values at their size, a bit a kernel that CK prunes, a bit a
weight of the surviving k×k kernels for window and intra, a bit a weight of the classifier, and the
other tensors dense. The file's share of it leaves the header out. The strict bound has bits for
the kernels that CK has taken alone, which no file could be read by.

Loading into an existing model is measured in turn with `load_file` and `load_state_dict` of the
dense file, from a warm cache: the medians, the ratios of neighbours (median, least, largest), and
the ratio of the fastest two, which says most on a machine with other work.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import importlib.metadata
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from starfire_prune import Pruner, load_pruned_model, save_pruned
from starfire_prune.quantization import quantize
from starfire_prune.runs.folder import existing_part
from starfire_prune.serialization import save_quantized
from starfire_prune.serialization.inspect import inspect_pruned
from starfire_prune.utils.files import write_text

METHODS: dict[str, dict[str, object]] = {
    "ck": {"method": "ck"},
    "window": {"method": "window", "exact_layer_sparsity": True},
    "intra": {"method": "intra"},
}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
LOADED = (("ck", 0.7), ("window", 0.6), ("intra", 0.6))
FORMS: dict[str, dict[str, Any]] = {
    "dense": {"format": "dense"},
    "raw": {"format": "compressed"},
    "deflated": {"format": "compressed", "deflate": True},
}


def main() -> None:
    """Measure, print the tables and record them."""
    arguments = _parser().parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        loads = [load_row(folder, *case, arguments.repeats) for case in LOADED if arguments.repeats]
        sizes = [
            row
            for method in METHODS
            for sparsity in arguments.sparsities
            for row in size_rows(folder, method, sparsity, not arguments.no_zstd)
        ]
    if sizes:
        print_sizes(sizes)
    if loads:
        print_loads(loads)
    if arguments.json is not None:
        record = {"environment": environment(), "sizes": sizes, "loads": loads}
        write_text(arguments.json, json.dumps(record, indent=1) + "\n")


# The command line


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--sparsities", type=_sparsity, nargs="*", default=[0.6, 0.7, 0.8], help="(0.6 0.7 0.8)"
    )
    parser.add_argument("--repeats", type=_count, default=11, help="of loading (11; 0: none)")
    parser.add_argument("--no-zstd", action="store_true", help="which takes minutes a file")
    parser.add_argument("--json", type=_output, metavar="PATH", help="write the numbers there too")
    return parser


def _sparsity(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no sparsity: give one between 0 and 1")
    return value


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 0 on")
    return int(text)


def _output(text: str) -> Path:
    """A path that can be written, which is better told before the minutes of measuring."""
    path = Path(text)
    if not text or path.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is no file: name one to write")
    place = existing_part(path.absolute().parent)
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise argparse.ArgumentTypeError(
            f"{text!r} can't be written: {place} is no folder that you may write to"
        )
    return path


# Sizes


def size_rows(
    folder: Path, method: str, sparsity: float, with_zstd: bool
) -> Iterator[dict[str, Any]]:
    """The bytes of a pruned model in each way, in each dtype."""
    pruned, pruner = pruned_resnet50(method, sparsity)
    paths = {form: folder / f"{form}.safetensors" for form in FORMS}
    for dtype in DTYPES:
        model = copy.deepcopy(pruned).to(DTYPES[dtype])
        for form, path in paths.items():
            save_pruned(model, path, pruner=pruner, **FORMS[form])
        is_shrunk = with_zstd and (method, sparsity) in LOADED and dtype == "fp32"
        yield {
            **sizes_of(paths, method, sparsity, pruner),
            "dtype": dtype,
            "zstd19_bytes": zstd19_bytes(paths["dense"]) if is_shrunk else None,
        }
    if method == "ck":
        quantized = quantize(pruned, [torch.randn(2, 3, 224, 224)])
        for form, path in paths.items():
            save_quantized(quantized, path, **FORMS[form])
        sizes = sizes_of(paths, method, sparsity, pruner)
        yield {**sizes, "dtype": "int8", "zstd19_bytes": None}


def sizes_of(
    paths: Mapping[str, Path], method: str, sparsity: float, pruner: Pruner
) -> dict[str, Any]:
    """The bytes of the files of a model in each form, and what they are compared with."""
    files = {form: inspect_pruned(path) for form, path in paths.items()}
    state = load_file(paths["dense"])
    bound = bound_bytes(state, pruner.masks(), method)
    of_tensors = files["raw"].size_bytes - files["raw"].header_bytes
    return {
        "method": method,
        "sparsity": sparsity,
        "sparsity_reached": pruner.sparsity().network,
        "dense_bytes": files["dense"].size_bytes,
        "csr_bytes": csr_bytes(state, pruner.masks()),
        "bound_bytes": bound,
        "raw_bytes": files["raw"].size_bytes,
        "deflated_bytes": files["deflated"].size_bytes,
        "header_bytes": files["raw"].header_bytes,
        "of_bound": of_tensors / bound,
        "of_strict_bound": of_tensors / (bound - surviving_bits(pruner.masks(), method) / 8),
    }


def bound_bytes(state: Mapping[str, Tensor], masks: dict[str, Tensor], method: str) -> float:
    """What the structure needs: see the module's docstring."""
    bits = 0
    for name, tensor in state.items():
        mask, item_bits = masks.get(name), 8 * tensor.element_size()
        if mask is None:
            bits += tensor.numel() * item_bits
            continue
        bits += int(mask.sum()) * item_bits
        kernel_size = mask[0, 0].numel()
        if method != "window" or kernel_size == 1:
            bits += mask.shape[0] * mask.shape[1]  # kernels, or weights of the classifier
        if method != "ck" and kernel_size > 1:
            bits += kernel_size * int(mask.flatten(2).any(2).sum())
    return bits / 8


def surviving_bits(masks: dict[str, Tensor], method: str) -> int:
    """Of the bound, the bits that stand for kernels that CK has left."""
    return sum(
        int(mask.flatten(2).any(2).sum())
        for mask in masks.values()
        if mask.ndim > 2 and (method != "window" or mask[0, 0].numel() == 1)
    )


def csr_bytes(state: Mapping[str, Tensor], masks: dict[str, Tensor]) -> int:
    """Pruned weights as sparse matrices of shape `(K, the rest)`, with indices of four bytes."""
    total = 0
    for name, tensor in state.items():
        if name in masks:
            kept = int(masks[name].sum())
            total += kept * (tensor.element_size() + 4) + 4 * (len(tensor) + 1)
        else:
            total += tensor.nbytes
    return total


def zstd19_bytes(path: Path) -> int | None:
    """The size of a file under `zstd -19`, or None without that command."""
    if shutil.which("zstd") is None:
        return None
    command = ["zstd", "-19", "-T1", "--quiet", "--stdout", str(path)]
    return len(subprocess.run(command, check=True, capture_output=True).stdout)


# Loading


def load_row(folder: Path, method: str, sparsity: float, repeats: int) -> dict[str, Any]:
    """Median seconds of loading each form into a model, and of safetensors' own way."""
    model, pruner = pruned_resnet50(method, sparsity)
    for form, options in FORMS.items():
        save_pruned(model, folder / f"{form}.safetensors", pruner=pruner, **options)

    def load_unchecked() -> None:
        model.load_state_dict(load_file(folder / "dense.safetensors"))

    row: dict[str, Any] = {"method": method, "sparsity": sparsity}
    for form in FORMS:
        path = folder / f"{form}.safetensors"
        pairs = [
            (timed(load_unchecked), timed(load_pruned_model, path, model))
            for _ in range(repeats + 1)
        ][1:]
        ratios = [checked / unchecked for unchecked, checked in pairs]
        row[form] = {
            "unchecked_s": statistics.median(unchecked for unchecked, _ in pairs),
            "checked_s": statistics.median(checked for _, checked in pairs),
            "ratio": statistics.median(ratios),
            "least_ratio": min(ratios),
            "largest_ratio": max(ratios),
            "ratio_of_fastest": min(checked for _, checked in pairs)
            / min(unchecked for unchecked, _ in pairs),
        }
    return row


def timed(function: Callable[..., object], *arguments: object) -> float:
    """Seconds of a call."""
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start


def pruned_resnet50(method: str, sparsity: float) -> tuple[nn.Module, Pruner]:
    """The model with the same initial weights each time, pruned to the end."""
    torch.manual_seed(0)
    model: nn.Module = timm.create_model("resnet50")
    settings = {**METHODS[method], "amount": sparsity, "era": [0, 1]}
    pruner = Pruner(model, settings, updates_per_epoch=1)
    pruner.step()
    pruner.end_epoch(0)
    return model, pruner


# Output


def print_sizes(rows: Sequence[dict[str, Any]]) -> None:
    """The table of bytes, in millions."""
    print("| method | sparsity | dtype | dense | zstd -19 | CSR | raw | of its bound | deflated |")
    print("|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        dense, zstd19, csr, raw, deflated = (
            "–" if row[f"{name}_bytes"] is None else f"{row[f'{name}_bytes'] / 1e6:.2f}"
            for name in ("dense", "zstd19", "csr", "raw", "deflated")
        )
        print(
            f"| {row['method']} | {row['sparsity']:.0%} | {row['dtype']} | {dense} | {zstd19} | "
            f"{csr} | {raw} | {row['of_bound']:.4f} | {deflated} |"
        )
    headers = [row["header_bytes"] for row in rows]
    print(f"\nMB of 10^6 bytes; headers, which `of its bound` leaves out: {max(headers):,} bytes")


def print_loads(rows: Sequence[dict[str, Any]]) -> None:
    """The table of loading."""
    print(f"\nloading into a model on {torch.get_num_threads()} threads, all checksums verified\n")
    print(
        "| file | load_file + load_state_dict [ms] | load_pruned_model [ms] | ratio | range | "
        "of the fastest |"
    )
    print("|---|---|---|---|---|---|")
    for row in rows:
        for form in FORMS:
            measured = row[form]
            print(
                f"| {row['method']} {row['sparsity']:.0%}, {form} | "
                f"{1e3 * measured['unchecked_s']:.1f} | {1e3 * measured['checked_s']:.1f} | "
                f"{measured['ratio']:.2f} | "
                f"{measured['least_ratio']:.2f}–{measured['largest_ratio']:.2f} | "
                f"{measured['ratio_of_fastest']:.2f} |"
            )


def environment() -> dict[str, Any]:
    """What the numbers depend on."""
    packages = ("starfire-prune", "torch", "timm", "numpy", "safetensors")
    return {
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in packages},
        "zlib": zlib.ZLIB_RUNTIME_VERSION,
        "zstd": zstd_version(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "seed": 0,
    }


def zstd_version() -> str | None:
    """The version of the command, if it is there."""
    if shutil.which("zstd") is None:
        return None
    told = subprocess.run(["zstd", "--version"], check=True, capture_output=True, text=True)
    return told.stdout.split("v")[-1].split(",")[0].strip(" *\n")


if __name__ == "__main__":
    main()
