"""Adds the library that runs programs to wheels for x86-64 Linux, whose users need no compiler."""

from __future__ import annotations

import importlib.util
import os
import platform
import sys
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

BUILDING = "starfire_prune/runtime/building.py"
LIBRARY = "starfire_prune/runtime/libstarfire.so"
REQUIRED_VARIABLE = "STARFIRE_REQUIRE_LIBRARY"  # if set, a wheel without the library is an error


class LibraryHook(BuildHookInterface):
    """Builds the library for a wheel; an editable install builds it at first use."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version == "editable" or sys.platform != "linux" or platform.machine() != "x86_64":
            return
        path = Path(self.directory) / "libstarfire.so"
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._building().build_for_wheel(path)
        except RuntimeError as error:  # BuildError
            if os.environ.get(REQUIRED_VARIABLE):
                raise
            self.app.display_warning(f"the wheel has no {path.name}: {error}")
            return
        build_data["force_include"][str(path)] = LIBRARY
        build_data["pure_python"] = False
        platform_tag = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["tag"] = f"py3-none-{platform_tag}"

    def _building(self) -> Any:
        """The module that builds it, without those of its package, which need NumPy."""
        sys.path.insert(0, self.root)
        spec = importlib.util.spec_from_file_location("building", Path(self.root) / BUILDING)
        if spec is None or spec.loader is None:
            raise ImportError(BUILDING)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        (Path(self.directory) / "libstarfire.so").unlink(missing_ok=True)
