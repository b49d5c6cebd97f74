"""For every test: no network, a cache of its own, one thread; and tiny models that are built once a session."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from jaxtyping import install_import_hook

# subtle: huggingface_hub reads these when it is imported, so they are set before any test module is
_HOME = tempfile.TemporaryDirectory(prefix="recall-tests-")
os.environ["HF_HOME"] = _HOME.name
os.environ["XDG_CACHE_HOME"] = _HOME.name
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
for _name in ("HF_HUB_CACHE", "HF_TOKEN", "HF_ENDPOINT", "HF_DATASETS_CACHE", "TRANSFORMERS_CACHE"):
    os.environ.pop(_name, None)

install_import_hook("recall_merge.maths", "shapes.checked")  # subtle: before any of its modules is imported

collect_ignore = ["mergekit_oracle.py", "fuzz_atheris.py"]  # run by other Pythons, which have mergekit and atheris
Bases = Callable[[str], Path]


def pytest_configure(config: pytest.Config) -> None:
    """Tests compare the processor's bytes, so they see no GPU, unless it is them that are asked for."""
    if "gpu" not in config.option.markexpr.replace("not gpu", ""):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_unconfigure() -> None:
    _HOME.cleanup()


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Bases:
    """`bases("gpt2")`: the folder of a tiny model of that family with its tokenizer, built once. Read it, never write into it."""
    from tiny import make_model, save_model

    built: dict[str, Path] = {}

    def base(family: str) -> Path:
        if family not in built:
            built[family] = save_model(make_model(family), tmp_path_factory.mktemp("bases") / family)
        return built[family]

    return base


@pytest.fixture(scope="session")
def base_of(tmp_path_factory: pytest.TempPathFactory) -> Bases:
    """`base_of("gpt_oss")`: the same for any model type of transformers that can be built tiny."""
    import architectures
    from tiny import save_model

    built: dict[str, Path] = {}

    def base(kind: str) -> Path:
        if kind not in built:
            built[kind] = save_model(architectures.build(kind), tmp_path_factory.mktemp(kind))
        return built[kind]

    return base


@pytest.fixture(scope="session")
def llama(bases: Bases) -> Path:
    """The folder of a tiny Llama with a head of its own."""
    return bases("llama")


@pytest.fixture
def tokenizer():
    """A tiny tokenizer without a chat template."""
    from tiny import make_tokenizer

    return make_tokenizer()


@pytest.fixture
def chat_tokenizer():
    """A tiny tokenizer with a chat template."""
    from tiny import make_tokenizer

    return make_tokenizer(template=True)
