"""Reports as a reader meets them: opened from disk in a browser, at two widths and in two themes, by pointer and keyboard."""

import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
from typer.testing import CliRunner

from browser import browser, chromium, messages, requests, show
from recall_merge import MergeRun, merge
from recall_merge.cli.app import app
from recall_merge.cli.report import write as report
from recall_merge.continual.workspace import rollback
from recall_merge.maths.weights import softmax_weights
from recall_merge.report import merge_charts, workspace_charts
from recall_merge.report.anatomy import Models, anatomy
from recall_merge.report.page import Cell, Figure, Item, Items, Matrix, Page, Section, Table, Text, json_in_html, render
from recall_merge.runtime.errors import CheckpointError, DataError, OutputError, ResultError, RunError
from recall_merge.runtime.progress import Silent
from recall_merge.runtime.sealed import read_sealed
from tiny import fine_tuned, lora, write_rows
from workspaces import make_workspace, teach, write_tasks

EXAMPLES = Path(__file__).parents[1] / "docs" / "examples"
needs_chromium = pytest.mark.skipif(chromium() is None, reason="Chromium is not installed: apt-get install chromium chromium-driver")
ROWS = [{"prompt": f"is the fox {word}?", "completion": " yes"} for word in ("quick", "lazy", "good", "bad", "brown")]
HOSTILE = (
    "</script><script>window.hacked=1</script>",
    "<!--<img src=x onerror=window.hacked=1>",
    "\"quotes\" and \\back\\ 'slashes' ${window.hacked=1}",
    "שלום עולם مرحبا",
    "x" * 10_000,
    "🦊 emoji\u2028line {{ 7 * 7 }}",
)


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    with browser(tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.fixture(scope="module")
def workspace(bases, tmp_path_factory):
    """Two stages, a way back to the first, and a branch there."""
    folder = tmp_path_factory.mktemp("report")
    data = write_tasks(folder)
    space = make_workspace(folder / "ws", bases("llama"), scoring__words=True, training__protect={"strength": 1e3})
    teach(space, data, "a")
    teach(space, data, "b")
    rollback(space, 1)
    teach(space, data, "c", method="aligned")
    return space


@pytest.fixture(scope="module")
def merged(bases, tmp_path_factory):
    """A merge whose experts are called by hostile names."""
    folder = tmp_path_factory.mktemp("merged")
    experts = []
    for number, name in enumerate((*HOSTILE[:4], HOSTILE[5])):
        path = lora(bases("llama"), folder / f"expert{number}", seed=number, target_modules=["q_proj", "up_proj"])
        experts.append({"name": name, "path": str(path)})
    rows = write_rows(folder / "rows.jsonl", ROWS)
    run = MergeRun(
        base=str(bases("llama")), experts=experts, method="recall", samples={"path": str(rows), "count": 2}, out={"path": folder / "out"}
    )
    merge(run)
    return folder


def write_bench(folder: Path) -> Path:
    """Tables as `recall bench` writes them: two methods on two orders, one of them unfinished."""
    folder.mkdir()
    scores = ["kind,method,seed,order,stage,learnt,task,seen,metric,score,stderr,n"]
    metrics = "average_performance,learning_accuracy,backward_transfer,forgetting,forward_transfer,retention,unseen_delta"
    numbers = [f"kind,method,seed,order,{metrics},item_error,seconds"]
    for method, shift in (("uniform", 0.0), ("tsv <b>", 0.1)):
        for order in ("a > b", "b > a"):
            where = f"multi-model,{method},0,{order}"
            for stage in range(3):
                for task in ("a", "b", "new"):
                    seen = "true" if task in order.split(" > ")[:stage] else "false"
                    scores.append(f"{where},{stage},,{task},{seen},acc,{0.3 + 0.1 * stage + shift},0.05,48")
            numbers.append(f"{where},{0.5 + shift},,-0.1,0.1,,{0.6 + shift},{0.02 - shift},0.03,{100 + 900 * shift}")
    (folder / "scores.csv").write_text("\n".join(scores) + "\n")
    (folder / "numbers.csv").write_text("\n".join(numbers) + "\n")
    return folder


@pytest.fixture(scope="module")
def pages(workspace, merged, bases, tmp_path_factory):
    """The three kinds of report."""
    folder = tmp_path_factory.mktemp("pages")
    experts = {name: str(merged / f"expert{number}") for number, name in enumerate((*HOSTILE[:4], HOSTILE[5]))}
    given = {"models": {"base": str(bases("llama")), **experts}, "samples": merged / "rows.jsonl"}
    return {
        "workspace": report(workspace, out=folder / "workspace", text=True),
        "merge": report(merged / "out", out=folder / "merge", text=True, **given),
        "bench": report(write_bench(folder / "bench"), out=folder / "bench-report"),
    }


def serious(driver) -> list[str]:
    """What axe-core finds that keeps people out."""
    found = find_spec("axe_core_python")
    assert found is not None and found.origin is not None
    driver.execute_script((Path(found.origin).parent / "axe.min.js").read_text("utf-8"))
    violations = driver.execute_async_script("axe.run(document).then((found) => arguments[0](found.violations))")
    return [f"{one['id']}: {one['nodes'][0]['html']}" for one in violations if one["impact"] in {"serious", "critical"}]


@needs_chromium
@pytest.mark.parametrize("kind", ["workspace", "merge", "bench"])
def test_page_draws_all_it_has_asks_for_nothing_and_fits(kind, pages, driver):
    page = pages[kind].page
    assert page.stat().st_size < 5_000_000
    for width, dark in ((400, True), (1600, False)):
        show(driver, page, width=width, dark=dark)
        assert [one for one in requests(driver) if not one.startswith("data:")] == [page.resolve().as_uri()]
        assert messages(driver) == []
        drawn = driver.execute_script(
            "return [...document.querySelectorAll('.plot')].map((box) => box.querySelectorAll('[class*=role-mark] path').length)"
        )
        assert drawn and all(drawn)
        assert driver.execute_script("return document.documentElement.scrollWidth") <= width
        assert driver.execute_script("return window.hacked") is None
        too_wide = (
            "return [...document.querySelectorAll('.plot svg')].filter((s) => s.getAttribute('width') > s.parentElement.clientWidth).length"
        )
        assert driver.execute_script(too_wide) == 0
        assert cut(driver) == []
        assert serious(driver) == []


@needs_chromium
@pytest.mark.parametrize("page", sorted(EXAMPLES.glob("*.html")), ids=lambda page: page.stem)
def test_example_pages_of_the_site_are_drawn_whole(page, driver):
    assert page.stat().st_size < 2_000_000
    for width, dark in ((400, False), (1600, True)):
        show(driver, page, width=width, dark=dark)
        assert [one for one in requests(driver) if not one.startswith("data:")] == [page.resolve().as_uri()]
        assert messages(driver) == []
        assert driver.execute_script("return document.documentElement.scrollWidth") <= width
        assert cut(driver) == []
        shortened = "return [...document.querySelectorAll('.plot text')].map((one) => one.textContent).filter((text) => text.endsWith('…'))"
        assert driver.execute_script(shortened) == []


def cut(driver) -> list[str]:
    """Words of charts that reach beyond the room of their chart."""
    return driver.execute_script(
        "return [...document.querySelectorAll('.plot')].flatMap((plot) => { const room = plot.getBoundingClientRect();"
        "  return [...plot.querySelectorAll('svg text')].filter((one) => { const box = one.getBoundingClientRect();"
        "    return getComputedStyle(one).opacity > 0 && box.width"
        "      && (box.left < room.left - 1 || box.right > room.right + 1 || box.top < room.top - 1 || box.bottom > room.bottom + 1); })"
        "  .map((one) => one.textContent); })"
    )


@needs_chromium
def test_cell_of_r_shows_its_items_by_pointer_and_by_keyboard(pages, driver):
    show(driver, pages["workspace"].page)
    links = driver.find_elements("css selector", ".matrix td a")
    link = next(
        one
        for one in links
        if driver.execute_script("return document.querySelectorAll(arguments[0] + ' details').length", one.get_dom_attribute("href"))
    )
    panel = driver.find_element("css selector", link.get_dom_attribute("href"))
    assert not panel.is_displayed()
    link.click()
    assert panel.is_displayed()
    item = panel.find_element("css selector", "details dl")
    assert "is a" in item.text or "is b" in item.text or "is c" in item.text
    driver.execute_script("location.hash = ''")
    assert not panel.is_displayed()
    link.send_keys("\ue007")  # Enter
    assert panel.is_displayed()


@needs_chromium
def test_sliders_draw_the_weights_that_a_merge_would_have(pages, merged, driver):
    import torch

    show(driver, pages["merge"].page)
    record = json.loads((merged / "out" / "record.json").read_text())
    similarity = torch.tensor(record["similarity"]["rows"], dtype=torch.float64)
    sliders = driver.find_elements("css selector", "#explore-weights input[type=range]")
    assert len(sliders) == 3
    before = lines(driver)
    driver.execute_script("arguments[0].value = 0.1; arguments[0].dispatchEvent(new Event('input'))", sliders[0])
    driver.execute_script("arguments[0].value = 2; arguments[0].dispatchEvent(new Event('input'))", sliders[2])
    driver.execute_async_script("document.querySelector('#explore-weights .plot').view.runAsync().then(() => arguments[0]())")
    assert lines(driver) != before
    rows = driver.execute_script(
        "const view = document.querySelector('#explore-weights .plot').view;"
        "return Object.keys(view._runtime.data).map((name) => view.data(name)).find((rows) => rows?.[0]?.weight !== undefined)"
        ".map((row) => [row.layer, row.model, row.weight])"
    )
    wanted = 2 * softmax_weights(similarity, temperature=0.1)
    names = record["similarity"]["experts"]
    assert len(rows) == similarity.numel()
    for layer, model, weight in rows:
        assert weight == pytest.approx(float(wanted[layer, names.index(model)]), abs=1e-9)


def lines(driver) -> list[str]:
    return driver.execute_script(
        "return [...document.querySelectorAll('#explore-weights .mark-line path')].map((path) => path.getAttribute('d'))"
    )


@needs_chromium
def test_words_of_users_are_shown_and_never_run(tmp_path, driver):
    layers = {"experts": list(HOSTILE), "layers": [0, 1, 2], "rows": [[0.1 * n + 0.1 for n in range(6)]] * 3}
    points = [{"at": at, "task": name, "score": 0.5, "low": 0.4, "high": 0.6} for at, name in enumerate(HOSTILE)]
    jobs = [{"row": n, "column": 0, "score": 0.5, "shown": "0.5"} for n in range(6)]
    flow = [{"at": n, "task": HOSTILE[n], "kind": "right to wrong", "share": -0.5, "items": 1} for n in range(6)]
    stages = [{"at": n, "lane": 0, "name": name, "now": n == 5} for n, name in enumerate(HOSTILE)]
    drawn = [
        merge_charts.similarity_and_weights(layers, layers),
        merge_charts.explore(layers, {}),
        workspace_charts.curves(points, HOSTILE, HOSTILE),
        workspace_charts.matrix(jobs, HOSTILE, HOSTILE[:1]),
        workspace_charts.flow(flow, HOSTILE),
        workspace_charts.lineage(stages, [{"at": 5, "lane": 0, "to_at": 0, "to_lane": 0, "back": True}]),
    ]
    figures = [Figure(f"f{n}", HOSTILE[0], HOSTILE[1], chart, HOSTILE, [HOSTILE]) for n, chart in enumerate(drawn)]
    items = [Item(text, "right", "wrong", True, text, text, text, text) for text in HOSTILE]
    matrix = Matrix(
        HOSTILE[0],
        HOSTILE,
        [(text, [Cell("0.5", 0.5, "items-1")] * 6) for text in HOSTILE],
        [Items("items-1", HOSTILE[0], HOSTILE[1], items)],
    )
    blocks = [*figures, matrix, Table(HOSTILE[0], HOSTILE, [HOSTILE]), *map(Text, HOSTILE)]
    (tmp_path / "page.html").write_text(
        render(Page(HOSTILE[0], HOSTILE[1], HOSTILE, [Section("s", HOSTILE[2], blocks)], [HOSTILE[:2]])), "utf-8"
    )
    for width in (400, 1600):
        show(driver, tmp_path / "page.html", width=width)
        assert messages(driver) == []
        assert driver.execute_script("return window.hacked") is None
        assert driver.execute_script("return document.scripts.length") == 2 + len(figures)
        assert driver.execute_script("return document.documentElement.scrollWidth") <= width
        shown = driver.execute_script("return document.querySelector('main').textContent")
        assert all(text in shown for text in HOSTILE)
        assert serious(driver) == []


def test_a_script_that_the_page_does_not_know_is_not_run():
    text = render(Page("t", "s", [], []))
    policy = text.split('Content-Security-Policy" content="')[1].split('"')[0]
    assert "default-src &#39;none&#39;" in policy and "unsafe-eval" not in policy and "script-src &#39;sha256-" in policy


def test_json_in_a_page_is_still_the_same_json():
    for text in HOSTILE:
        written = json_in_html({"text": text})
        assert "<" not in written and ">" not in written and "\u2028" not in written
        assert json.loads(written) == {"text": text}


def test_each_chart_is_there_as_png_and_svg_with_its_title(pages):
    for made in pages.values():
        assert len(made.charts) >= 4
        for path in made.charts:
            data = path.read_bytes()
            assert data.startswith(b"\x89PNG") if path.suffix == ".png" else b"<svg" in data
    assert {path.stem for path in pages["bench"].charts} >= {
        "multi-model-ranks",
        "multi-model-retention-unseen",
        "multi-model-cost-quality",
    }


def test_the_page_tells_how_far_training_moved_earlier_answers(workspace, pages, tmp_path):
    record = workspace / "experts" / "3-c" / "record.json"
    protection = json.loads(record.read_text())["protection"]
    page = pages["workspace"].page.read_text("utf-8")
    assert "How far training moved earlier answers" in page and f"{protection['answers']['a']:.3%}" in page
    assert any(path.name == "moved-chart.svg" for path in pages["workspace"].charts)
    copy = tmp_path / "copy"
    shutil.copytree(workspace, copy)
    damaged = json.loads(record.read_text()) | {"protection": protection | {"moved": {"a": ["much"]}}}
    (copy / "experts" / "3-c" / "record.json").write_text(json.dumps(damaged))
    with pytest.raises(CheckpointError, match="what the record tells of protection is damaged"):
        report(copy, out=tmp_path / "report")


def test_words_are_shown_only_if_asked_for(workspace, tmp_path, pages):
    silent = report(workspace, out=tmp_path / "silent").page.read_text("utf-8")
    assert "is c 1" not in silent
    assert "<dt>prompt</dt>" not in silent and "<dt>after</dt>" not in silent
    assert "is c 1" in pages["workspace"].page.read_text("utf-8")


def test_rows_that_have_changed_are_not_shown_as_the_ones_scored(workspace, tmp_path):
    copy = shutil.copytree(workspace.parent, tmp_path / "copy", ignore=shutil.ignore_patterns("*-report"))
    state = json.dumps(read_sealed(copy / "ws" / "workspace.json")).replace(str(workspace.parent), str(copy))
    (copy / "ws" / "workspace.json").write_text(state)
    for file in copy.glob("*.jsonl"):
        file.write_text(file.read_text().replace("is ", "was "))
    text = report(copy / "ws", out=tmp_path / "r", text=True).page.read_text("utf-8")
    assert "<dt>after</dt>" in text  # what models said is kept
    assert "<dt>prompt</dt>" not in text


def test_anatomy_by_hand(bases, tmp_path):
    import torch

    from tiny import load_tensors

    base = bases("llama")
    one, two = (fine_tuned(base, tmp_path / name, seed=seed) for seed, name in enumerate("xy", start=1))
    run = MergeRun(
        base=str(base),
        experts=[{"name": "x", "path": str(one)}, {"name": "y", "path": str(two)}],
        method="linear",
        out={"path": tmp_path / "out"},
    )
    merge(run)
    tables = anatomy(tmp_path / "out", Models(base, {"x": one, "y": two}, {}), tmp_path / "keep.json", Silent())
    start, x, y, m = (load_tensors(folder) for folder in (base, one, two, tmp_path / "out"))
    block = [name for name in start if ".layers.0." in name]

    def flat(tensors):
        return torch.cat([(tensors[name] - start[name]).double().flatten() for name in block])

    whole = torch.cat([start[name].double().flatten() for name in block]).norm()
    sizes = [float(flat(tensors).norm() / whole) for tensors in (x, y, m)]
    assert tables["sizes"]["experts"] == ["x", "y", "the merge"]
    assert tables["sizes"]["rows"][1] == pytest.approx(sizes, rel=1e-5)
    assert tables["cosines"]["rows"][1] == pytest.approx([float(torch.nn.functional.cosine_similarity(flat(x), flat(y), dim=0))], abs=1e-6)
    assert tables["missed"]["experts"] == []
    kept = read_sealed(tmp_path / "keep.json")
    kept["tables"]["sizes"]["rows"][1] = ["kept"]
    (tmp_path / "keep.json").write_text(json.dumps(kept))
    again = anatomy(tmp_path / "out", Models(base, {"x": one, "y": two}, {}), tmp_path / "keep.json", Silent())
    assert again["sizes"]["rows"][1] == ["kept"]


def test_a_merge_that_is_the_expert_misses_nothing_of_it(workspace, tmp_path):
    tables = json.loads((report(workspace, out=tmp_path / "r").page.parent / "anatomy.json").read_text())["tables"]
    assert tables["missed"]["experts"] == ["a", "c"]
    assert all(value is None or 0 <= value < 1.5 for row in tables["missed"]["rows"] for value in row)
    assert any(value is not None for row in tables["missed"]["rows"] for value in row)


def test_what_is_in_the_way_is_told_and_left(workspace, merged, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years")
    with pytest.raises(OutputError, match="is no report that recall-merge made, and is not replaced"):
        report(workspace, out=tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years"
    with pytest.raises(OutputError, match="overwrite the folder that it describes"):
        report(workspace, out=workspace.parent)
    with pytest.raises(RunError, match="nothing here that a report can show"):
        report(tmp_path / "mine")
    with pytest.raises(RunError, match="already names its models"):
        report(workspace, models={"base": "x"}, out=tmp_path / "r")
    other = write_rows(tmp_path / "other.jsonl", ROWS[:2])
    with pytest.raises(ResultError, match="not the rows"):
        report(merged / "out", text=True, samples=other, out=tmp_path / "r")
    empty = write_bench(tmp_path / "bench")
    (empty / "numbers.csv").write_text((empty / "numbers.csv").read_text().splitlines()[0] + "\n")
    with pytest.raises(DataError, match="no trial"):
        report(empty, out=tmp_path / "r")
    assert not (tmp_path / "r").exists()


def test_a_result_alone_tells_what_is_missing(merged, tmp_path):
    text = report(merged / "out", out=tmp_path / "r").page.read_text("utf-8")
    assert "is not shown" in text
    assert "--base FOLDER" in text


def test_command(workspace, tmp_path):
    done = CliRunner().invoke(app, ["report", str(workspace), "--out", str(tmp_path / "r"), "--json"])
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert Path(told["page"]).is_file() and all(Path(chart).is_file() for chart in told["charts"])
    again = CliRunner().invoke(app, ["report", str(workspace), "--out", str(tmp_path / "r"), "-q"])
    assert again.exit_code == 0 and "charts as PNG and SVG" in again.output
