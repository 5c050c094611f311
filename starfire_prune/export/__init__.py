"""Exports for other programs: ONNX, timm folders."""
