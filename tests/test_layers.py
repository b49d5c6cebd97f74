"""The arrows of the architecture, read from the imports: commands -> recipes -> {models, files, report} -> maths."""

import ast
import importlib
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import recall_merge

ROOT = Path(recall_merge.__file__).parent
EVERYWHERE = {"engines", "errors", "memory", "progress", "parallel", "paths", "processes", "safe_yaml"}
ALLOWED = {
    "maths": {"maths"},
    "files": {"files", "maths"},
    "models": {"models", "files", "maths", "config"},
    "report": {"report", "maths"},
    "recipes": {"recipes", "models", "files", "maths", "report", "config"},
    "commands": {"commands", "recipes", "models", "files", "maths", "report", "config"},
    "config": {"config"},
    "engines": {"engines"},
    "errors": {"errors"},
    "progress": {"progress"},
    "memory": {"memory"},
    "parallel": {"parallel"},
    "paths": {"paths"},
    "processes": {"processes"},
    "safe_yaml": {"safe_yaml"},
    "__main__": {"commands"},
}


def modules() -> list[str]:
    return sorted(module.name for module in pkgutil.walk_packages([str(ROOT)], "recall_merge."))


def imported_parts(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("recall_merge."):
            found.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("recall_merge.")}
    return found


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_follow_the_arrows(path):
    part = path.relative_to(ROOT).parts[0].removesuffix(".py")
    if part != "__init__":
        assert imported_parts(path) <= ALLOWED[part] | EVERYWHERE


def test_every_part_has_its_arrows():
    parts = {path.name.removesuffix(".py") for path in ROOT.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert parts - {"__init__"} == set(ALLOWED)


@pytest.mark.parametrize("name", modules())
def test_every_module_can_be_imported(name):
    importlib.import_module(name)


def test_one_module_alone_imports_ray():
    found = [path.name for path in ROOT.rglob("*.py") if re.search(r"^\s*(import|from) ray\b", path.read_text("utf-8"), re.MULTILINE)]
    assert found == ["cluster.py"]


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
