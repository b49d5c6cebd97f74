"""What the package claims to run with is what its tests run with; and the private parts of libraries that it uses exist."""

import ast
import importlib
import inspect
import sys
import tomllib
from importlib.metadata import packages_distributions, requires, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
PINS = {
    canonicalize_name(name): Version(version)
    for name, _, version in (line.partition("==") for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines() if "==" in line)
    if name.replace("-", "").replace("_", "").isalnum()
}
CALENDAR = {"regex"}  # versions are days, and promise nothing about what they break
USED = [Requirement(word) for word in PROJECT["dependencies"]]
USED += [Requirement(word) for extra, words in PROJECT["optional-dependencies"].items() if extra != "dev" for word in words]


@pytest.mark.parametrize("requirement", [used for used in USED if used.name != "recall-merge"], ids=str)
def test_a_range_has_two_ends_and_holds_the_version_that_is_tested(requirement):
    assert PINS[canonicalize_name(requirement.name)] in requirement.specifier
    operators = {bound.operator for bound in requirement.specifier}
    assert operators >= ({">="} if requirement.name in CALENDAR else {">=", "<"})


HOST = {"IPython"}  # that a notebook's kernel brings, where alone it is imported
EXTRA_OF_ROOM = {"training": "train", "evaluation": "eval", "report": "report", "runtime": "cluster"}


def imported(file: Path) -> set[str]:
    """The packages that a module imports, wherever in it, but the standard library, this package and its host."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(str(node.module).partition(".")[0])
    return found - sys.stdlib_module_names - {"recall_merge"} - HOST


def declared(extra: str | None) -> set[str]:
    """The packages that are installed with an extra: those that are declared, and what these themselves require."""
    words = PROJECT["dependencies"] + (PROJECT["optional-dependencies"][extra] if extra else [])
    own = {Requirement(word).name for word in words}
    theirs = (Requirement(word) for name in own for word in requires(name) or ())
    own |= {each.name for each in theirs if each.marker is None or each.marker.evaluate({"extra": ""})}
    return {canonicalize_name(name) for name in own}


@pytest.mark.parametrize("room", sorted(path.parent.name for path in (ROOT / "src" / "recall_merge").glob("*/__init__.py")))
def test_what_a_room_imports_is_installed_with_its_extra(room):
    known, distributions = declared(EXTRA_OF_ROOM.get(room)), packages_distributions()
    for file in sorted((ROOT / "src" / "recall_merge" / room).rglob("*.py")):
        for package in imported(file):
            assert known & {canonicalize_name(name) for name in distributions[package]}, f"{file.name} imports {package}"


def find(name: str) -> object:
    """What a dotted name means: a module's attribute, or a class's."""
    words = name.split(".")
    for cut in range(len(words) - 1, 0, -1):
        try:
            found = importlib.import_module(".".join(words[:cut]))
        except ModuleNotFoundError:
            continue
        for word in words[cut:]:
            found = getattr(found, word)
        return found
    raise AttributeError(name)


def check(library: str, parameters: dict[str, str], attributes: dict[str, str] | None = None) -> None:
    """Fail with the library's version and every private part that is gone or takes something else.

    Args:
        parameters: the first ones that each function must take, or must know by these names after a `*`.
        attributes: which ones the source of each class must set or read as `self.NAME`.
    """
    where, gone = f"breaks on {library} {version(library)}", []
    for name, wanted in parameters.items():
        first, _, named = wanted.partition("*")
        try:
            known = list(inspect.signature(find(name)).parameters)  # type: ignore[arg-type]
        except AttributeError:
            gone.append(f"{name} is gone")
            continue
        if known[: len(first.split())] != first.split() or not set(named.split()) <= set(known):
            gone.append(f"{name} takes ({', '.join(known)}), not ({wanted})")
    for name, wanted in (attributes or {}).items():
        source = inspect.getsource(find(name))  # type: ignore[arg-type]
        gone += [f"{name}.{attribute} is gone" for attribute in wanted.split() if f"self.{attribute}" not in source]
    assert not gone, f"{where}: {'; '.join(gone)}"


def test_private_parts_of_transformers():
    check(
        "transformers",
        {
            "transformers.core_model_loading.convert_and_load_state_dict_in_model": "model state_dict load_config",
            "transformers.core_model_loading.rename_source_key": (
                "source_key weight_renamings weight_converters base_model_prefix meta_state_dict"
            ),
            "transformers.core_model_loading.dot_natural_key": "s",
            "transformers.core_model_loading.WeightConverter.rename_source_key": "self source_key",
            "transformers.core_model_loading.MergeModulelist": "dim",
            "transformers.core_model_loading.Concatenate": "dim",
            "transformers.core_model_loading.Transpose": "dim0 dim1 check_dims",
            "transformers.core_model_loading.build_glob_alternation": "globs",
            "transformers.conversion_mapping.get_model_conversion_mapping": "model",
            "transformers.modeling_utils.LoadStateDictConfig": "* dtype dtype_plan weight_mapping",
            "transformers.PreTrainedModel._get_dtype_plan": "self dtype",
            "transformers.PreTrainedModel._from_config": "config",
            "transformers.Trainer._get_train_sampler": "self train_dataset",
        },
        {"transformers.Trainer": "_train_batch_size"},
    )
    assert isinstance(find("transformers.PreTrainedModel._is_stateful"), bool)


def test_private_parts_of_trl():
    trainer = "trl.trainer.sft_trainer.SFTTrainer"
    check(
        "trl",
        {f"{trainer}.compute_loss": "self model inputs return_outputs num_items_in_batch"},
        {trainer: "aux_loss_enabled padding_free"},
    )


def test_private_parts_of_lm_eval():
    model = "lm_eval.models.huggingface.HFLM"
    check(
        "lm_eval",
        {
            f"{model}._loglikelihood_tokens": "self requests disable_tqdm override_bs",
            f"{model}.generate_until": "self requests disable_tqdm",
            f"{model}.loglikelihood": "self requests disable_tqdm",
            "lm_eval.models.huggingface.resolve_max_length": "config tokenizer * default",
        },
        {model: "backend batch_size max_length add_bos_token", "lm_eval.api.model.TemplateLM": "_loglikelihood_tokens"},
    )
    check("lm_eval", {}, {"lm_eval.api.model.LM": "cache_hook"})
    assert isinstance(find(f"{model}._DEFAULT_MAX_LENGTH"), int)
    for module in ("lm_eval.api.task", "lm_eval.api.model", "lm_eval.models.huggingface"):
        assert find(f"{module}.tqdm"), f"breaks on lm_eval {version('lm_eval')}"


@pytest.mark.parametrize("metric", ["BLEU", "CHRF"])
def test_private_parts_of_sacrebleu(metric):
    names = {"_extract_corpus_statistics": "self hypotheses references", "_compute_score_from_stats": "self stats"}
    check("sacrebleu", {f"sacrebleu.{metric}.{name}": parameters for name, parameters in names.items()})


def test_a_private_part_that_is_gone_is_named_with_the_version():
    with pytest.raises(AssertionError) as caught:
        check(
            "sacrebleu",
            {"sacrebleu.BLEU._gone": "self", "sacrebleu.BLEU.corpus_score": "self pairs"},
            {"sacrebleu.BLEU": "lowercase nothing"},
        )
    said = str(caught.value)
    assert f"breaks on sacrebleu {version('sacrebleu')}: sacrebleu.BLEU._gone is gone; " in said
    assert "corpus_score takes (self, hypotheses, references, n_bootstrap), not (self pairs)" in said
    assert "sacrebleu.BLEU.nothing is gone" in said and "lowercase" not in said
