"""The engines that inference.py times, and the files of exported and quantized networks."""

from __future__ import annotations

import collections
import dataclasses
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import torch
from inference_cases import FLOAT32, INT8, SPARSE, Case
from torch import Tensor, nn

from starfire_prune.quantization import quantize
from starfire_prune.sparse import compile as compile_sparse
from starfire_prune.structure.graph import dense_copy

Run = Callable[[Tensor], Tensor]
INPUT = "images"  # the name of an exported network's input
PRECISIONS = {  # in OpenVINO's words
    "f32": FLOAT32,
    "bf16": "bfloat16",
    "f16": "float16",
    "u8": INT8,
    "i8": INT8,
}

AVX2 = 256  # without VNNI, products of bytes need a reduced range


class DenseFiles:
    """Exported and quantized dense networks in a folder: each is made once.

    Args:
        folder: An empty folder.
        calibration: Images of shape ``(images, 3, height, width)`` by which activations are scaled.

    Attributes:
        folder: The folder.
        calibration: These images.
    """

    def __init__(self, folder: Path, calibration: Tensor) -> None:
        self.folder = folder
        self.calibration = calibration

    def exported(self, name: str, model: nn.Module) -> Path:
        """The network as an ONNX file, for any batch size."""
        path = self.folder / f"{name}.onnx"
        if not path.exists():
            shapes = ({0: torch.export.Dim("batch", min=1)},)
            export(model, self.calibration[:2], path, dynamic_shapes=shapes)
        return path

    def quantized_by_nncf(self, name: str, model: nn.Module) -> Path:
        """The network as an OpenVINO file in int8: post-training, NNCF's defaults."""
        path = self.folder / f"{name}-nncf.xml"
        if not path.exists():
            import nncf
            import openvino as ov

            source = ov.Core().read_model(self.exported(name, model))
            images = nncf.Dataset(self._batches())
            ov.save_model(nncf.quantize(source, images, subset_size=len(self.calibration)), path)
        return path

    def quantized_by_onnxruntime(self, name: str, model: nn.Module) -> Path:
        """The network as an ONNX file in int8: static, QDQ, a symmetric scale per channel."""
        path = self.folder / f"{name}-qdq.onnx"
        if not path.exists():
            from onnxruntime import quantization
            from onnxruntime.quantization.shape_inference import quant_pre_process

            prepared = self.folder / f"{name}-prepared.onnx"
            quant_pre_process(self.exported(name, model), prepared, skip_symbolic_shape=True)
            quantization.quantize_static(
                prepared,
                path,
                _Reader(self._batches()),
                quant_format=quantization.QuantFormat.QDQ,
                per_channel=True,
                weight_type=quantization.QuantType.QInt8,
                activation_type=quantization.QuantType.QUInt8,
                extra_options={"WeightSymmetric": True},
            )
        return path

    def _batches(self) -> list[Any]:
        return [image[None].numpy() for image in self.calibration]


class _Reader:
    """Calibration data as ONNX Runtime asks for them."""

    def __init__(self, batches: list[Any]) -> None:
        self._rest: Iterator[Any] = iter(batches)

    def get_next(self) -> dict[str, Any] | None:
        """The next image, or None after the last one."""
        batch = next(self._rest, None)
        return None if batch is None else {INPUT: batch}


def export(model: nn.Module, images: Tensor, path: Path, **options: Any) -> None:
    """Write a model as an ONNX file."""
    options = {"dynamo": True, "verbose": False, "external_data": False, **options}
    torch.onnx.export(model, (images,), path, input_names=[INPUT], **options)


@dataclasses.dataclass(frozen=True)
class Setting:
    """What an engine is built from: a case, its network, its images and the dense files."""

    case: Case
    model: nn.Module
    images: Tensor
    files: DenseFiles
    isa: int = 0  # width of the instruction set of this package's kernels; 0 for the widest one


@dataclasses.dataclass(frozen=True)
class Built:
    """A network in an engine, and the precision in which its convolutions run.

    Attributes:
        run: Computes the outputs for a batch of images.
        precision: The precision.
        reference: Computes in torch what the engine should; None for the network itself.
    """

    run: Run
    precision: str = FLOAT32
    reference: Run | None = None


def eager(setting: Setting) -> Built:
    """torch in eager mode."""
    return Built(setting.model)


def compiled(setting: Setting) -> Built:
    """torch.compile with default settings."""
    torch.compiler.reset()
    return Built(torch.compile(setting.model))


def sparse(setting: Setting) -> Built:
    """The kernels measured here."""
    return Built(_own(setting.model, setting))


def sparse_int8(setting: Setting) -> Built:
    """The kernels measured here, on the network quantized after training; for AVX2 with 7 bits."""
    reduced = setting.isa == AVX2
    quantized = quantize(setting.model, [setting.files.calibration], reduced_range=reduced)
    return Built(_own(quantized, setting), INT8, quantized)


def _own(model: nn.Module, setting: Setting) -> nn.Module:
    """A model compiled by this package, with kernels of the chosen instruction set."""
    result = compile_sparse(model, setting.images)
    for segment in result.segments:
        segment.isa = setting.isa
    return result


def onnxruntime(setting: Setting) -> Built:
    """ONNX Runtime's CPU provider."""
    path = setting.files.exported(setting.case.place.model, setting.model)
    return Built(_session(path, setting.case))


def onnxruntime_int8(setting: Setting) -> Built:
    """ONNX Runtime's CPU provider with a network that its own tool quantized."""
    path = setting.files.quantized_by_onnxruntime(setting.case.place.model, setting.model)
    return Built(_session(path, setting.case), INT8)


def _session(path: Path, case: Case) -> Run:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = case.place.threads
    options.add_free_dimension_override_by_name("batch", case.place.batch)
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {INPUT: images.numpy()})[0])


def openvino(setting: Setting) -> Built:
    """OpenVINO's CPU plugin for latency, in the precision that it chooses."""
    return openvino_file(setting.files.exported(setting.case.place.model, setting.model), setting)


def openvino_f32(setting: Setting) -> Built:
    """OpenVINO's CPU plugin for latency, in single precision."""
    path = setting.files.exported(setting.case.place.model, setting.model)
    return openvino_file(path, setting, INFERENCE_PRECISION_HINT="f32")


def openvino_int8(setting: Setting) -> Built:
    """OpenVINO's CPU plugin for latency, with a network that NNCF quantized."""
    path = setting.files.quantized_by_nncf(setting.case.place.model, setting.model)
    return openvino_file(path, setting)


def openvino_file(path: Path, setting: Setting, **more: str) -> Built:
    """OpenVINO's CPU plugin for latency, with the network in a file."""
    import openvino as ov

    threads = setting.case.place.threads
    options = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", **more}
    core = ov.Core()
    network = core.read_model(path)
    network.reshape(list(setting.images.shape))
    model = core.compile_model(network, "CPU", options)
    request = model.create_infer_request()

    def run(images: Tensor) -> Tensor:
        # The request's output is overwritten by the next run
        return torch.from_numpy(request.infer([images.numpy()])[0])

    return Built(run, _precision(model))


def _precision(model: Any) -> str:
    """The precision of most convolutions of a model that OpenVINO compiled."""
    operations = (each.get_rt_info() for each in model.get_runtime_model().get_ops())
    found = collections.Counter(
        info["runtimePrecision"].astype(str)
        for info in operations
        if info["layerType"].astype(str) == "Convolution"
    )
    return PRECISIONS[found.most_common(1)[0][0]]


class DeepSparse:
    """DeepSparse in a separate process, with a separate environment."""

    python = ""

    def __init__(self, setting: Setting) -> None:
        self._folder = tempfile.TemporaryDirectory()
        folder = Path(self._folder.name)
        self._images, self._path = setting.images, folder / "images.npy"
        self._output = folder / "output.npy"
        # Its latest opset is 13, which torch's older exporter still writes
        options = {"dynamo": False, "opset_version": 13, "external_data": None}
        export(dense_copy(setting.model), setting.images, folder / "model.onnx", **options)
        np.save(self._path, setting.images.numpy())
        worker = Path(__file__).with_name("deepsparse_worker.py")
        sizes = (str(setting.case.place.batch), str(setting.case.place.threads))
        self._process = subprocess.Popen(
            [self.python, worker, folder / "model.onnx", self._path, *sizes, self._output],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._wait_for("ready")
        self._outputs = torch.from_numpy(np.load(self._output))

    def __call__(self, images: Tensor) -> Tensor:
        """Run the model once on the images that it was created with, or on others, by files."""
        if images is self._images:
            self._send("run")
            return self._outputs
        np.save(self._path, images.numpy())
        self._send("answer")
        return torch.from_numpy(np.load(self._output))

    def _send(self, command: str) -> None:
        commands = cast(IO[str], self._process.stdin)
        commands.write(f"{command}\n")
        commands.flush()
        self._wait_for("done")

    def _wait_for(self, word: str) -> None:
        for line in cast(IO[str], self._process.stdout):
            if line.strip() == word:
                return
        raise SystemExit("DeepSparse has exited; its error is above")

    def __del__(self) -> None:
        self._process.kill()
        self._process.wait()


BUILDERS: dict[str, Callable[[Setting], Built]] = {
    "eager": eager,
    "compile": compiled,
    "onnxruntime": onnxruntime,
    "onnxruntime-int8": onnxruntime_int8,
    "openvino": openvino,
    "openvino-f32": openvino_f32,
    "openvino-int8": openvino_int8,
    "deepsparse": lambda setting: Built(DeepSparse(setting)),
    SPARSE: sparse,
    "sparse-int8": sparse_int8,
}
