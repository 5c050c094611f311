"""The most memory that a process, or what it keeps on a GPU, takes."""

import ctypes
from pathlib import Path

import torch

__all__ = ["peak_bytes", "reset_peak", "resident_bytes"]


def reset_peak(device: str) -> None:
    """Begin to look for the peak."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def peak_bytes(device: str) -> int:
    """The most memory that was held since."""
    return torch.cuda.max_memory_allocated() if device == "cuda" else status_bytes("VmHWM")


def resident_bytes(device: str) -> int:
    """What this process holds before it has made anything."""
    return 0 if device == "cuda" else status_bytes("VmRSS")


def status_bytes(name: str) -> int:
    """A line of the kernel's status of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith(f"{name}:")]
    return 1024 * int(line.split()[1])
