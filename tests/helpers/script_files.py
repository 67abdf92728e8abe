"""The scripts of the repository, and one of them as a module."""

import functools
import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from helpers.repo import REPO


@functools.cache
def load_script(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"documented_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for it
    sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(path.parent))
    return module


SCRIPTS = sorted(path for pattern in ("scripts/**/*.py", "data/*.py", "docs/*.py") for path in REPO.glob(pattern))
