"""What inference.py times: networks, ways to prune them, and engines by name and precision."""

from __future__ import annotations

import dataclasses
import fnmatch
import itertools
from collections.abc import Sequence
from typing import Final

MODELS: Final = {
    "resnet18": "ResNet-18",
    "resnet50": "ResNet-50",
    "mobilenetv2_100": "MobileNetV2",
    "mobilenetv3_large_100": "MobileNetV3-large",
    "efficientnet_b0": "EfficientNet-B0",
    "convnext_atto": "ConvNeXt-atto",
}
DENSE: Final = "dense"
SPARSE: Final = "sparse"
SPARSE_INT8: Final = "sparse-int8"
# Blocks of output x input channels, as in `block_size: [4, 1]`
METHODS: Final = (
    *(f"ck-{amount}-{block}" for block in ("1x1", "4x1") for amount in (0.6, 0.7, 0.8, 0.9)),
    *(f"ck-{amount}-{block}" for block in ("1x4", "4x4") for amount in (0.7, 0.8, 0.9)),
    *(f"{method}-{amount}-1x1" for method in ("window", "intra") for amount in (0.6, 0.8)),
)
BATCHES: Final = (1, 8)
THREADS: Final = (1, 2)
FLOAT32: Final = "float32"
INT8: Final = "int8"


@dataclasses.dataclass(frozen=True)
class Engine:
    """What a page calls an engine, and what it needs.

    Attributes:
        label: Name in tables.
        packages: Modules that must be installed.
        pruned: Whether it is timed on pruned networks too. The others multiply by zeros.
        ours: Whether its time is compared with that of the others.
    """

    label: str
    packages: tuple[str, ...] = ()
    pruned: bool = False
    ours: bool = False


_ONNX: Final = ("onnx", "onnxscript")
# A new engine of this package is one entry here and its builder in inference_engines.py
ENGINES: Final = {
    "eager": Engine("torch, eager"),
    "compile": Engine("torch.compile"),
    "onnxruntime": Engine("ONNX Runtime", ("onnxruntime", *_ONNX)),
    "onnxruntime-int8": Engine("ONNX Runtime, quantized", ("onnxruntime", *_ONNX)),
    "openvino": Engine("OpenVINO", ("openvino", *_ONNX)),
    "openvino-f32": Engine("OpenVINO, held to float32", ("openvino", *_ONNX)),
    "openvino-int8": Engine("OpenVINO, quantized by NNCF", ("openvino", "nncf", *_ONNX)),
    "deepsparse": Engine("DeepSparse 1.8", pruned=True),
    SPARSE: Engine("`sparse.compile`", pruned=True, ours=True),
    SPARSE_INT8: Engine("`sparse.compile`, quantized", ("torchao",), pruned=True, ours=True),
}


@dataclasses.dataclass(frozen=True)
class Place:
    """What the cases of one run have in common: they take turns, so their times compare."""

    model: str
    batch: int
    threads: int

    def __str__(self) -> str:
        return f"{self.model}/*/b{self.batch}/t{self.threads}/*"


@dataclasses.dataclass(frozen=True)
class Case:
    """A network, a pruning method and an engine to time."""

    place: Place
    method: str
    engine: str

    def __str__(self) -> str:
        model, batch, threads = dataclasses.astuple(self.place)
        return f"{model}/{self.method}/b{batch}/t{threads}/{self.engine}"


def cases(patterns: Sequence[str], with_deepsparse: bool = False) -> list[Case]:
    """The cases that one of the patterns matches, those of a place one after another."""
    pairs = [
        (method, name)
        for name, engine in ENGINES.items()
        if with_deepsparse or name != "deepsparse"
        for method in ((DENSE, *METHODS) if engine.pruned else (DENSE,))
    ]
    every = [
        Case(Place(*place), method, engine)
        for place in itertools.product(MODELS, BATCHES, THREADS)
        for method, engine in pairs
    ]
    return [case for case in every if any(fnmatch.fnmatch(str(case), p) for p in patterns)]


def block_size(method: str) -> tuple[int, int]:
    """The block size of a method, in output and input channels: (4, 1) for ck-0.8-4x1."""
    rows, columns = method.rpartition("-")[2].split("x")
    return int(rows), int(columns)


def method_label(method: str) -> str:
    """A method as a page names it, such as CK 80 %, `block_size: [4, 1]`."""
    if method == DENSE:
        return DENSE
    kind, amount, _ = method.split("-")
    name = "CK" if kind == "ck" else kind
    block = "" if block_size(method) == (1, 1) else f", `block_size: {list(block_size(method))}`"
    return f"{name} {float(amount):.0%}{block}".replace("%", " %")
