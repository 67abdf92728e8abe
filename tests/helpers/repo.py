"""Where the repository is, and what a fixture that runs scripts looks like."""

import subprocess
from collections.abc import Callable
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]


Run = Callable[..., subprocess.CompletedProcess]
