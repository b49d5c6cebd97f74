"""The library page in a real notebook kernel: every block runs, results show themselves as tables, and long work as bars."""

import re
import shutil
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from recall_merge.runtime.notebook import html_table, is_notebook, shaded
from test_docs import ROWS, blocks
from tiny import fine_tuned, write_rows

PAGE = Path(__file__).parents[1] / "docs" / "api.md"


@pytest.fixture(scope="module")
def cells(llama, tmp_path_factory):
    """The blocks of the page, as cells that were run."""
    folder = tmp_path_factory.mktemp("notebook")
    shutil.copytree(llama, folder / "base")
    for seed, name in enumerate(("sentiment", "french")):
        fine_tuned(folder / "base", folder / "out" / name, seed=seed + 1)
        for split in ("", "-valid", "-test"):
            answers = {} if not split else {"choices": [" yes", " no"]}
            write_rows(folder / f"{name}{split}.jsonl", [{**row, "prompt": row["prompt"] + split, **answers} for row in ROWS])
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(block) for block in blocks(PAGE, "python")])
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(folder)}}).execute()
    return notebook.cells


def shown(cell) -> list[str]:
    """What a cell shows as HTML, in order."""
    return [output["data"]["text/html"] for output in cell.outputs if "text/html" in output.get("data", {})]


def test_results_show_themselves(cells):
    tables = [html for cell in cells for html in shown(cell) if "<table>" in html]
    captions = [re.search("<caption[^>]*>([^<]*)", table)[1] for table in tables]
    assert captions[:2] == ["merge weights w, similarity S to the newest", "scores, from 0 to 1"]
    assert captions[2].startswith("chosen: ") and captions[3].startswith("R: scores by stage and task. average performance")
    assert "<th>w sentiment</th><th>w french</th><th>S sentiment</th>" in tables[0]
    assert all("rgba(" in table for table in (tables[0], tables[2], tables[3]))


def test_bars_disappear_when_their_work_is_done(cells):
    bars = [output for output in cells[0].outputs if output.output_type == "display_data"]
    assert bars  # one for each stage, emptied at its end
    assert all(bar["data"]["text/html"] == "" for bar in bars)


def test_text_of_users_is_escaped():
    table = html_table("<b>", ["<i>"], [["a & b"], shaded([None])])
    assert "<b>" not in table and "<i>" not in table and "a &amp; b" in table
    assert not is_notebook()
