"""The documents are true: commands and examples run, run files are valid, links and tests that they name exist."""

import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from click import Context
from typer.main import get_command
from typer.testing import CliRunner

from recall_merge.bench.scenario import Scenario
from recall_merge.cli.app import app
from recall_merge.maths.methods import ALIASES, METHODS
from recall_merge.merging.run import MergeRun, load_run
from tiny import TEMPLATE, fine_tuned, write_rows

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "recall_merge"
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted((ROOT / "docs").rglob("*.md"))
ELSEWHERE = ("git", "llama-server", "ollama", "python", "transformers", "vllm")  # other tools: not run here; see test_ship.py
ROWS = [{"prompt": f"is the fox {word}?", "completion": " yes"} for word in ("quick", "lazy", "good", "bad")]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text("utf-8"), re.DOTALL)


@pytest.fixture
def here(llama, tmp_path, monkeypatch):
    """A folder with tiny versions of the models and rows that the README mentions."""
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


def commands(page: Path) -> list[str]:
    """The commands that a page shows: in console blocks after a '$', and in indented blocks."""
    in_blocks = [line.removeprefix("$ ") for block in blocks(page, "console") for line in block.splitlines()]
    return in_blocks + re.findall(r"^ {4}((?:recall|pip) .*)$", page.read_text("utf-8"), re.MULTILINE)


def invoke(page: Path, line: str) -> None:
    result = CliRunner().invoke(app, shlex.split(line.removeprefix("recall"), comments=True))
    met = {0, 3} if "--keep-if" in line or "--require" in line else {0}  # 3: the model is not as good as the page wants it
    assert result.exit_code in met, f"{page.name}: {line}: {result.output} {result.exception}"


def understood(line: str) -> bool:
    """Whether the command accepts these arguments; nothing is run."""
    group = get_command(app)
    name, *words = shlex.split(line.removeprefix("recall"), comments=True)
    context = Context(group, info_name="recall")
    return group.get_command(context, name).make_context(name, words, parent=context) is not None


def test_commands_of_the_site_work(here):
    """All pages one after the other, in one folder: whatever a page needs besides models and rows, an earlier page makes.

    `tests/test_tutorial.py` plays the tutorial, in a folder of its own.
    """
    for name in ("sentiment", "french"):
        valid = [{**row, "prompt": f"{row['prompt']} Now."} for row in ROWS]
        write_rows(here / f"{name}-valid.jsonl", valid)
        write_rows(here / f"{name}-test.jsonl", [{**row, "prompt": f"{row['prompt']} Say it.", "choices": [" yes", " no"]} for row in ROWS])
    (here / "chatml.jinja").write_text(TEMPLATE)
    models = ", ".join(f"{{model: out/{name}, parameters: {{weight: 0.5}}}}" for name in ("sentiment", "french"))
    (here / "mergekit.yml").write_text(f"models: [{models}]\nmerge_method: task_arithmetic\nbase_model: base\n")
    first = [ROOT / "docs" / f"{name}.md" for name in ("index", "choosing", "statistics", "workspace", "reports")]
    ran, extras = 0, tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    for page in (*first, *(page for page in sorted((ROOT / "docs").rglob("*.md")) if page not in first and page.stem != "tutorial")):
        if page.stem == "index":
            (run,) = blocks(page, "yaml")
            (here / "run.yaml").write_text(run)
        if page.stem == "mergekit":
            shutil.rmtree(here / "merged")
        for line in commands(page):
            if line.startswith("pip install"):
                assert set(re.findall(r"recall-merge\[(\w+)\]", line)) <= set(extras)
            elif line.split()[0] in ELSEWHERE:
                continue
            elif line.startswith("recall bench benchmarks/"):  # hours of work: only its plan
                prepare_bench(here, line.split()[2])
                invoke(page, line.replace("DATA", "data").replace("MODEL", "base") + " --plan")
            elif "ray://" in line or line.startswith("recall push"):  # tests/test_cluster.py and tests/test_push.py run these
                assert understood(line)
            else:
                assert line.startswith("recall "), line
                invoke(page, line)
            ran += 1
    assert ran >= 25
    assert (here / "merged-report" / "index.html").is_file()


def prepare_bench(here: Path, name: str) -> None:
    """Copy the scenario, and write a few rows for each of its files."""
    (here / "benchmarks").mkdir(exist_ok=True)
    shutil.copy(ROOT / name, here / name)
    scenario = yaml.safe_load((here / name).read_text("utf-8"))
    for task in (*scenario["tasks"], *scenario["unseen"]):
        choices = {} if "metric" in task else {"choices": [" yes", " no"]}
        for key in ("train", "test"):
            if key in task:
                file = here / "data" / task[key]
                file.parent.mkdir(parents=True, exist_ok=True)
                write_rows(file, [{**row, "prompt": f"{task['name']} {key} {row['prompt']}", **choices} for row in ROWS])


def test_scenario_of_the_page_is_valid():
    (block,) = blocks(ROOT / "docs" / "bench.md", "yaml")
    Scenario.model_validate(yaml.safe_load(block))


def test_site_names_every_page_and_only_those():
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text("utf-8").replace("!!python/name:", ""))
    named = {path for entry in site["nav"] for path in entry.values()}
    assert named == {str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")}


def test_run_files_are_valid():
    files = sorted((ROOT / "configs").rglob("*.yaml"))
    assert len(files) >= 2
    for file in files:
        first, run = file.read_text("utf-8").splitlines()[0], load_run(file)
        assert first == f"# recall merge configs/{file.relative_to(ROOT / 'configs')}"
        assert run.method in METHODS | ALIASES


def test_run_page_lists_every_key():
    text = (ROOT / "docs" / "run.md").read_text("utf-8")
    listed = set(re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE))
    assert listed == set(MergeRun.model_fields)
    for block in blocks(ROOT / "docs" / "run.md", "yaml"):
        MergeRun.model_validate(yaml.safe_load(block))


@pytest.mark.parametrize("page", [*PAGES, ROOT / "SECURITY.md"], ids=lambda page: page.name)
def test_tests_named_in_a_page_exist(page):
    for file, name in re.findall(r"`(?:tests/)?(test_\w+\.py)(?:::(\w+))?`", page.read_text("utf-8")):
        test = ROOT / "tests" / file
        assert test.exists(), file
        assert f"def {name}" in test.read_text("utf-8"), f"{file}::{name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_have_targets(page):
    for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text("utf-8")):
        assert (page.parent / target).exists(), target


def test_architecture_page_names_every_module():
    text = (ROOT / "docs" / "architecture.md").read_text("utf-8").partition("## Rooms, module by module")[2].partition("\n## ")[0]
    named = set()
    for room, table in re.findall(r"\*\*([\w/]+)\*\*(.*?)(?=\*\*|\Z)", text, re.DOTALL):
        named |= {f"{room}/{name}" for name in re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)}
    modules = (path.relative_to(SOURCE).with_suffix("") for path in SOURCE.glob("*/**/*.py"))
    assert named == {str(module) for module in modules if not module.name.startswith("__")}


@pytest.mark.parametrize(("way", "most"), [("a row of samples to a merged tensor", 15), ("a training row to R", 25)])
def test_the_ways_of_data_pass_few_files(way, most):
    text = (ROOT / "docs" / "architecture.md").read_text("utf-8").partition(f"## The way of {way}\n")[2].partition("\n## ")[0]
    files = re.findall(r"^\| \d+ \| `([\w/]+\.py)` \|", text, re.MULTILINE)
    assert 10 <= len(files) == len(set(files)) <= most
    assert f"{len(files)} files" in text
    assert all((SOURCE / file).is_file() for file in files)
