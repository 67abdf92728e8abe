"""The rooms of the library: their order, their doors, and no circle anywhere."""

import ast
import importlib
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest
from helpers.repo import REPO

ORDER = "files config processes data kernels models encoding training evaluation mining merging reports".split()
LIBRARY = REPO / "bge_accel"
MODULES = {".".join(path.relative_to(LIBRARY).with_suffix("").parts): path for path in LIBRARY.rglob("*.py")}
SCRIPTS = {
    str(path.relative_to(REPO)): path for folder in ("scripts", "data") for path in (REPO / folder).rglob("*.py")
}
ROOMS = [room for room in ORDER if (LIBRARY / room).is_dir()]


class Import(NamedTuple):
    module: str
    """Below `bge_accel`, as "data.rows"."""
    name: str | None
    """What is taken from it; None for the module itself."""
    line: int
    at_top: bool


def imports(path: Path) -> Iterator[Import]:
    """What a file imports of the library."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        names: list[tuple[str, str | None]] = []
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "bge_accel":
            names = [(node.module or "", alias.name) for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [(alias.name, None) for alias in node.names if alias.name.startswith("bge_accel.")]
        for module, name in names:
            module = module.partition(".")[2]
            if f"{module}.{name}".lstrip(".") in MODULES:
                module, name = f"{module}.{name}".lstrip("."), None
            if module:
                yield Import(module, name, node.lineno, node in tree.body)


def room_of(module: str) -> str:
    return module.partition(".")[0]


def test_every_module_is_in_a_room() -> None:
    assert {room_of(module) for module in MODULES} == {*ORDER, "__init__"}


@pytest.mark.parametrize("module", [module for module in MODULES if module != "__init__"])
def test_a_room_imports_only_what_stands_before_it(module: str) -> None:
    allowed = ORDER[: ORDER.index(room_of(module)) + 1]
    above = [(found.module, found.line) for found in imports(MODULES[module]) if room_of(found.module) not in allowed]
    assert above == []


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph = {module: {found.module for found in imports(path) if found.at_top} for module, path in MODULES.items()}
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        raise AssertionError(" -> ".join(error.args[1])) from None


@pytest.mark.parametrize("user", [*MODULES, *SCRIPTS])
def test_others_use_what_stands_at_the_door(user: str) -> None:
    is_ours = user in MODULES
    shut = []
    for found in imports(MODULES[user] if is_ours else SCRIPTS[user]):
        room, _, module = found.module.partition(".")
        if room not in ROOMS or (is_ours and room == room_of(user)):
            continue
        door = importlib.import_module(f"bge_accel.{room}").DOOR
        if module not in door or (found.name is not None and found.name not in door[module]):
            shut.append(f"{found.module}.{found.name}, line {found.line}")
    assert shut == []


@pytest.mark.parametrize("room", ROOMS)
def test_a_door_names_what_is_there_and_used(room: str) -> None:
    used: dict[str, set[str]] = {}
    for user, path in {**MODULES, **SCRIPTS}.items():
        if user not in MODULES or room_of(user) != room:
            for found in imports(path):
                if room_of(found.module) == room:
                    used.setdefault(found.module.partition(".")[2], set()).update({found.name} - {None})
    assert importlib.import_module(f"bge_accel.{room}").__doc__
    door = importlib.import_module(f"bge_accel.{room}").DOOR
    assert {module: set(names) for module, names in door.items()} == used
    for module, names in door.items():
        tree = ast.parse(MODULES[f"{room}.{module}"].read_text(encoding="utf-8"))
        assert not [name for name in names if name.startswith("_")] and ast.get_docstring(tree)


def test_no_test_imports_another() -> None:
    tests = {path.stem for path in (REPO / "tests").rglob("test_*.py")}
    for path in (REPO / "tests").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                assert node.module not in tests, f"{path}:{node.lineno}"
