"""A run file: what it may say, what is said back when it says something else, and where its paths are looked for."""

from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from recall_merge.maths.similarity import KERNELS
from recall_merge.merging.run import FromHiddenStates, RecallWeights, load_run
from recall_merge.runtime.errors import RunError
from recall_merge.runtime.sections import assign

LEAST = {"base": "org/base", "experts": [{"name": "math", "path": "org/math"}], "method": "linear"}


@pytest.fixture
def run(tmp_path):
    """`run(seed=3)`: what a file with these keys beside the least ones is read as; `None` leaves a key out."""

    def read(overrides=None, **keys):
        data = {key: value for key, value in (LEAST | keys).items() if value is not None}
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(data, sort_keys=False))
        return load_run(tmp_path / "run.yaml", overrides)

    return read


def test_the_least_that_a_run_says_and_its_defaults(run):
    found = run()
    assert (found.base, found.method, found.seed, found.weights, found.options) == ("org/base", "linear", 0, "uniform", {})
    assert [(entry.name, entry.path, entry.same_base) for entry in found.experts] == [("math", "org/math", False)]
    assert found.samples is None and found.vocabulary is None and found.skip == []
    assert (found.out.path, found.out.dtype, found.out.shard_size, found.out.overwrite) == (None, "auto", 5_000_000_000, False)


def test_the_run_of_the_design(tmp_path):
    text = """
    base: HuggingFaceTB/SmolLM2-135M-Instruct@v1
    experts:
      - {name: sentiment, path: out/sentiment}
      - {name: french,    path: out/french}
    samples: {path: data/french.jsonl, count: 20}
    method: recall
    options: {temperature: 1.0}
    out: {path: merged, dtype: bfloat16, shard_size: 5GB}
    seed: 0
    """
    (tmp_path / "run.yaml").write_text(text)
    found = load_run(tmp_path / "run.yaml")
    assert [entry.name for entry in found.experts] == ["sentiment", "french"]
    assert found.options == {"temperature": 1.0} and found.out.path == tmp_path / "merged"


def test_what_a_run_is_cannot_be_changed(run):
    with pytest.raises(ValidationError, match="frozen"):
        run().seed = 1


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("1.5mb", 1_500_000), (" 200 k ", 200_000), ("7B", 7), (1234, 1234), ("2TB", 2 * 10**12)]
)
def test_sizes(run, text, size):
    assert run(out={"path": "m", "shard_size": text}).out.shard_size == size


def test_weights_are_a_word_numbers_or_options(run):
    assert run(weights="uniform").weights == "uniform"
    assert run(weights=[0, 2.5]).weights == [0.0, 2.5]
    assert run(weights={"recall": {"kernel": "cka", "bandwidth": 0.5}}).weights == FromHiddenStates(
        recall=RecallWeights(kernel="cka", bandwidth=0.5)
    )
    assert run(weights={"recall": {}}).weights == FromHiddenStates(recall=RecallWeights())


FAULTS = {  # keys -> what is said of them, and how to mend it; (what, fix) more than once where more is wrong
    "a key misspelt": ({"methood": "linear"}, [("unknown key 'methood'", "did you mean 'method'? known: base, experts, method, options")]),
    "a key misspelt below": (
        {"samples": {"path": "x", "spliit": "t"}},
        [("unknown key 'samples.spliit'", "did you mean 'split'? known: path, split, config")],
    ),
    "a key misspelt in a list": (
        {"experts": [{"name": "a", "path": "b"}, {"name": "c", "pth": "d"}]},
        [("'experts.1.path' is missing", "add it"), ("unknown key 'experts.1.pth'", "did you mean 'path'? known: name, path")],
    ),
    "no base": ({"base": None}, [("'base' is missing", "add it")]),
    "no experts": ({"experts": None}, [("'experts' is missing", "add it")]),
    "an empty list": ({"experts": []}, [("'experts': List should have at least 1 item", "it is [] now")]),
    "a text for a list": ({"experts": "math"}, [("'experts': Input should be a valid list", "it is 'math' now")]),
    "an empty name": ({"experts": [{"name": "", "path": "b"}]}, [("'experts.0.name': String should have at least 1 char", "it is '' now")]),
    "a name twice": (
        {"experts": [{"name": "a", "path": "b"}, {"name": "a", "path": "c"}]},
        [("'experts': the name 'a' is taken twice", "")],
    ),
    "a name of ours": ({"experts": [{"name": "base", "path": "b"}]}, [("'experts': 'base' names the base", "")]),
    "a number out of range": (
        {"samples": {"path": "x", "count": 0}},
        [("'samples.count': Input should be greater than or equal to 1", "0 now")],
    ),
    "a size of nothing": ({"out": {"shard_size": 0}}, [("'out.shard_size': Input should be greater than 0", "it is 0 now")]),
    "a size in words": ({"out": {"shard_size": "large"}}, [("'out.shard_size': Input should be a valid integer", "it is 'large' now")]),
    "a dtype of none": (
        {"out": {"dtype": "int8"}},
        [("'out.dtype': Input should be 'auto', 'float32', 'bfloat16' or 'float16'", "'int8' now")],
    ),
    "a word for weights": ({"weights": "equal"}, [("'weights': Input should be 'uniform'", "it is 'equal' now")]),
    "weights below 0": ({"weights": [1, -1]}, [("'weights.1': Input should be greater than or equal to 0", "it is -1 now")]),
    "weights that are no numbers": ({"weights": [float("nan")]}, [("'weights.0': Input should be a finite number", "it is nan now")]),
    "a temperature of 0": (
        {"weights": {"recall": {"temperature": 0}}},
        [("'weights.recall.temperature': Input should be greater than 0", "it is 0 now")],
    ),
    "an endless temperature": (
        {"weights": {"recall": {"temperature": float("inf")}}},
        [("'weights.recall.temperature': Input should be a finite number", "inf")],
    ),
    "an unknown kernel, and another fault beside it": (
        {"weights": {"recall": {"kernel": "rbff", "temperature": 0}}},
        [
            ("'weights.recall.kernel': there is no kernel 'rbff'", f"did you mean 'rbf'? known: {', '.join(KERNELS)}"),
            ("'weights.recall.temperature': Input should be greater than 0", "it is 0 now"),
        ],
    ),
    "threads of none": ({"threads": 0}, [("'threads': Input should be greater than or equal to 1", "it is 0 now")]),
    "two at once": (
        {"seed": "x", "methood": 1},
        [("'seed': Input should be a valid integer", "'x' now"), ("unknown key 'methood'", "'method'?")],
    ),
}


@pytest.mark.parametrize("case", FAULTS)
def test_faults_are_told_with_their_place_and_a_fix(run, tmp_path, case):
    keys, expected = FAULTS[case]
    with pytest.raises(RunError) as error:
        run(**keys)
    assert len(error.value.faults) == len(expected)
    for fault, (what, fix) in zip(error.value.faults, expected, strict=True):
        assert what in fault.what and fix in fault.fix
        assert fault.where == str(tmp_path / "run.yaml")


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("base: [", "this is not readable YAML"),
        ("a: b: c", "this is not readable YAML"),
        ("!!python/object/apply:os.getcwd []", "this is not readable YAML"),
        ("\x00", "this is not readable YAML"),
        ("", "a run file must hold a mapping of keys to values"),
        ("- base", "a run file must hold a mapping of keys to values"),
        ("base", "a run file must hold a mapping of keys to values"),
    ],
)
def test_files_that_are_no_run(tmp_path, text, what):
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(RunError) as error:
        load_run(tmp_path / "run.yaml")
    [fault] = error.value.faults
    assert fault.what.startswith(what) and fault.where == str(tmp_path / "run.yaml") and "docs/run.md" in fault.fix
    assert "\n" not in fault.what


def test_a_file_that_is_not_there_or_no_text(tmp_path):
    with pytest.raises(RunError, match=r"this run file does not exist\n  where: .*none.yaml\n  fix: give the path of a YAML file"):
        load_run(tmp_path / "none.yaml")
    (tmp_path / "run.yaml").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(RunError, match="this is not readable YAML"):
        load_run(tmp_path / "run.yaml")
    with pytest.raises(RunError, match="this is not readable YAML"):
        load_run(tmp_path)


def test_paths_are_meant_from_where_the_file_lies(run, tmp_path, monkeypatch):
    elsewhere = tmp_path / "elsewhere"
    for folder in ("models/base", "models/math", "elsewhere"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "rows.jsonl").touch()
    monkeypatch.chdir(elsewhere)
    experts = [{"name": "math", "path": "models/math"}, {"name": "code", "path": "org/code@v1"}]
    found = run(base="models/base", experts=experts, samples={"path": "rows.jsonl"}, out={"path": "merged"})
    assert found.base == str(tmp_path / "models/base")
    assert [entry.path for entry in found.experts] == [str(tmp_path / "models/math"), "org/code@v1"]
    assert found.samples.path == str(tmp_path / "rows.jsonl")
    assert found.out.path == tmp_path / "merged"
    assert run(out={"path": str(elsewhere / "merged")}).out.path == elsewhere / "merged"


def test_overrides_win_and_are_checked_as_well(run):
    found = run(
        {"seed": 5, "options.density": 0.3, "out.dtype": "float16", "out.path": "here"}, seed=1, options={"density": 0.1, "sign": 1}
    )
    assert (found.seed, found.options, found.out.dtype, found.out.path) == (5, {"density": 0.3, "sign": 1}, "float16", Path("here"))
    with pytest.raises(RunError, match=r"unknown key 'out\.dtyp'") as error:
        run({"out.dtyp": "float16"})
    assert "did you mean 'dtype'?" in str(error.value)
    with pytest.raises(RunError, match=r"--set method\.name: 'method' is not a mapping"):
        run({"method.name": "x"})


def test_assign_makes_the_mappings_that_it_needs():
    data = {"a": 1}
    assign(data, "b.c.d", 2)
    assert data == {"a": 1, "b": {"c": {"d": 2}}}
