"""What the documents say is so: the commands and the example of README run, run files are sound, links lead somewhere."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from recall_merge.commands.app import app
from recall_merge.config import MergeRun, load_run
from recall_merge.maths.methods import METHODS
from tiny import fine_tuned, write_rows

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted((ROOT / "docs").rglob("*.md"))
ROWS = [{"prompt": f"is the fox {word}?", "completion": " yes"} for word in ("quick", "lazy", "good", "bad")]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text("utf-8"), re.DOTALL)


@pytest.fixture
def here(llama, tmp_path, monkeypatch):
    """A folder with the models and rows that README speaks of, tiny ones."""
    shutil.copytree(llama, tmp_path / "base")
    (tmp_path / "out").mkdir()
    for seed, name in enumerate(("sentiment", "french")):
        fine_tuned(tmp_path / "base", tmp_path / "out" / name, seed=seed + 1)
        write_rows(tmp_path / f"{name}.jsonl", ROWS)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_readme_shows_the_two_commands_and_a_picture():
    text = (ROOT / "README.md").read_text("utf-8")
    assert "make demo" in text
    assert "make test" in text
    pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", text)
    assert pictures
    assert all((ROOT / picture).is_file() for picture in pictures)


def test_readme_library_example_runs(here):
    (example,) = blocks(ROOT / "README.md", "python")
    assert len(example.strip().splitlines()) <= 8
    run = subprocess.run([sys.executable, "-c", example], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert (here / "merged" / "model.safetensors").exists()


def test_readme_run_file_and_commands_work(here):
    (run,) = blocks(ROOT / "README.md", "yaml")
    (here / "run.yaml").write_text(run)
    lines = [line for block in blocks(ROOT / "README.md", "console") for line in block.splitlines() if line.startswith("$ recall")]
    assert len(lines) >= 5
    for line in lines:
        words = shlex.split(line.removeprefix("$ recall"), comments=True)
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 0, f"{line}: {result.output} {result.exception}"


def test_commands_of_the_site_work(here):
    """The pages one after the other, in one folder; what a page needs beside models and rows, an earlier one makes."""
    for name in ("sentiment", "french"):
        write_rows(here / f"{name}-test.jsonl", [{**row, "prompt": f"{row['prompt']} Say it.", "choices": [" yes", " no"]} for row in ROWS])
    docs, ran = ROOT / "docs", 0
    for page in ("index", "choosing", "cards", "workspace", "reports"):
        for run in blocks(docs / f"{page}.md", "yaml"):
            (here / "run.yaml").write_text(run)
        lines = [line for block in blocks(docs / f"{page}.md", "console") for line in block.splitlines()]
        for line in lines:
            if line.startswith("$ recall"):
                result = CliRunner().invoke(app, shlex.split(line.removeprefix("$ recall"), comments=True))
                assert result.exit_code == 0, f"{page}: {line}: {result.output} {result.exception}"
                ran += 1
            else:
                assert line.startswith("$ pip install"), line
    assert ran >= 15
    assert (here / "merged-report" / "index.html").is_file()


def test_site_names_every_page_and_only_those():
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text("utf-8").replace("!!python/name:", ""))
    named = {path for entry in site["nav"] for path in entry.values()}
    assert named == {str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")}


def test_run_files_are_sound():
    files = sorted((ROOT / "configs").rglob("*.yaml"))
    assert len(files) >= 2
    for file in files:
        first, run = file.read_text("utf-8").splitlines()[0], load_run(file)
        assert first == f"# recall merge configs/{file.relative_to(ROOT / 'configs')}"
        assert run.method in METHODS


def test_run_page_tells_every_key():
    text = (ROOT / "docs" / "run.md").read_text("utf-8")
    told = set(re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE))
    assert told == set(MergeRun.model_fields)
    for block in blocks(ROOT / "docs" / "run.md", "yaml"):
        MergeRun.model_validate(yaml.safe_load(block))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text("utf-8")):
        assert (page.parent / target).exists(), target
