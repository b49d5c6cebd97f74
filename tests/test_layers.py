"""The arrows of the house, read from the imports: a room knows the rooms below it and `runtime`; no modules form an import circle."""

import ast
import importlib
import pkgutil
import re
import subprocess
import sys
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import recall_merge

ROOT = Path(recall_merge.__file__).parent
ROOMS = (
    "cli",
    "demo",
    "bench",
    "continual",
    "interop",
    "report",
    "merging",
    "training",
    "evaluation",
    "models",
    "files",
    "maths",
    "runtime",
)
"""From the top of the house to its ground; an arrow never points up."""
FRONT = {"__init__", "__main__"}  # the package's own door, above all rooms
LARGEST_ROOM = 0.20  # of all lines
LONGEST_FILE = 400  # lines


def modules() -> list[str]:
    return sorted(module.name for module in pkgutil.walk_packages([str(ROOT)], "recall_merge."))


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@cache
def imports() -> dict[str, set[str]]:
    """Every module with the modules of the package that it imports, wherever in the file it does so."""
    names = {module_name(path): path for path in ROOT.rglob("*.py")}
    found = {}
    for name, path in names.items():
        found[name] = set()
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "recall_merge":
                package = (node.module or "").removeprefix("recall_merge").removeprefix(".")
                inner = {f"{package}.{alias.name}".strip(".") for alias in node.names}
                found[name] |= {each if each in names else package for each in inner} & set(names)
            elif isinstance(node, ast.Import):
                found[name] |= {alias.name.removeprefix("recall_merge.") for alias in node.names} & set(names)
    return found


def room_of(name: str) -> str:
    return name.split(".", maxsplit=1)[0]


@pytest.mark.parametrize("room", ROOMS)
def test_arrows_point_down(room):
    below = {*ROOMS[ROOMS.index(room) :], "runtime"}
    up = [(name, other) for name, others in imports().items() if room_of(name) == room for other in others if room_of(other) not in below]
    assert not up


def test_no_module_imports_itself_in_a_circle():
    graph = {name: others for name, others in imports().items() if name not in FRONT}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"import circle: {' -> '.join(error.args[1])}")


def test_a_circle_would_be_found():
    with pytest.raises(CycleError):
        TopologicalSorter({"a": {"b"}, "b": {"a"}}).prepare()


def test_every_folder_is_a_room():
    assert {path.name for path in ROOT.iterdir() if (path / "__init__.py").exists()} == set(ROOMS)
    assert {path.stem for path in ROOT.glob("*.py")} == FRONT


def test_rooms_and_files_stay_small():
    lines = {path: len(path.read_text("utf-8").splitlines()) for path in ROOT.rglob("*.py")}
    whole = sum(lines.values())
    large = {room: sum(n for path, n in lines.items() if path.relative_to(ROOT).parts[0] == room) / whole for room in ROOMS}
    assert not {room: share for room, share in large.items() if share > LARGEST_ROOM}
    assert not {str(path.relative_to(ROOT)): n for path, n in lines.items() if n > LONGEST_FILE}


@pytest.mark.parametrize("name", modules())
def test_every_module_can_be_imported(name):
    importlib.import_module(name)


def test_one_module_alone_imports_ray():
    found = [path.name for path in ROOT.rglob("*.py") if re.search(r"^\s*(import|from) ray\b", path.read_text("utf-8"), re.MULTILINE)]
    assert found == ["ray_cluster.py"]


@pytest.mark.parametrize("command", [["--help"], ["merge", "--help"], ["methods", "--help"]])
def test_help_loads_nothing_heavy(command):
    code = (
        "import sys; from recall_merge.cli.app import app\n"
        f"try: app({command!r}, prog_name='recall')\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'numpy', 'sklearn', 'altair', 'trl', 'peft', 'ray'} & set(sys.modules)\n"
        "sys.exit(f'loaded {heavy}' if heavy else 0)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "Usage: recall" in run.stdout
