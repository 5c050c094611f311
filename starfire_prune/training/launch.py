"""The Accelerator of a run, and checks of how its processes were launched."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DataLoaderConfiguration,
    DistributedType,
    DynamoBackend,
    GradientAccumulationPlugin,
    ProjectConfiguration,
    TorchDynamoPlugin,
)

from starfire_prune.recipe.sections import Recipe
from starfire_prune.runs.folder import RunError
from starfire_prune.training.tracking import check_trackers

__all__ = ["create_accelerator"]

# Graphs of one model: training and evaluation, full and last batches, dense and masked weights
_COMPILED_GRAPHS = 16
_SHARDING = {
    "ACCELERATE_USE_FSDP": DistributedType.FSDP,
    "ACCELERATE_USE_DEEPSPEED": DistributedType.DEEPSPEED,
    "ACCELERATE_USE_MEGATRON_LM": DistributedType.MEGATRON_LM,
}


def create_accelerator(recipe: Recipe, folder: Path) -> Accelerator:
    """Create the accelerator of this process from the recipe and the way it was launched.

    Args:
        recipe: Recipe to train.
        folder: Folder of the run, for the files of trackers.

    Raises:
        RunError: If the launch or the precision can't train the recipe, or a tracker is not
            installed.
    """
    _check_ranks_are_announced()
    _check_no_sharding()
    check_trackers(recipe.training.trackers)
    if recipe.training.compile:
        config = torch._dynamo.config  # cache_size_limit: recompile_limit from torch 2.7 on
        config.cache_size_limit = max(config.cache_size_limit, _COMPILED_GRAPHS)
    try:
        accelerator = Accelerator(  # explicit values, which override environment variables
            cpu=_is_cpu_rank(),
            mixed_precision=recipe.training.mixed_precision,
            gradient_accumulation_plugin=GradientAccumulationPlugin(
                num_steps=recipe.training.gradient_accumulation
            ),
            dataloader_config=DataLoaderConfiguration(
                use_seedable_sampler=True, data_seed=recipe.seed
            ),
            dynamo_plugin=_compilation(recipe.training.compile),
            log_with=[*recipe.training.trackers] or None,  # an empty list causes a warning
            project_config=ProjectConfiguration(str(folder), logging_dir=str(folder / "logs")),
        )
    except ValueError as error:  # Accelerate checks which devices support bf16
        raise RunError(
            f"training.mixed_precision (={recipe.training.mixed_precision}): {error}"
        ) from error
    _check_device(accelerator)
    _check_processes(accelerator)
    if recipe.training.threads is not None:  # after Accelerate, which sets it too
        torch.set_num_threads(recipe.training.threads)
    return accelerator


def _compilation(compiles: bool) -> TorchDynamoPlugin:
    """How the model is compiled: for each shape by itself.

    By default torch compiles a graph for all shapes once a second shape appears. A resumed run sees
    the shapes in another order, and would compute other bits than an uninterrupted one.
    """
    backend = DynamoBackend.INDUCTOR if compiles else DynamoBackend.NO
    return TorchDynamoPlugin(
        backend=backend,
        mode="default",
        fullgraph=False,
        dynamic=False,
        use_regional_compilation=False,
    )


def _check_ranks_are_announced() -> None:
    """Raise RunError where `accelerate launch` started a single CPU process, lacking MPI."""
    ranks = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
    if "MASTER_ADDR" in os.environ and not any(name in os.environ for name in ranks):
        raise RunError(
            f"MASTER_ADDR (={os.environ['MASTER_ADDR']}) announces several processes, but RANK and "
            f"WORLD_SIZE are not set, so that each would train by itself: start CPU processes by "
            f"torchrun --nproc_per_node N -m starfire_prune train …, or unset MASTER_ADDR for a "
            f"single one"
        )


def _check_no_sharding() -> None:
    for variable, kind in _SHARDING.items():
        if os.environ.get(variable, "false").lower() in ("true", "1"):
            raise RunError(_sharding_sentence(kind.value))


def _is_cpu_rank() -> bool:
    """Whether this is one of several CPU processes, which Accelerate doesn't detect itself."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.accelerator.is_available()


def _check_device(accelerator: Accelerator) -> None:
    precision, device = accelerator.mixed_precision, accelerator.device.type
    if precision == "fp16" and device == "cpu":  # Accelerate would use float32
        raise RunError("training.mixed_precision (=fp16) needs a GPU: on a CPU, set bf16 or no")
    emulated = device == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False)
    if precision == "bf16" and emulated:
        raise RunError(
            "training.mixed_precision (=bf16) is not supported by this GPU: set fp16 or no"
        )
    if accelerator.distributed_type in _SHARDING.values():  # by a plugin, without the launcher
        raise RunError(_sharding_sentence(accelerator.distributed_type.value))


def _check_processes(accelerator: Accelerator) -> None:
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes < launched:  # MPI may not set WORLD_SIZE
        raise RunError(
            f"WORLD_SIZE (={launched}) announces {launched} processes, but Accelerate has joined "
            f"{accelerator.num_processes}, so that each would train by itself: launch by torchrun "
            f"or accelerate launch, or unset WORLD_SIZE for a single process"
        )


def _sharding_sentence(kind: str) -> str:
    return (
        f"launched with {kind}, which shards weights or replaces the optimizer, so that masks "
        f"can't be computed: launch with plain data parallelism, accelerate launch --multi_gpu"
    )
