"""What works with a model: each cell of the table is one attempt.

A plan that is refused in a sentence is followed: the layers that it names are left out, and the
other cells are tried without them.
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from starfire_prune import Pruner, load_pruned_model, save_pruned
from starfire_prune.utils.modules import copied_module
from starfire_prune.utils.outputs import compare_outputs, output_tensors, rounding
from tests.zoo.impulses import UnmeasurableError, foreign_readers, reported_zeros, response
from tests.zoo.models import ZooModel, loss_of
from tests.zoo.outcomes import Outcome, WrongError, attempt, named_in

__all__ = ["CELLS", "LIMITS", "measure"]


CELLS: Final = {
    "plan": "`Pruner(model, …)`",
    "training": "six updates: dense, era, fixed",
    "zeros": "reported zeros are zeros of the response to impulses",
    "share": "the sparsity counts each weight matrix, or names it as left out",
    "keys": "the state dict has the dense model's keys in all phases",
    "file": "`save_pruned`, and loading into a new model",
    "compact": "`compact`",
    "onnx": "`export_onnx`, run by ONNX Runtime",
    "sparse": "`sparse.compile`",
}
LIMITS: Final = dict.fromkeys(CELLS, 60.0) | {"training": 120.0, "zeros": 120.0}
"""Seconds of processor time after which a cell is given up."""
ERA: Final = (1, 2)
UPDATES: Final = 2  # of an epoch
_CHANNELS = 4  # of a large layer that are measured
_LARGE = 5_000  # weights from which on only some channels are measured
_TOLERANCE = 1e-3  # of the largest output


class Trial:
    """A model on its way through the cells.

    Args:
        zoo: The model.
        folder: Folder for its files.
    """

    def __init__(self, zoo: ZooModel, folder: Path) -> None:
        self.zoo = zoo
        self.folder = folder
        self.model = zoo.build()
        self.keys = list(self.model.state_dict())
        self.names = [name for name, _ in self.model.named_modules() if name]
        self.excluded: list[str] = []
        self.notices: list[str] = []
        self.pruner: Pruner | None = None
        self.bad_keys: list[str] = []
        self.bad_zeros: list[str] = []

    # --- plan and training ---

    def plan(self) -> str:
        """Plan the pruning as a newcomer does."""
        with _notices() as notices:
            self.pruner = self._pruner()
        self.notices = notices
        return "; ".join(notices)

    def plan_without(self) -> None:
        """Follow the sentences of refused plans: leave out the layers that they name."""
        for _ in range(len(self.names)):
            try:
                with _notices():
                    self.pruner = self._pruner()
                return
            except ValueError as error:
                found = [name for name in named_in(str(error), self.names) if self._is_layer(name)]
                if not found or found[0] in self.excluded:
                    return
                self.excluded.append(found[0])

    def _is_layer(self, name: str) -> bool:
        return not list(self.model.get_submodule(name).children())

    def _pruner(self) -> Pruner:
        settings = {
            "method": "ck",
            "amount": 0.6,
            "era": list(ERA),
            "fc": {"method": "fine", "amount": 0.5},
            "exclude": self.excluded,
        }
        example = self.zoo.arguments(9)
        return Pruner(self.model, settings, updates_per_epoch=UPDATES, example_input=example)

    def training(self) -> None:
        """Two updates in each phase; in each the keys and the zeros are looked at."""
        optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-4, momentum=0.9)
        for epoch in range(3):
            for update in range(UPDATES):
                optimizer.zero_grad()
                arguments = self.zoo.training_arguments(epoch * UPDATES + update)
                loss_of(self.model(*arguments)).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                self._step()
                self._compare_keys()
            self._pruner_().end_epoch(epoch)
        self._pruner_().check()
        if self._pruner_().phase != "fixed":
            raise WrongError(f"the phase is {self._pruner_().phase} after the era")
        self.model.eval()

    def _step(self) -> None:
        pruner = self._pruner_()
        pruner.step()
        if pruner.phase == "era":
            self.bad_zeros += self._false_zeros()[:3]

    def _pruner_(self) -> Pruner:
        assert self.pruner is not None
        return self.pruner

    def _compare_keys(self) -> None:
        keys, phase = list(self.model.state_dict()), self._pruner_().phase
        if set(keys) != set(self.keys):
            new = [key for key in keys if key not in self.keys]
            old = [key for key in self.keys if key not in keys]
            self.bad_keys.append(f"{phase}: {len(new)} new such as {new[:1]}, lacks {old[:1]}")

    # --- the cells after it ---

    def zeros(self) -> str:
        """Compare the zeros that are reported with those of the responses, in era and fixed."""
        faults = [*self.bad_zeros, *self._false_zeros()]
        if faults:
            raise WrongError(f"{len(faults)} faults: {'; '.join(dict.fromkeys(faults[:3]))}")
        return f"{self._pruner_().sparsity().selected:.1%}"

    def _false_zeros(self) -> list[str]:
        """What is wrong with the zeros in this phase."""
        pruner, masks, faults = self._pruner_(), self._pruner_().masks(), []
        sparsity = pruner.sparsity()
        for name, layer in pruner.layers.items():
            pruned = reported_zeros(masks, name)
            if sparsity[name].zeros < int(pruned.sum()):
                faults.append(f"{name}: reports {sparsity[name].zeros} of {int(pruned.sum())}")
            try:
                answer = response(layer.module, _n_channels(pruned))
            except UnmeasurableError as error:
                faults.append(f"{name} ({type(layer.module).__name__}): {error}")
                continue
            acting = answer.acting(pruned)
            if acting:
                among = int(pruned[:, answer.channels].sum())
                faults.append(
                    f"{name} ({type(layer.module).__name__}): {acting} of {among} pruned weights "
                    f"act, in the phase {pruner.phase}"
                )
        training = self.model.training
        readers = foreign_readers(self.model.eval(), self.zoo.arguments(7), pruner.layers)
        self.model.train(training)
        faults += [f"{name}: its weight is read without calling it" for name in readers]
        return faults

    def share(self) -> str:
        """Compare the network's share of zeros with that of all parameters that are matrices."""
        sparsity = self._pruner_().sparsity()
        left_out = {weight.name for weight in sparsity.left_out}
        parameters = dict(self.model.named_parameters())
        counted = [
            weight.detach()
            for name, weight in parameters.items()
            if name not in left_out and sum(size > 1 for size in weight.shape) > 1
        ]
        total = sum(weight.numel() for weight in counted)
        reported = sum(layer.total for layer in sparsity.layers)
        if left_out - set(parameters):
            raise WrongError(
                f"left out are {sorted(left_out - set(parameters))[:3]}, which it lacks"
            )
        if not 0.99 <= reported / total <= 1.01:  # which counts tiny layers otherwise
            raise WrongError(f"{reported:,} weights are counted of {total:,} that aren't left out")
        share = sum(int((weight == 0).sum()) for weight in counted) / total
        if abs(share - sparsity.network) > 0.01:
            raise WrongError(f"the network reports {sparsity.network:.1%}, and has {share:.1%}")
        every = total + sum(weight.total for weight in sparsity.left_out)
        return f"{sparsity.network:.1%} of {total / every:.0%} of the weights"

    def same_keys(self) -> None:
        """The keys of all phases, which the training has looked at."""
        if self.bad_keys:
            raise WrongError("; ".join(dict.fromkeys(self.bad_keys)))

    def file(self) -> None:
        """Save and load into a new model: the outputs are the same, bit for bit."""
        path = self.folder / "model.safetensors"
        save_pruned(self.model, path, "compressed", pruner=self._pruner_())
        loaded = load_pruned_model(path, self.zoo.build()).eval()
        for one, other in zip(self._outputs(self.model), self._outputs(loaded), strict=True):
            if not torch.equal(one.nan_to_num(), other.nan_to_num()):
                raise WrongError("the loaded model has other outputs")

    def compact(self) -> str:
        """A smaller model that has the same outputs."""
        from starfire_prune.compact import compact

        model = copied_module(self.model)
        with torch.no_grad():
            for name in self._pruner_().layers:  # a quarter of the channels is dead
                layer: Any = model.get_submodule(name)
                dead = slice(len(layer.weight) // 4)
                layer.weight[dead] = 0
                if layer.bias is not None:
                    layer.bias[dead] = 0
        smaller, report = compact(model, self.zoo.arguments(3))
        self._compare(self._outputs(smaller), model)
        before, after = report.parameters
        return f"{after / before:.1%} of the parameters"

    def onnx(self) -> None:
        """An ONNX file that ONNX Runtime runs, with the same outputs."""
        import onnxruntime

        from starfire_prune.export import export_onnx

        path = self.folder / "model.onnx"
        export_onnx(self.model, path, self.zoo.shape)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(str(path), options, ["CPUExecutionProvider"])
        name = session.get_inputs()[0].name
        found = session.run(None, {name: self.zoo.images(7).numpy()})
        self._compare([torch.from_numpy(each) for each in found], amplifies=True)

    def sparse(self) -> str:
        """A compiled model that has the same outputs."""
        from starfire_prune import sparse

        compiled = sparse.compile(self.model, self.zoo.arguments(3))
        self._compare(output_tensors(compiled(*self.zoo.arguments(7))))
        return (
            f"{len(compiled.segments)} segments, {len(compiled.torch_operations)} torch operations"
        )

    @torch.no_grad()
    def _outputs(self, model: nn.Module) -> list[Tensor]:
        return output_tensors(copied_module(model).eval()(*self.zoo.arguments(7)))

    def _compare(
        self, outputs: list[Tensor], model: nn.Module | None = None, *, amplifies: bool = False
    ) -> None:
        """Compare with the outputs of a model, which may amplify the rounding of another engine."""
        expected = self._outputs(model or self.model)
        tolerance = _TOLERANCE
        if amplifies:
            tolerance = max(tolerance, 10 * rounding(self.model, self.zoo.arguments(7)))
        try:
            compare_outputs(expected, outputs, tolerance)
        except ValueError as error:
            raise WrongError(f"the outputs {error}") from None


def measure(zoo: ZooModel, cells: Collection[str] = tuple(CELLS)) -> dict[str, Outcome]:
    """The outcome of each cell for a model.

    A plan that is refused is tried again without the layers that its sentences name.

    Args:
        zoo: The model.
        cells: The cells that are measured; plan and training always are.
    """
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), one_thread():
        warnings.simplefilter("ignore")  # of the models' own code
        trial = Trial(zoo, Path(folder))
        outcomes = {"plan": attempt(trial.plan, trial.names, LIMITS["plan"])}
        if trial.pruner is None:
            trial.plan_without()
        if trial.pruner is not None:
            outcomes["training"] = attempt(trial.training, trial.names, LIMITS["training"])
        if "training" not in outcomes or outcomes["training"].status != "right":
            return {name: outcomes.get(name, Outcome("open")) for name in CELLS}
        actions: dict[str, Callable[[], str | None]] = {
            "zeros": trial.zeros,
            "share": trial.share,
            "keys": trial.same_keys,
            "file": trial.file,
            "compact": trial.compact,
            "onnx": trial.onnx,
            "sparse": trial.sparse,
        }
        for name, action in actions.items():
            if name in cells:
                outcomes[name] = attempt(action, trial.names, LIMITS[name])
    if trial.excluded:
        first = outcomes["plan"]
        text = f"{first.text} [the other cells: without {len(trial.excluded)} layers]"
        outcomes["plan"] = Outcome(first.status, text, first.seconds)
    return outcomes


def _n_channels(pruned: Tensor) -> int | None:
    """Input channels of a layer that are measured: all of a small one."""
    return _CHANNELS if pruned.numel() > _LARGE else None


@contextmanager
def _notices() -> Iterator[list[str]]:
    """The messages of the package's loggers meanwhile."""
    found: list[str] = []
    handler = logging.Handler(logging.INFO)
    handler.emit = lambda record: found.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("starfire_prune")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield found
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread meanwhile: models of the zoo run beside each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
