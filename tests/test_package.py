"""What is installed: the wheel, the versions it asks for, and what it says of itself."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from helpers.repo import REPO

import bge_accel


def requirements(name: str) -> dict[str, str]:
    lines = [line.split("#")[0].strip() for line in (REPO / name).read_text().splitlines()]
    return dict(re.fullmatch(r"([\w.-]+)(.*)", line).groups() for line in lines if line)  # type: ignore[union-attr]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that the clone stays clean."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE", "requirements.txt", "requirements-dev.txt"):
        shutil.copy(REPO / name, source)
    shutil.copytree(REPO / "bge_accel", source / "bge_accel", ignore=shutil.ignore_patterns("__pycache__"))
    (source / "tests").mkdir()
    (source / "tests" / "test_nothing.py").write_text("")
    command = [sys.executable, "-m", "pip", "wheel", str(source), "--no-deps", "--quiet", "-w", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if done.returncode and re.search("No matching distribution|ConnectionError|Temporary failure", done.stderr):
        pytest.skip("no package index within reach to fetch setuptools from")
    assert done.returncode == 0, done.stderr
    (built,) = out.iterdir()
    return built


def test_the_wheel_holds_the_library_and_nothing_else(wheel: Path) -> None:
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    sources = [*(REPO / "bge_accel").rglob("*.py"), REPO / "bge_accel" / "py.typed"]
    assert names == {str(path.relative_to(REPO)) for path in sources}
    assert any(name.endswith("licenses/LICENSE") for name in zipfile.ZipFile(wheel).namelist())


def test_the_wheel_works_from_another_folder(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = "import bge_accel, bge_accel.training.losses as l; print(bge_accel.__version__, bge_accel.__file__)"
    env = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, check=True
    )
    version, path = done.stdout.split()
    assert version == bge_accel.__version__ and path.startswith(str(tmp_path))


def test_a_folder_of_the_librarys_name_does_not_hide_it(tmp_path: Path) -> None:
    """As the clone does for scripts that stand beside it."""
    (tmp_path / "bge_accel").mkdir()
    (tmp_path / "mine.py").write_text("from bge_accel import EmbeddingModel, __version__; print(__version__)")
    env = {**os.environ, "PYTHONPATH": ""}
    done = subprocess.run([sys.executable, "mine.py"], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.stdout.strip() == bge_accel.__version__, done.stderr


def test_it_asks_for_what_the_requirements_say(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (name,) = (name for name in archive.namelist() if name.endswith("METADATA"))
    lines = archive.read(name).decode().splitlines()
    asked = {
        line.split(": ")[1].split(";")[0] for line in lines if line.startswith("Requires-Dist") and "extra" not in line
    }
    names = {re.match(r"[\w.-]+", line).group().lower() for line in asked}  # type: ignore[union-attr]
    assert names == {name.lower() for name in requirements("requirements.txt")}
    assert f"Version: {bge_accel.__version__}" in lines and "Requires-Python: >=3.11" in lines
    pythons = {
        line.rsplit(" ", 1)[1] for line in lines if line.startswith("Classifier: Programming Language :: Python ::")
    }
    assert pythons == {"3.11", "3.12", "3.13"}


def test_both_lists_of_requirements_differ_in_faiss_alone() -> None:
    on_cpu, on_gpu = requirements("requirements.txt"), requirements("requirements-gpu.txt")
    assert on_cpu.pop("faiss-cpu") and on_gpu.pop("faiss-gpu")
    assert on_cpu == on_gpu


def test_the_tested_versions_are_among_those_that_are_allowed() -> None:
    from packaging.requirements import Requirement

    pinned = {name.lower(): version.lstrip("=") for name, version in requirements("constraints.txt").items()}
    for name, bounds in (requirements("requirements.txt") | requirements("requirements-dev.txt")).items():
        own = pinned.get(name.lower())
        if own is not None:
            assert Requirement(name + bounds).specifier.contains(own), f"{name}{bounds} does not admit {own}"
    assert requirements("requirements.txt").keys() <= pinned.keys() | {"PyYAML", "pyyaml"}


def test_the_newest_version_of_the_changelog_is_this_one() -> None:
    newest = re.search(r"^## \[([\d.]+)\]", (REPO / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None and newest[1] == bge_accel.__version__
