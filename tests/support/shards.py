"""WebDataset shards of small images, whose pixels tell their label."""

import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from starfire_prune.data.images import Classes
from starfire_prune.data.shards import SampleReader, Shard, ShardedImages


def picture(value: int, size: int = 8) -> bytes:
    """A PNG of one grey value."""
    file = io.BytesIO()
    Image.fromarray(np.full((size, size, 3), value, np.uint8)).save(file, "PNG")
    return file.getvalue()


def write_tar(path: Path, files: Mapping[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def write_shards(root: Path, split: str, lengths: Sequence[int]) -> list[Shard]:
    """Shards whose samples are labelled from 0 on, with their part of `_info.json`."""
    shards, label = [], 0
    for number, length in enumerate(lengths):
        files = {}
        for _ in range(length):
            files[f"{label:05}.png"] = picture(label)
            files[f"{label:05}.cls"] = str(label).encode()
            label += 1
        path = write_tar(root / f"{split}-{number}.tar", files)
        shards.append(Shard(str(path), length))
    add_info(root, split, {Path(shard.path).name: shard.length for shard in shards})
    return shards


def add_info(root: Path, split: str, lengths: Mapping[str, int], **more: Any) -> None:
    """List a split in `_info.json` as timm reads it."""
    path = root / "_info.json"
    info = json.loads(path.read_text()) if path.exists() else {"splits": {}}
    info["splits"][split] = {
        "name": split,
        "num_samples": sum(lengths.values()),
        "filenames": list(lengths),
        "shard_lengths": list(lengths.values()),
        **more,
    }
    path.write_text(json.dumps(info))


def to_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255


def reader(classes: int = 256, target_key: str = "") -> SampleReader:
    return SampleReader(
        ("jpg", "png"), target_key, Classes(tuple(map(str, range(classes)))), to_tensor
    )


def sharded(root: Path, lengths: Sequence[int], shuffle_size: int = 8) -> ShardedImages:
    """The images of shards that are written for it."""
    return ShardedImages(write_shards(root, "train", lengths), reader(), shuffle_size)


damaged_image = partial(write_tar, files={"a/7.png": picture(7)[:40], "a/7.cls": b"7"})
