"""The pruning survives a resume in trainers of others, with the bits of an unbroken run.

They are not dependencies: `pip install lightning transformers` lets these tests run.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from starfire_prune import Pruner
from tests.support.networks import SmallNet, equal_states

CK: dict[str, object] = {"method": "ck", "amount": 0.6, "era": [1, 3]}
IMAGES = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(16) % 10


def test_lightning(tmp_path: Path) -> None:
    lightning: Any = pytest.importorskip("lightning")
    batches = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(IMAGES, LABELS), 4)

    class Module(lightning.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.model = SmallNet()

        def training_step(self, batch: list[Tensor], index: int) -> Tensor:
            return functional.cross_entropy(self.model(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.05, momentum=0.9)

    class Pruning(lightning.Callback):  # type: ignore[misc]
        def setup(self, trainer: Any, module: nn.Module, stage: str) -> None:
            self.pruner = Pruner(module, CK, updates_per_epoch=4)

        def on_train_batch_end(self, *_: object) -> None:
            self.pruner.step()

        def on_train_epoch_end(self, trainer: Any, module: nn.Module) -> None:
            self.pruner.end_epoch(trainer.current_epoch)

        def state_dict(self) -> dict[str, Any]:
            return self.pruner.state_dict()

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.pruner.load_state_dict(state)

    def fit(folder: Path, checkpoint: Path | None = None) -> tuple[dict[str, Tensor], Pruner]:
        model, pruning = Module(), Pruning()
        saving = lightning.pytorch.callbacks.ModelCheckpoint(
            folder, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True
        )
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        trainer = lightning.Trainer(
            max_epochs=4, callbacks=[pruning, saving], accelerator="cpu", **quiet
        )
        trainer.fit(model, batches, ckpt_path=checkpoint)
        return model.state_dict(), pruning.pruner

    whole, pruner = fit(tmp_path / "whole")
    assert pruner.phase == "fixed"
    for epoch in range(3):
        resumed, _ = fit(tmp_path / str(epoch), tmp_path / f"whole/epoch={epoch}.ckpt")
        assert equal_states(resumed, whole)


def test_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    transformers: Any = pytest.importorskip("transformers")

    class Pruning(transformers.TrainerCallback):  # type: ignore[misc]
        def __init__(self, checkpoint: Path | None) -> None:
            self.checkpoint = checkpoint

        def on_train_begin(self, *_: object, model: nn.Module, **others: object) -> None:
            self.pruner = Pruner(model, CK, updates_per_epoch=4)
            if self.checkpoint is not None:
                self.pruner.load_state_dict(torch.load(self.checkpoint / "pruner.pt"))

        def on_optimizer_step(self, *_: object, **others: object) -> None:
            self.pruner.step()

        def on_epoch_end(self, *_: object, **others: object) -> None:
            self.pruner.end_epoch(self.pruner.epoch)

        def on_save(self, args: Any, state: Any, control: object, **others: object) -> None:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            torch.save(self.pruner.state_dict(), folder / "pruner.pt")

    def fit(folder: Path, checkpoint: Path | None = None) -> tuple[dict[str, Tensor], Pruner]:
        torch.manual_seed(0)
        model = transformers.ResNetForImageClassification(
            transformers.ResNetConfig(
                embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], num_labels=10
            )
        )
        arguments = transformers.TrainingArguments(
            str(folder), num_train_epochs=4, per_device_train_batch_size=4, save_strategy="epoch",
            report_to="none", use_cpu=True, disable_tqdm=True,
        )  # fmt: skip
        data = [
            {"pixel_values": image, "labels": int(label)}
            for image, label in zip(IMAGES, LABELS, strict=True)
        ]
        pruning = Pruning(checkpoint)
        trainer = transformers.Trainer(model, arguments, train_dataset=data, callbacks=[pruning])
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        return model.state_dict(), pruning.pruner

    whole, pruner = fit(tmp_path / "whole")
    assert pruner.phase == "fixed"
    for updates in (4, 8, 12):
        resumed, _ = fit(tmp_path / str(updates), tmp_path / f"whole/checkpoint-{updates}")
        assert equal_states(resumed, whole)
