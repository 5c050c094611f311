"""The models of the zoo: one for each family of timm, and torchvision's other networks.

A family is a module of `timm.models`. Its model is the smallest by parameters, at the smallest of a
few image sizes at which it trains. timm's own `test_*` models are left out, as nobody uses them.
"""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from starfire_prune.utils.outputs import output_tensors

__all__ = ["CHOSEN", "ZOO", "ZooModel", "choose", "families", "left_out", "loss_of"]


CHOSEN = Path(__file__).with_name("models.json")
_MOST_PARAMETERS = 140_000_000
_SIZES = (64, 96, 128, 160, 192, 224)
_FURTHER = ("tf_efficientnet_cc_b0_4e", "resnetv2_50x1_bit", "convnextv2_atto")
"""Models whose layers differ from those of their family's smallest model."""

_SEGMENTATION = ("deeplabv3_mobilenet_v3_large", "fcn_resnet50", "lraspp_mobilenet_v3_large")
_DETECTION = (
    "fasterrcnn_mobilenet_v3_large_320_fpn",
    "fcos_resnet50_fpn",
    "keypointrcnn_resnet50_fpn",
    "maskrcnn_resnet50_fpn",
    "retinanet_resnet50_fpn",
    "ssdlite320_mobilenet_v3_large",
)
_VIDEO = {  # frames and image size; MViT has a fixed size, at which it is too slow
    "mc3_18": (4, 64),
    "r2plus1d_18": (4, 64),
    "r3d_18": (4, 64),
    "s3d": (16, 224),
    "swin3d_t": (4, 64),
}


@dataclasses.dataclass(frozen=True)
class ZooModel:
    """A model of the zoo.

    Attributes:
        name: Name in the library.
        family: `timm.resnet`, or `torchvision.video` and so on.
        shape: Shape of an input without its batch.
        options: Arguments of the model's constructor.
    """

    name: str
    family: str
    shape: tuple[int, ...]
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def is_detection(self) -> bool:
        """Whether the model is called with a list of images, and in training with targets."""
        return self.family == "torchvision.detection"

    def build(self) -> nn.Module:
        """A new model, with the same random weights each time, in training mode."""
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if self.family.startswith("timm."):
                import timm

                model: nn.Module = timm.create_model(self.name, num_classes=10, **self.options)
            else:
                import torchvision

                model = torchvision.models.get_model(self.name, weights=None, **self.options)
        return model.train()

    def images(self, seed: int, batch: int = 2) -> Tensor:
        """A batch of images."""
        generator = torch.Generator().manual_seed(seed)
        return torch.rand(batch, *self.shape, generator=generator)

    def arguments(self, seed: int) -> tuple[Any, ...]:
        """The arguments of a forward pass in eval mode."""
        images = self.images(seed)
        return (list(images),) if self.is_detection else (images,)

    def training_arguments(self, seed: int) -> tuple[Any, ...]:
        """The arguments of a forward pass in training mode."""
        if not self.is_detection:
            return self.arguments(seed)
        height, width = self.shape[-2:]
        target = {
            "boxes": torch.tensor([[4.0, 4.0, width / 2, height / 2]]),
            "labels": torch.tensor([1]),
            "masks": torch.ones(1, height, width, dtype=torch.uint8),
            "keypoints": torch.tensor([[[8.0, 8.0, 1.0]] * 17]),
        }
        return *self.arguments(seed), [target, target]


def loss_of(output: Any) -> Tensor:
    """A loss that every output takes part in; that of a detection model are losses already."""
    floats = [each.float() for each in output_tensors(output) if each.is_floating_point()]
    return torch.stack([each.square().mean() for each in floats]).sum()


def families() -> list[str]:
    """The modules of timm's models."""
    from timm.models import list_modules

    # Models that other tests register are of other packages
    return [name for name in list_modules() if find_spec(f"timm.models.{name}") is not None]


def _read() -> dict[str, Any]:
    read: dict[str, Any] = json.loads(CHOSEN.read_text(encoding="utf-8"))
    return read


def _zoo() -> dict[str, ZooModel]:
    chosen = _read()["models"]
    models = [ZooModel(**{**each, "shape": tuple(each["shape"])}) for each in chosen]
    return {model.name: model for model in models}


def left_out() -> dict[str, str]:
    """The families of timm that are left out, and why."""
    found: dict[str, str] = _read()["left_out"]
    return found


ZOO = _zoo() if CHOSEN.exists() else {}


# Choosing


def choose(report: Callable[[str], None]) -> None:
    """Choose the models by the rule, and write them to `CHOSEN`: some minutes."""
    import timm
    import torchvision

    chosen: list[ZooModel] = []
    left_out: dict[str, str] = {}
    for family in families():
        candidates = sorted(_sizes(family))
        small = [name for parameters, name in candidates if parameters <= _MOST_PARAMETERS]
        found = next(filter(None, (_fitted(name, family) for name in small[:4])), None)
        if found is not None:
            chosen.append(found)
        else:
            smallest = f"{candidates[0][1]} has {candidates[0][0] / 1e6:.0f} M parameters"
            left_out[family] = smallest if not small else "none trains at 224 px or below"
        report(f"{family}: {found or left_out[family]}")
    for name in _FURTHER:
        family = timm.models._registry._model_to_module[name]
        further = _fitted(name, family)
        if further is not None:
            chosen.append(further)
    chosen += _torchvision_models()
    versions = {"timm": timm.__version__, "torchvision": torchvision.__version__.partition("+")[0]}
    _write(versions, left_out, chosen)


def _write(
    versions: Mapping[str, str], left_out: Mapping[str, str], models: Iterable[ZooModel]
) -> None:
    """Write the choice, a model a line."""
    rows = ",\n".join(f"  {json.dumps(dataclasses.asdict(model))}" for model in models)
    head = json.dumps({"versions": versions, "left_out": left_out}, indent=1).removesuffix("\n}")
    CHOSEN.write_text(f'{head},\n "models": [\n{rows}\n ]\n}}\n', encoding="utf-8")


def _sizes(family: str) -> Iterator[tuple[int, str]]:
    """Numbers of parameters and names of a family's models."""
    import timm

    for name in timm.list_models(module=family):
        if not name.startswith("test_"):
            with torch.device("meta"), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    model = timm.create_model(name)
                except Exception:  # some can't be built without values
                    continue
            yield sum(parameter.numel() for parameter in model.parameters()), name


def _fitted(name: str, family: str) -> ZooModel | None:
    """A model of timm at the smallest image size at which it trains."""
    for size in _SIZES:
        for options in ({}, {"img_size": size}):
            model = ZooModel(name, f"timm.{family}", (3, size, size), options)
            if _trains(model):
                return model
    return None


def _trains(model: ZooModel) -> bool:
    try:
        network = model.build()
        loss_of(network(*model.training_arguments(0))).backward()  # type: ignore[no-untyped-call]
        with torch.no_grad():
            network.eval()(*model.arguments(0))
    except Exception:  # models raise errors of every kind at sizes that they don't have
        return False
    return True


def _torchvision_models() -> Iterator[ZooModel]:
    backbone = {"weights_backbone": None, "num_classes": 10}
    for name in _SEGMENTATION:
        yield ZooModel(name, "torchvision.segmentation", (3, 64, 64), backbone)
    for name in _DETECTION:
        size = 320 if name.startswith("ssd") else 64
        scale = {} if name.startswith("ssd") else {"min_size": size, "max_size": size}
        keypoints = {"num_keypoints": 17} if name.startswith("keypoint") else {}
        few = {"box_detections_per_img": 5, "box_batch_size_per_image": 16}
        boxes = few if "rcnn" in name else {}
        options = {**backbone, **scale, **keypoints, **boxes}
        yield ZooModel(name, "torchvision.detection", (3, size, size), options)
    for name, (frames, size) in _VIDEO.items():
        shape = (3, frames, size, size)
        yield ZooModel(name, "torchvision.video", shape, {"num_classes": 10})
