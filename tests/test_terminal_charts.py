"""What commands draw in a terminal, and that what they pipe is plain: seen through the escape codes that are printed."""

import re
import shutil
from io import StringIO
from types import SimpleNamespace

import pytest
from rich.console import Console
from typer.testing import CliRunner

from recall_merge.bench.results import NUMBERS, Results
from recall_merge.cli import bench, terminal_charts
from recall_merge.cli.app import app
from tiny import fine_tuned, write_rows
from workspaces import make_workspace, teach, write_tasks

ROWS = [{"prompt": f"is the fox {word}?", "completion": " yes"} for word in ("quick", "lazy", "good", "bad")]
ESCAPE = re.compile(r"\x1b\[[0-9;]*m")
COLOUR = re.compile(r"\x1b\[[0-9;]*[34]8;2;")


@pytest.fixture
def terminal(monkeypatch):
    """Somebody watches: a terminal of 80 columns that shows all colours."""
    for name, value in {"FORCE_COLOR": "1", "COLORTERM": "truecolor", "TERM": "xterm-256color", "COLUMNS": "80"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("NO_COLOR", raising=False)


@pytest.fixture
def piped(monkeypatch):
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)


def printed(*words: str) -> str:
    result = CliRunner().invoke(app, [*words])
    assert result.exit_code == 0, f"{result.output} {result.exception}"
    return result.stdout


def fits(text: str, columns: int = 80) -> bool:
    return all(len(line) <= columns for line in ESCAPE.sub("", text).splitlines())


@pytest.fixture(scope="module")
def world(bases, tmp_path_factory):
    """Two experts and a run of them; and a workspace of two stages."""
    folder = tmp_path_factory.mktemp("terminal_charts")
    for seed, name in enumerate("ab"):
        fine_tuned(bases("llama"), folder / name, seed=seed + 1)
    write_rows(folder / "rows.jsonl", ROWS)
    experts = "\n".join(f"  - {{name: {name}, path: {folder / path}}}" for path, name in (("a", '"[red]a[/red]"'), ("b", '"b\\e[2J"')))
    run = f"base: {bases('llama')}\nexperts:\n{experts}\nmethod: recall\nsamples: {{path: {folder / 'rows.jsonl'}, count: 2}}\n"
    (folder / "run.yaml").write_text(run)
    data = write_tasks(folder)
    space = make_workspace(folder / "ws", bases("llama"))
    teach(space, data, "a")
    teach(space, data, "b")
    yield folder
    shutil.rmtree(folder)


def test_weights_piped_are_plain(world, piped):
    text = printed("weights", str(world / "run.yaml"))
    assert "\x1b" not in text and not set(terminal_charts.BARS) & set(text)
    assert "w [red]a[/red]" in text and "b·[2J" in text  # brackets are no markup, and a control character does not reach a terminal
    assert re.search(r"^ 0 to 3 |^ 0 +\d\.\d{4} +\d\.\d{4} +\d\.\d{4}", text, re.MULTILINE)


def test_weights_on_a_terminal_are_seen_at_once(world, terminal):
    text = printed("weights", str(world / "run.yaml"))
    assert COLOUR.search(text) and "\x1b[2J" not in text and fits(text)
    shown = ESCAPE.sub("", text)
    for title, layers in (("similarity to the newest", 3), ("weights", 4)):
        strip = shown[shown.index(f"{title}: ") :].splitlines()
        assert strip[1].startswith("[red]a[/red] ")
        assert sum(letter in terminal_charts.BARS for letter in strip[1]) == layers
        assert strip[3].split() == ["layer", "0", str(layers - 1)]
    assert "an even share" in shown


def test_no_color_is_honoured_and_the_bars_still_tell(world, terminal, monkeypatch):
    coloured = printed("weights", str(world / "run.yaml"))
    monkeypatch.setenv("NO_COLOR", "1")
    text = printed("weights", str(world / "run.yaml"))
    assert not COLOUR.search(text)
    assert ESCAPE.sub("", text) == ESCAPE.sub("", coloured)


def test_status_piped_and_on_a_terminal(world, piped, monkeypatch, request):
    plain = printed("status", str(world / "ws"))
    assert "\x1b" not in plain and "base to now" not in plain
    rows = dict(re.findall(r"^ (0 base|1 a|2 b|own expert) +(.*)$", plain, re.MULTILINE))
    assert set(rows) == {"0 base", "1 a", "2 b", "own expert"}
    request.getfixturevalue("terminal")
    text = printed("status", str(world / "ws"))
    assert COLOUR.search(text)
    shown = ESCAPE.sub("", text)
    for name, numbers in rows.items():
        assert [word for line in shown.splitlines() if line.startswith(f" {name} ") for word in line.split()][-2:] == numbers.split()
    (bars,) = re.findall(r"^ base to now +(\S+ *\S*) +(\S+)", shown, re.MULTILINE)
    assert set("".join(bars)) <= set(terminal_charts.BARS + " ")


def bench_results(folder, tasks) -> Results:
    """Two methods: one of three trials on all tasks, one of a single trial on one of them."""
    from pandas import DataFrame

    scores, numbers = [], []
    for method, seeds, learnt in (("aligned [b]", 3, tasks), ("uniform", 1, tasks[:1])):
        for seed in range(seeds):
            trial = {"kind": "multi-model", "method": method, "seed": seed, "order": " > ".join(learnt)}
            numbers.append(trial | {"average_performance": 0.5, "backward_transfer": 0.5, "retention": 0.5})
            value = 0.25 + 0.031 * (seed - 1) if seeds > 1 else 0.75
            scores += [trial | {"stage": len(learnt), "task": task, "seen": True, "score": value} for task in learnt]
    return Results(folder, DataFrame(scores), DataFrame(numbers).reindex(columns=list(NUMBERS)))


def test_bench_shows_methods_against_tasks_with_their_spread(tmp_path, piped, capsys, request):
    results = bench_results(tmp_path, [f"task{number}" for number in range(9)])
    bench._show(results, as_json=False)
    plain = capsys.readouterr().out
    assert "\x1b" not in plain
    (line,) = re.findall(r"^ method +task0.*$", plain, re.MULTILINE)  # one table, however wide
    assert "task8" in line
    assert plain.count("0.250 ± 0.031") == 9 and re.search(r"^ uniform +0\.750 +- ", plain, re.MULTILINE)
    request.getfixturevalue("terminal")
    bench._show(results, as_json=False)
    text = capsys.readouterr().out
    shown = ESCAPE.sub("", text)
    assert COLOUR.search(text) and fits("\n".join(line for line in text.splitlines() if "summary.md" not in line))
    assert len(re.findall(r"^ method +task", shown, re.MULTILINE)) == 3  # columns that do not fit stand below
    assert shown.count("0.250 ± 0.031") == 9


def test_strips_of_many_layers_and_long_names_fit(terminal):
    names = ["x" * 500, "🦊שלום\u202e", "tab\tand\nline"]
    rows = [[0.1 * number + 0.2 + layer / 1000 for number in range(3)] for layer in range(130)]
    table = {"experts": names, "layers": list(range(130)), "rows": rows}
    console = Console(force_terminal=True, width=80, record=True, file=StringIO(), color_system="truecolor")
    console.print(terminal_charts.strips("weights", table, 80, middle=1 / 3), soft_wrap=True)
    shown = console.export_text()
    assert fits(shown) and "each bar is 4 layers" in shown and "\u202e" not in shown and "tab·and·line" in shown
    assert "0.200 to 0.329" in shown


def test_where_bars_cannot_be_shown_they_are_not():
    ascii_only = SimpleNamespace(is_terminal=True, options=SimpleNamespace(ascii_only=True))
    assert not terminal_charts.is_watched(ascii_only)


def test_ink_can_be_read_on_every_colour():
    """WCAG's contrast of at least 4.5."""

    def luminance(colour: str) -> float:
        channels = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    for colours in (terminal_charts.VIRIDIS, terminal_charts.DIVERGING):
        for step, colour in enumerate(colours):
            ink, _, ground = terminal_charts.tint((step + 0.5) / len(colours), colours).split()
            assert ground == colour
            light, dark = sorted((luminance(colour), luminance(ink)), reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= 4.5
