"""Exports of trained weights for other programs: ONNX files, and folders that timm loads."""

from starfire_prune.export.input import ExportInput, find_input, load_input, write_weights
from starfire_prune.export.onnx import OnnxReport, export_onnx
from starfire_prune.export.timm import timm_config, write_timm_folder

__all__ = [
    "ExportInput",
    "OnnxReport",
    "export_onnx",
    "find_input",
    "load_input",
    "timm_config",
    "write_timm_folder",
    "write_weights",
]
