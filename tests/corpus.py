"""A corpus of malformed inputs, made by this script: what people, broken downloads and attackers put before us.

    python tests/corpus.py FOLDER       write all inputs there, each in a folder of its own
    python tests/corpus.py --renew      write anew what is said of each (tests/corpus.json); read the difference before it is kept

Each case is a sound tiny input of one kind with one thing wrong. `tests/test_corpus.py` builds them all, hands each to the library as a
command would, and compares every word of what is said. No case is larger than a few kilobytes, but for those whose size is what is wrong.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blake3 import blake3

KEPT = Path(__file__).with_name("corpus.json")
BLOCKS, WIDTH, ROWS = 2, 4, 6
DEEP = 5_000  # levels of nesting, beyond what Python's own readers take


@dataclass(frozen=True)
class Case:
    """One malformed input: its kind, what is wrong, and the files that replace or join those of a sound input (None takes one out)."""

    kind: str
    name: str
    files: dict[str, bytes | None]

    @property
    def id(self) -> str:
        return f"{self.kind}: {self.name}"

    @property
    def digest(self) -> str:
        """Tells it from all others."""
        words = [
            self.kind,
            *(f"{name} {hashlib.sha256(data or b'').hexdigest()} {data is None}" for name, data in sorted(self.files.items())),
        ]
        return hashlib.sha256("\n".join(words).encode()).hexdigest()[:16]

    def write(self, folder: Path) -> Path:
        """The whole input, in a folder; returns what the command is given."""
        for name, data in (SOUND[self.kind] | self.files).items():
            if data is not None:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_bytes(data)
        return folder


# ---- sound inputs, byte by byte


def encoded(value: Any) -> bytes:
    return json.dumps(value).encode()


def weights(tensors: dict[str, tuple[int, ...]], changes: Callable[[dict[str, Any]], Any] = lambda header: None, fill: int = 60) -> bytes:
    """A safetensors file of float32 tensors; `changes` may change its header in place, or give another."""
    header: dict[str, Any] = {}
    end = 0
    for name, shape in tensors.items():
        size = 4
        for length in shape:
            size *= length
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    other = changes(header)
    text = other if isinstance(other, bytes) else encoded(header if other is None else other)
    return len(text).to_bytes(8, "little") + text + bytes([fill]) * end


TENSORS: dict[str, tuple[int, ...]] = {
    "model.embed_tokens.weight": (ROWS, WIDTH),
    **{f"model.layers.{block}.mlp.weight": (WIDTH, WIDTH) for block in range(BLOCKS)},
    "model.norm.weight": (WIDTH,),
    "lm_head.weight": (ROWS, WIDTH),
}
CONFIG: dict[str, Any] = {"model_type": "llama", "num_hidden_layers": BLOCKS, "vocab_size": ROWS, "tie_word_embeddings": False}
MODEL: dict[str, bytes | None] = {"config.json": encoded(CONFIG), "model.safetensors": weights(TENSORS)}
FIRST = {name: shape for name, shape in TENSORS.items() if "layers" not in name}
SECOND = {name: shape for name, shape in TENSORS.items() if "layers" in name}
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
INDEX = {"metadata": {"total_size": 368}, "weight_map": dict.fromkeys(FIRST, SHARDS[0]) | dict.fromkeys(SECOND, SHARDS[1])}
SHARDED: dict[str, bytes | None] = {
    "config.json": encoded(CONFIG),
    "model.safetensors.index.json": encoded(INDEX),
    SHARDS[0]: weights(FIRST),
    SHARDS[1]: weights(SECOND),
}
PART = "base_model.model.model.layers.0.mlp."
FACTORS: dict[str, tuple[int, ...]] = {f"{PART}lora_A.weight": (2, WIDTH), f"{PART}lora_B.weight": (WIDTH, 2)}
ADAPTER_CONFIG: dict[str, Any] = {
    "peft_type": "LORA",
    "r": 2,
    "lora_alpha": 4,
    "target_modules": ["layers.0.mlp"],
    "base_model_name_or_path": "base",
}
ADAPTER: dict[str, bytes | None] = {
    **{f"base/{name}": data for name, data in MODEL.items()},
    "adapter/adapter_config.json": encoded(ADAPTER_CONFIG),
    "adapter/adapter_model.safetensors": weights(FACTORS),
}
_HASHES = {Path(name).name: hashlib.sha256(data or b"").hexdigest() for name, data in ADAPTER.items() if name.startswith("adapter/")}
GROUP = {
    "0000.factor": (WIDTH, 2),
    "0000.rest": (WIDTH,),
    "model.layers.0.mlp.weight.gradient": (WIDTH,),
}
STATS_FACTS: dict[str, Any] = {
    "format": 3,
    "expert": hashlib.sha256(repr(sorted(_HASHES.items())).encode()).hexdigest(),
    "samples": 1,
    "rows": [0],
    "tokens": 3,
    "rank": 2,
    "tensors": {"model.layers.0.mlp.weight": ["0000", 1]},
}
STATS: dict[str, bytes | None] = {
    **ADAPTER,
    "adapter/stats.json": encoded(STATS_FACTS),
    "adapter/stats.safetensors": weights(GROUP),
}
RUN = b"base: base\nexperts:\n  - {name: a, path: adapter, same_base: true}\nmethod: linear\nout: {path: merged}\n"
MERGEKIT = (
    b"merge_method: ties\nbase_model: base\nmodels:\n  - model: base+adapter\n    parameters: {weight: [0.5, 1], density: 0.5}\n"
    b"parameters: {normalize: true}\ndtype: float32\n"
)
TASKS = b"".join(b"  - {name: %s, train: a.jsonl, test: b.jsonl}\n" % name for name in (b"a", b"b"))
SCENARIO = b"model: base\ntasks:\n" + TASKS + b"methods: [linear]\norders: [[a, b]]\nout: bench\n"
ROW = b'{"prompt": "is it?", "completion": "yes", "choices": ["yes", "no"]}\n'
RECORD: dict[str, Any] = {
    "format": 2,
    "run": {"base": "base", "experts": [{"name": "a", "path": "adapter"}], "skip": [], "vocabulary": None, "seed": 0},
    "method": {"name": "linear", "source": "", "options": {"scale": 1.0}},
    "models": {"base": {"tensors": ""}, "a": {"tensors": ""}},
    "samples": [],
    "weights": {"experts": ["a"], "layers": [0, 1, 2, 3], "rows": [[1.0]] * 4},
    "notes": [],
    "created": "2026-01-01T00:00:00Z",
    "versions": {"python": "3.11.7"},
    "seconds": {"merge": 0.1},
    "files": {name: blake3(data or b"").hexdigest() for name, data in MODEL.items()},
}
STATE: dict[str, Any] = {
    "format": 2,
    "base": {"path": "../base", "fingerprint": ""},
    "settings": {},
    "stages": [],
    "head": 0,
    "unfinished": None,
}
SPEC: dict[str, Any] = {
    "id": 1,
    "parent": 0,
    "task": {"name": "a", "metric": None, "test": None},
    "train": None,
    "start": "base",
    "given": None,
    "unseen": [],
    "overrides": {},
}
STAGE: dict[str, Any] = SPEC | {
    "expert": {"path": "experts/1-a", "fingerprint": ""},
    "stats": None,
    "merged": {"path": "merges/1", "fingerprint": ""},
    "samples": [0],
    "scores": {"file": "scores/1.json", "base": {}, "before": {}, "expert": {}, "merged": {}},
    "created": "2026-01-01T00:00:00Z",
}
SOUND: dict[str, dict[str, bytes | None]] = {
    "weights": MODEL,
    "config": MODEL,
    "index": SHARDED,
    "adapter": ADAPTER,
    "stats": STATS,
    "run": {**ADAPTER, "run.yaml": RUN},
    "mergekit": {**ADAPTER, "merge.yaml": MERGEKIT},
    "scenario": {"scenario.yaml": SCENARIO},
    "rows": {"rows.jsonl": ROW},
    "record": {**MODEL, "record.json": encoded(RECORD)},
    "workspace": {"workspace.json": encoded(STATE)},
}


# ---- what is wrong


def broken_json(sound: bytes) -> dict[str, bytes]:
    """What can be wrong with any file of JSON."""
    return {
        "empty": b"",
        "cut short": sound[: len(sound) // 2],
        "no JSON": b"hello",
        "no text": b"\xff\xfe\x00\x80",
        "another encoding": sound.decode().encode("utf-16"),
        "zeros, as after a power cut": bytes(len(sound)),
        "a list": b"[1, 2]",
        "a number": b"3",
        "null": b"null",
        "text": b'"text"',
        "nested deep": b"[" * DEEP,
        "objects nested deep": b'{"a":' * DEEP,
        "a number of many digits": b'{"a": ' + b"9" * 5_000 + b"}",
        "half a character": b'{"a": "\\ud800"}',
    }


def of_weights() -> Iterator[tuple[str, bytes | None]]:
    sound = weights(TENSORS)
    norm = "model.norm.weight"
    yield "empty", b""
    yield "seven bytes", b"1234567"
    yield "the length alone", sound[:8]
    yield "cut in the header", sound[:40]
    yield "cut in the tensors", sound[:-5]
    yield "a byte too many", sound + b"\0"
    yield "zeros, as after a power cut", bytes(len(sound))
    yield "a page of an error", b"<html><body>404 Not Found</body></html>"
    yield "a pointer of Git LFS", b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n"
    yield "a pickle", b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x8c\x06system\x93."
    yield "a zip", b"PK\x03\x04" + bytes(60)
    yield "a length of 2^63", (2**63).to_bytes(8, "little") + sound[8:]
    yield "a length of 2^64 - 1", b"\xff" * 8 + sound[8:]
    yield "a length one too long", (int.from_bytes(sound[:8], "little") + 1).to_bytes(8, "little") + sound[8:]
    yield "a length one too short", (int.from_bytes(sound[:8], "little") - 1).to_bytes(8, "little") + sound[8:]
    for name, text in broken_json(b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}').items():
        yield f"header {name}", weights({}, lambda _, text=text: text)
    yield "a name twice", weights({}, lambda _: b'{"a":{},"a":{}}')

    def edited(**changes: Any) -> bytes:
        return weights(TENSORS, lambda header: header[norm].update(changes))

    for what, value in {
        "an unknown dtype": "F33",
        "no dtype": None,
        "a list for a dtype": ["F32"],
        "a dtype in small letters": "f32",
        "a packed dtype": "F4",
        "a dtype of another size": "F64",
        "a dtype that is not for merging": "F8_E4M3",
    }.items():
        yield what, edited(dtype=value)
    for what, value in {
        "a negative shape": [-4],
        "a shape of text": ["4"],
        "a shape of fractions": [4.0],
        "a shape of truth": [True],
        "no shape": None,
        "a number for a shape": 4,
        "a shape that is too large": [8],
        "a shape of 2^62": [2**62, 4],
        "a shape of many digits": [10**4000] * 3,
        "a shape of a thousand sides": [1] * 1000 + [4],
        "zero times infinity": [0, 2**63],
    }.items():
        yield what, edited(shape=value)
    begin = 4 * (ROWS * WIDTH + BLOCKS * WIDTH * WIDTH)
    for what, value in {
        "offsets backwards": [begin + 16, begin],
        "offsets below 0": [-16, 0],
        "offsets of text": ["0", "16"],
        "one offset": [begin],
        "three offsets": [begin, begin + 8, begin + 16],
        "no offsets": None,
        "offsets that overlap": [begin - 16, begin],
        "offsets that leave a hole": [begin + 16, begin + 32],
        "offsets beyond the end": [10**15, 10**15 + 16],
        "offsets of truth": [False, True],
        "offsets that are too short": [begin, begin + 8],
        "offsets of many digits": [10**4000, 10**4000 + 16],
    }.items():
        yield what, edited(data_offsets=value)
    yield "an entry that is a list", weights(TENSORS, lambda header: header | {norm: [1, 2]})
    yield "an entry that is null", weights(TENSORS, lambda header: header | {norm: None})
    yield "no tensors", weights({})
    yield "no embedding", weights({name: shape for name, shape in TENSORS.items() if "embed" not in name and "head" not in name})
    yield "no blocks", weights({name: shape for name, shape in TENSORS.items() if "layers" not in name})
    yield "a block is missing", weights({name: shape for name, shape in TENSORS.items() if "layers.1" not in name})
    yield "a block too many", weights(TENSORS | {"model.layers.2.mlp.weight": (WIDTH, WIDTH)})
    yield "a block of many digits", weights(TENSORS | {f"model.layers.{'9' * 5000}.mlp.weight": (WIDTH, WIDTH)})
    yield "two lists of blocks", weights(TENSORS | {f"model.others.{block}.weight": (WIDTH,) for block in range(BLOCKS)})
    yield "a vocabulary of other rows", weights(TENSORS | {"model.embed_tokens.weight": (ROWS + 1, WIDTH)})
    yield "two embeddings", weights({"model.embed_other.weight": (ROWS, WIDTH), **TENSORS})
    yield "whole numbers for weights", weights(TENSORS, lambda header: header[norm].update(dtype="I32"))


def of_config() -> Iterator[tuple[str, bytes | None]]:
    yield "missing", None
    yield from broken_json(encoded(CONFIG)).items()
    for what, change in {
        "no number of blocks": {"num_hidden_layers": None},
        "blocks as text": {"num_hidden_layers": "2"},
        "no blocks": {"num_hidden_layers": 0},
        "blocks below 0": {"num_hidden_layers": -2},
        "a million million blocks": {"num_hidden_layers": 10**12},
        "blocks of many digits": {"num_hidden_layers": 10**4000},
        "blocks of truth": {"num_hidden_layers": True},
        "three blocks": {"num_hidden_layers": 3},
        "other rows": {"vocab_size": 7},
        "rows as text": {"vocab_size": "6"},
        "no rows": {"vocab_size": None},
        "a list of rows": {"vocab_size": [6]},
        "quantised": {"quantization_config": {"bits": 4}},
        "tied, but the head differs": {"tie_word_embeddings": True},
        "a text model that is none": {"vocab_size": None, "text_config": 3},
    }.items():
        changed = CONFIG | change
        data = encoded({key: value for key, value in changed.items() if value is not None})
        if what.startswith("tied"):
            continue
        yield what, data


def of_index() -> Iterator[tuple[str, dict[str, bytes | None]]]:
    file = "model.safetensors.index.json"
    for name, text in broken_json(encoded(INDEX)).items():
        yield name, {file: text}
    places = INDEX["weight_map"]

    def mapped(**changes: Any) -> dict[str, bytes | None]:
        return {file: encoded({"weight_map": {**places, **{key.replace("__", "."): value for key, value in changes.items()}}})}

    yield "no map", {file: encoded({"metadata": {}})}
    yield "an empty map", {file: encoded({"weight_map": {}})}
    yield "a list for a map", {file: encoded({"weight_map": list(places)})}
    yield "numbers for files", {file: encoded({"weight_map": dict.fromkeys(places, 3)})}
    yield "null for files", {file: encoded({"weight_map": dict.fromkeys(places)})}
    for what, place in {
        "a file above": "../model.safetensors",
        "a file far above": "../../../../etc/passwd",
        "a whole path": "/etc/passwd",
        "a file below": "sub/model.safetensors",
        "another system's path": "..\\model.safetensors",
        "a NUL": "model\0.safetensors",
        "a pickle": "pytorch_model.bin",
        "no name": "",
        "a dot": ".",
        "only the ending": ".safetensors",
        "a missing file": "model-00003-of-00003.safetensors",
        "a line break": "model\n.safetensors",
        "a pipe": "|touch pwned.safetensors",
        "a very long name": "m" * 5000 + ".safetensors",
    }.items():
        yield what, mapped(model__norm__weight=place)
    yield "a tensor that no file holds", mapped(model__extra__weight=SHARDS[0])
    yield "a tensor in the wrong file", mapped(model__norm__weight=SHARDS[1])
    yield (
        "a tensor left out",
        {file: encoded({"weight_map": {name: place for name, place in places.items() if name != "model.norm.weight"}})},
    )
    yield "a shard is missing", {SHARDS[1]: None}
    yield "a shard is empty", {SHARDS[1]: b""}
    yield "a shard of another model", {SHARDS[1]: weights(FIRST)}
    yield "a whole model beside it", {"model.safetensors": weights(TENSORS)}


def of_adapter() -> Iterator[tuple[str, dict[str, bytes | None]]]:
    config, file = "adapter/adapter_config.json", "adapter/adapter_model.safetensors"
    for name, text in broken_json(encoded(ADAPTER_CONFIG)).items():
        yield f"config {name}", {config: text}
    for what, change in {
        "another kind": {"peft_type": "IA3"},
        "no kind": {"peft_type": None},
        "a kind that is a list": {"peft_type": ["LORA"]},
        "no rank": {"r": None},
        "rank 0": {"r": 0},
        "rank below 0": {"r": -2},
        "rank as text": {"r": "2"},
        "rank that is no number": {"r": float("nan")},
        "endless alpha": {"lora_alpha": float("inf")},
        "alpha of truth": {"lora_alpha": True},
        "alpha of many digits": {"lora_alpha": 10**4000},
        "PiSSA": {"init_lora_weights": "pissa_niter_16"},
        "aLoRA": {"alora_invocation_tokens": [1]},
        "replicated layers": {"layer_replication": [[0, 2]]},
        "a pattern that is none": {"rank_pattern": {"(": 2}},
        "a pattern of rank 0": {"rank_pattern": {"mlp": 0}},
        "a pattern of text": {"alpha_pattern": {"mlp": "much"}},
        "patterns as a list": {"rank_pattern": ["mlp"]},
        "patterns as text": {"alpha_pattern": "mlp"},
        "patterns that are true": {"alpha_pattern": True},
        "a very long pattern": {"rank_pattern": {"a" * 100_000: 2}},
    }.items():
        yield what, {config: encoded({key: value for key, value in (ADAPTER_CONFIG | change).items() if value is not None})}
    yield "no weights", {file: None}
    yield "pickled weights", {file: None, "adapter/adapter_model.bin": b"\x80\x04."}
    yield "weights cut short", {file: weights(FACTORS)[:-3]}
    other = {"lora_A.weight": (2, WIDTH), "lora_B.weight": (WIDTH, 2)}

    def parts(tensors: dict[str, tuple[int, ...]]) -> dict[str, bytes | None]:
        return {file: weights(tensors)}

    yield "one factor", parts({f"{PART}lora_A.weight": (2, WIDTH)})
    yield "factors that do not fit each other", parts(FACTORS | {f"{PART}lora_B.weight": (WIDTH, 3)})
    yield "factors that do not fit the base", parts({f"{PART}lora_A.weight": (2, 5), f"{PART}lora_B.weight": (5, 2)})
    yield "factors of rank 0", parts({f"{PART}lora_A.weight": (0, WIDTH), f"{PART}lora_B.weight": (WIDTH, 0)})
    yield "factors of one side", parts({f"{PART}lora_A.weight": (8,), f"{PART}lora_B.weight": (8,)})
    yield "a factor that is a number", parts({f"{PART}lora_A.weight": (), f"{PART}lora_B.weight": ()})
    yield "a module that the base lacks", parts({f"base_model.model.model.layers.7.mlp.{name}": shape for name, shape in other.items()})
    yield "a part that is none of LoRA's", parts(FACTORS | {f"{PART}lora_C.weight": (2, 2)})
    yield "a name without end", parts({"base_model.model." + "a." * 20_000 + "lora_A.weight": (2, WIDTH)})
    yield "a name of dots", parts({"." * 3000: (2, WIDTH)})
    yield "a bias that the base lacks", parts(FACTORS | {f"{PART}lora_B.bias": (WIDTH,)})
    yield "magnitudes of another shape", parts(FACTORS | {f"{PART}lora_magnitude_vector": (5,)})
    yield "tokens without numbers", parts({"base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta": (2, WIDTH)})
    tokens = {file: weights({"base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta": (2, WIDTH)})}
    for what, ids in {
        "tokens beyond the last": [0, 99],
        "tokens below 0": [-1, 0],
        "tokens as text": ["0", "1"],
        "three tokens for two rows": [0, 1, 2],
    }.items():
        yield what, {**tokens, config: encoded(ADAPTER_CONFIG | {"trainable_token_indices": {"embed_tokens": ids}})}


def of_statistics() -> Iterator[tuple[str, dict[str, bytes | None]]]:
    facts, file = "adapter/stats.json", "adapter/stats.safetensors"
    for name, text in broken_json(encoded(STATS_FACTS)).items():
        yield name, {facts: text}
    for what, change in {
        "of an older form": {"format": 1},
        "of a newer form": {"format": 5},
        "no tensors": {"tensors": None},
        "tensors as a list": {"tensors": ["mlp"]},
        "of another expert": {"expert": "0" * 64},
        "of another base": {"base": "0" * 64},
        "an entry that is text": {"tensors": {"model.layers.0.mlp.weight": "0000"}},
        "an entry of three": {"tensors": {"model.layers.0.mlp.weight": ["0000", 1, 2]}},
        "an axis that is none": {"tensors": {"model.layers.0.mlp.weight": ["0000", 7]}},
        "a group that is missing": {"tensors": {"model.layers.0.mlp.weight": ["0001", 1]}},
        "a group that is a number": {"tensors": {"model.layers.0.mlp.weight": [0, 1]}},
        "groups of a mixture": {"tensors": {"model.layers.0.mlp.weight": [["0000", "0000"], 1]}},
        "no groups": {"tensors": {"model.layers.0.mlp.weight": [[], 1]}},
        "groups that are numbers": {"tensors": {"model.layers.0.mlp.weight": [[0, 0], 1]}},
        "counts of mixtures that are text": {"mixtures": ["1", "2"]},
        "one count of mixtures": {"mixtures": [1]},
        "no hash of its expert": {"expert": None},
    }.items():
        yield what, {facts: encoded({key: value for key, value in (STATS_FACTS | change).items() if value is not None})}
    yield "no numbers", {file: None}
    yield "numbers cut short", {file: weights(GROUP)[:-1]}
    yield "a factor of another width", {file: weights(GROUP | {"0000.factor": (9, 2)})}
    yield "a rest of another width", {file: weights(GROUP | {"0000.rest": (9,)})}
    yield "a factor that is a vector", {file: weights(GROUP | {"0000.factor": (WIDTH,)})}
    yield "gradients of another width", {file: weights(GROUP | {"model.layers.0.mlp.weight.gradient": (9,)})}
    yield "no gradients", {file: weights({name: shape for name, shape in GROUP.items() if "gradient" not in name})}
    yield "whole numbers", {file: weights(GROUP, lambda header: header["0000.rest"].update(dtype="I32"))}


def of_yaml(sound: bytes) -> Iterator[tuple[str, bytes]]:
    laughs = b"a0: &a0 [x, x]\n" + b"".join(b"a%d: &a%d [%s]\n" % (i, i, b", ".join([b"*a%d" % (i - 1)] * 9)) for i in range(1, 10))
    yield "empty", b""
    yield "no mapping", b"- 1\n- 2\n"
    yield "a word", b"merge"
    yield "no YAML", b"base: [\n"
    yield "no text", b"\xff\xfe\xfa"
    yield "a NUL", b"base: \0"
    yield "a tab", b"base:\n\t- x"
    yield "a key twice", sound + sound.splitlines()[0] + b"\n"
    yield "code", b"base: !!python/object/apply:os.system ['touch pwned']\n"
    yield "code by another way", b"base: !!python/name:os.system\n"
    yield "a billion laughs", laughs
    yield "inside of itself", b"a: &a [*a]\n"
    yield "an alias of nothing", b"a: *b\n"
    yield "nested deep", b"[" * DEEP
    yield "blocks nested deep", b"".join(b" " * i + b"a:\n" for i in range(200))
    yield "a number of many digits", b"seed: " + b"9" * 5000
    yield "a day that is none", b"seed: 2001-99-99"
    yield "too long", b"# " + b"x" * 1_000_001
    yield "two documents", sound + b"---\n" + sound
    yield "numbers for keys", b"1: 2\n"
    yield "a list for a key", b"[1]: 2\n"


def of_run() -> Iterator[tuple[str, bytes | None]]:
    yield "missing", None
    yield from of_yaml(RUN)

    def line(start: bytes, other: bytes) -> bytes:
        return b"\n".join(other if found.startswith(start) else found for found in RUN.splitlines())

    yield "an unknown key", RUN + b"wieght: 3\n"
    yield "an unknown key with a name of ours", RUN + b"rows: 3\n"
    yield "an unknown key in brackets", RUN + b"'a[b]': 3\n"
    yield "an adapter of another base", line(b"  -", b"  - {name: a, path: adapter}")
    yield "an unknown method", line(b"method", b"method: lineer")
    yield "a method that is a list", line(b"method", b"method: [linear]")
    yield "an unknown option", RUN + b"options: {scle: 2}\n"
    yield "an option that is no number", RUN + b"options: {scale: .nan}\n"
    yield "an option that is text", RUN + b"options: {scale: much}\n"
    yield "options as a list", RUN + b"options: [1]\n"
    yield "no base", line(b"base", b"")
    yield "a base that is a number", line(b"base", b"base: 3")
    yield "a base that is empty", line(b"base", b"base: ''")
    yield "a base with a NUL", line(b"base", b'base: "a\\0b"')
    yield "a base that is a very long name", line(b"base", b"base: " + b"a" * 5000)
    yield "an expert of nobody's home", line(b"  -", b"  - {name: a, path: ~nobody-of-this-name/model}")
    yield "a base of nobody's home", line(b"base", b"base: ~nobody-of-this-name/model")
    yield "a limit that is text", RUN + b"change_limit: none\n"
    yield "a limit below 0", RUN + b"change_limit: -1\n"
    yield "no experts", line(b"  -", b"  []")
    yield "an expert that is text", line(b"  -", b"  - adapter")
    yield "an expert without a path", line(b"  -", b"  - {name: a}")
    yield "two experts of one name", line(b"  -", b"  - {name: a, path: adapter}\n  - {name: a, path: base}")
    yield "an expert called base", line(b"  -", b"  - {name: base, path: adapter}")
    yield "the base as an expert", line(b"  -", b"  - {name: a, path: base}")
    yield "the output over the base", line(b"out", b"out: {path: base}")
    yield "the output above all", line(b"out", b"out: {path: .}")
    yield "the root of the disk", line(b"out", b"out: {path: /}")
    yield "the output is a file", line(b"out", b"out: {path: run.yaml}")
    yield "an output of a NUL", line(b"out", b'out: {path: "a\\0b"}')
    yield "an output of half a character", line(b"out", b'out: {path: "\\uD800"}')
    yield "no output", line(b"out", b"")
    yield "a shard size of 0", line(b"out", b"out: {path: merged, shard_size: 0}")
    yield "a shard size below 0", line(b"out", b"out: {path: merged, shard_size: -5GB}")
    yield "a shard size that is none", line(b"out", b"out: {path: merged, shard_size: huge}")
    yield "a shard size without end", line(b"out", b"out: {path: merged, shard_size: .inf}")
    yield "a shard size of many digits", line(b"out", b"out: {path: merged, shard_size: '" + b"9" * 4400 + b"'}")
    yield "weights for nobody", RUN + b"weights: [1, 2]\n"
    yield "weights below 0", RUN + b"weights: [-1]\n"
    yield "weights that are all 0", RUN + b"weights: [0]\n"
    yield "weights without end", RUN + b"weights: [.inf]\n"
    yield "weights of truth", RUN + b"weights: yes\n"
    yield "rows of weights for too few layers", RUN + b"weights: {by_layer: [[1], [1]]}\n"
    yield "a skip of nothing", RUN + b"skip: ['*.nothing']\n"
    yield "a skip that is text", RUN + b"skip: norm\n"
    yield "a seed that is text", RUN + b"seed: many\n"
    yield "no threads", RUN + b"threads: 0\n"
    yield "samples that are not there", RUN + b"samples: {path: none.jsonl}\n"
    yield "samples that are a folder", RUN + b"samples: {path: base}\n"
    yield "a device of YAML 1.1", RUN + b"prune: on\n"


def of_mergekit() -> Iterator[tuple[str, bytes | None]]:
    yield from of_yaml(MERGEKIT)

    def given(old: bytes, new: bytes) -> bytes:
        assert old in MERGEKIT
        return MERGEKIT.replace(old, new)

    yield "an unknown key", MERGEKIT + b"modles: []\n"
    yield "an unknown method", given(b"ties", b"tise")
    yield "a method that is a list", given(b"ties", b"[ties]")
    yield "a method of nothing", given(b"ties", b"")
    yield "no models", given(b"models:", b"others:")
    yield "models that are text", MERGEKIT.partition(b"models:")[0] + b"models: base\n"
    yield "models that are empty", MERGEKIT.partition(b"models:")[0] + b"models: []\n"
    yield "a model that is a number", given(b"base+adapter", b"3")
    yield "a model that is not there", given(b"base+adapter", b"base+nothing")
    yield "a model of a NUL", given(b"base+adapter", b'"a\\0b"')
    yield "a model of nobody's home", given(b"base+adapter", b"~nobody-of-this-name/model")
    yield "a base of nobody's home", given(b"base_model: base", b"base_model: ~nobody-of-this-name/model")
    yield "a weight of many digits", given(b"[0.5, 1]", b"1" + b"0" * 400)
    yield "a model above", given(b"base+adapter", b"../../../../etc")
    yield "a base that is an adapter", given(b"base_model: base", b"base_model: base+adapter")
    yield "a base that is a very long name", given(b"base_model: base", b"base_model: " + b"a" * 5000)
    yield "models and slices", MERGEKIT + b"slices: [{sources: [{model: base, layer_range: [0, 2]}]}]\n"
    slices = MERGEKIT.partition(b"models:")[0] + b"slices: [{sources: [{model: base+adapter, layer_range: %s}]}]\n"
    yield "slices that leave blocks out", slices % b"[0, 1]"
    yield "slices backwards", slices % b"[2, 0]"
    yield "slices below 0", slices % b"[-1, 2]"
    yield "slices of many digits", slices % (b"[0, 1" + b"0" * 4000 + b"]")
    yield "slices without end", slices % b"[0, .inf]"
    yield "a weight that is none", given(b"[0.5, 1]", b"much")
    yield "a weight that is no number", given(b"[0.5, 1]", b".nan")
    yield "weights that are empty", given(b"[0.5, 1]", b"[]")
    yield "weights by place", given(b"[0.5, 1]", b"{'0': 0.5, '1': 1}")
    yield "weights of a key that is called as a type", given(b"[0.5, 1]", b"{Conditional: 3}")
    yield "weights of a filter that is a number", given(b"[0.5, 1]", b"[{filter: 3, value: 1}]")
    yield "a density of two", given(b"density: 0.5", b"density: 2")
    yield "parameters as a list", given(b"{normalize: true}", b"[normalize]")
    yield "a dtype that is none", given(b"float32", b"float33")


def of_scenario() -> Iterator[tuple[str, bytes | None]]:
    yield "missing", None
    yield from of_yaml(SCENARIO)
    yield "an unknown key", SCENARIO + b"taks: 3\n"
    yield (
        "no tasks",
        SCENARIO.replace(b"  - {name: a, train: a.jsonl, test: b.jsonl}", b"  []").replace(
            b"  - {name: b, train: a.jsonl, test: b.jsonl}\n", b""
        ),
    )
    yield "two tasks of one name", SCENARIO.replace(b"name: b", b"name: a")
    yield "more orders than there are", SCENARIO.replace(b"[[a, b]]", b"{count: 3}")
    yield "orders without end", SCENARIO.replace(b"[[a, b]]", b"{count: 1" + b"0" * 400 + b"}")
    yield "an order of others", SCENARIO.replace(b"[[a, b]]", b"[[c, d]]")
    yield "a method that is a number", SCENARIO.replace(b"[linear]", b"[3]")
    yield "no methods", SCENARIO.replace(b"[linear]", b"[]")
    yield "no workers", SCENARIO + b"workers: 0\n"
    yield "a seed that is text", SCENARIO + b"seeds: [one]\n"


def of_rows() -> Iterator[tuple[str, bytes | None]]:
    yield "missing", None
    yield "empty", b""
    yield "blank lines", b"\n\n \n"
    for name, text in broken_json(ROW).items():
        if name != "empty":
            yield f"a line: {name}", ROW + text + b"\n"
    yield "a line cut short", ROW + ROW[:-20]
    yield "a lone surrogate", b'{"prompt": "\\ud800", "completion": "y"}\n'
    yield "no form that is known", b'{"question": "a", "reply": "b"}\n'
    yield "a prompt that is a number", b'{"prompt": 3, "completion": "y"}\n'
    yield "no answer", b'{"prompt": "a"}\n'
    yield "an answer that is null", b'{"prompt": "a", "completion": null}\n'
    yield "an answer that is no choice", b'{"prompt": "a", "completion": "z", "choices": ["y", "n"]}\n'
    yield "choices as text", b'{"prompt": "a", "completion": "y", "choices": "yn"}\n'
    yield "choices as a number", b'{"prompt": "a", "completion": "y", "choices": 3}\n'
    yield "choices that are lists", b'{"prompt": "a", "completion": "y", "choices": [["y"], ["n"]]}\n'
    yield "no messages", b'{"messages": []}\n'
    yield "messages as text", b'{"messages": "hello"}\n'
    yield "messages as a number", b'{"messages": 3}\n'
    yield "a message without content", b'{"messages": [{"role": "user"}, {"role": "assistant", "content": "x"}]}\n'
    yield "the user has the last word", b'{"messages": [{"role": "user", "content": "x"}]}\n'
    yield "an instruction without output", b'{"instruction": "x"}\n'
    yield "an input that is a list", b'{"instruction": "x", "input": [1], "output": "y"}\n'
    yield "thirty faulty rows", b'{"prompt": 1}\n' * 30


def of_record() -> Iterator[tuple[str, dict[str, bytes | None]]]:
    yield "missing", {"record.json": None}
    for name, text in broken_json(encoded(RECORD)).items():
        yield name, {"record.json": text}

    def with_files(**files: Any) -> dict[str, bytes | None]:
        return {"record.json": encoded(RECORD | {"files": {**RECORD["files"], **files}})}

    for what, change in {
        "a newer form": {"format": 4},
        "no form": {"format": None},
        "no files": {"files": None},
        "files as a list": {"files": ["model.safetensors"]},
    }.items():
        yield what, {"record.json": encoded({key: value for key, value in (RECORD | change).items() if value is not None})}
    digest = "0" * 64
    yield "a file above", with_files(**{"../secret": digest})
    yield "a whole path", with_files(**{"/etc/passwd": digest})
    yield "a folder", with_files(**{".": digest})
    yield "no name", with_files(**{"": digest})
    yield "a NUL", with_files(**{"a\0b": digest})
    yield "a very long name", with_files(**{"m" * 5000: digest})
    yield "a hash that is a number", with_files(**{"config.json": 3})
    yield "a missing file", with_files(**{"generation_config.json": digest})
    yield "a changed file", {"config.json": encoded(CONFIG | {"rms_norm_eps": 0.5})}
    flipped = bytearray(weights(TENSORS))
    flipped[-1] ^= 1
    yield "one bit of the weights", {"model.safetensors": bytes(flipped)}
    yield "weights cut short", {"model.safetensors": weights(TENSORS)[:-1]}
    yield "weights that nobody wrote", {"adapter_model.safetensors": weights(FACTORS)}
    for key in ("run", "method", "models", "weights", "seconds", "versions"):
        yield f"no {key}", {"record.json": encoded({name: value for name, value in RECORD.items() if name != key})}
        yield f"{key} of another kind", {"record.json": encoded(RECORD | {key: [1]})}
    yield "weights of other experts", {"record.json": encoded(RECORD | {"weights": {"experts": ["b", "c"], "layers": [0], "rows": [[1]]}})}
    yield "weights of text", {"record.json": encoded(RECORD | {"weights": {"experts": ["a"], "layers": [0], "rows": [["x"]]}})}
    yield "weights of other layers", {"record.json": encoded(RECORD | {"weights": RECORD["weights"] | {"layers": [0, 1]}})}
    yield "weights of no layers", {"record.json": encoded(RECORD | {"weights": {"experts": ["a"], "layers": [], "rows": []}})}
    yield "no experts", {"record.json": encoded(RECORD | {"run": RECORD["run"] | {"experts": []}})}
    yield "memory of many digits", {"record.json": encoded(RECORD | {"peak_memory": 10**400})}
    yield "samples of another kind", {"record.json": encoded(RECORD | {"samples": [{"place": 3}]})}


def of_workspace() -> Iterator[tuple[str, bytes | None]]:
    yield "missing", None
    yield from broken_json(encoded(STATE)).items()
    for what, change in {
        "a newer form": {"format": 3},
        "an older form": {"format": 1},
        "no form": {"format": None},
        "a form of text": {"format": "1"},
        "a head that is not there": {"head": 3},
        "a head below 0": {"head": -1},
        "a head of truth": {"head": True},
        "no base": {"base": None},
        "an unknown key": {"extra": 1},
        "stages as an object": {"stages": {"1": STAGE}},
        "a stage of another number": {"stages": [STAGE | {"id": 2}]},
        "a stage that is its own parent": {"stages": [STAGE | {"parent": 1}]},
        "a stage without an expert": {"stages": [{**STAGE, "expert": None}]},
        "a stage twice": {"stages": [STAGE, STAGE]},
        "a task above": {"stages": [STAGE | {"task": {"name": "../../up"}}]},
        "a task of no name": {"stages": [STAGE | {"task": {"name": ""}}]},
        "an unfinished stage of another number": {"unfinished": SPEC | {"id": 5}},
        "an unfinished stage above": {"unfinished": SPEC | {"task": {"name": "../../../up", "metric": None, "test": None}}},
        "scores of text": {"stages": [STAGE | {"scores": STAGE["scores"] | {"merged": {"a": "good"}}}]},
        "a start that is none": {"stages": [STAGE | {"start": "middle"}]},
    }.items():
        yield what, encoded({key: value for key, value in (STATE | change).items() if value is not None})


def cases() -> list[Case]:
    """All of them; each once."""
    single = {
        "weights": ("model.safetensors", of_weights()),
        "config": ("config.json", of_config()),
        "run": ("run.yaml", of_run()),
        "mergekit": ("merge.yaml", of_mergekit()),
        "scenario": ("scenario.yaml", of_scenario()),
        "rows": ("rows.jsonl", of_rows()),
        "workspace": ("workspace.json", of_workspace()),
    }
    found = [Case(kind, name, {file: data}) for kind, (file, inputs) in single.items() for name, data in inputs]
    several = {"index": of_index(), "adapter": of_adapter(), "stats": of_statistics(), "record": of_record()}
    return found + [Case(kind, name, files) for kind, inputs in several.items() for name, files in inputs]


# ---- as a command would take it


def use(kind: str, folder: Path) -> None:
    """Give an input to the library; what is wrong with it must be raised, and as an error of ours."""
    from recall_merge.bench.scenario import load_scenario
    from recall_merge.continual.workspace import status
    from recall_merge.files.checkpoint import open_checkpoint
    from recall_merge.files.rows import read_rows
    from recall_merge.interop.mergekit_run import load_any_run
    from recall_merge.merging.plan import make_plan
    from recall_merge.merging.result import coefficients, open_result
    from recall_merge.merging.run import load_run

    match kind:
        case "weights" | "config" | "index":
            open_checkpoint(folder)
        case "adapter" | "stats":
            entry = {"name": "a", "path": str(folder / "adapter"), "same_base": True}
            method = "aligned" if kind == "stats" else "linear"
            from recall_merge import MergeRun

            make_plan(MergeRun.model_validate({"base": str(folder / "base"), "experts": [entry], "method": method}), writes=False)
        case "run":
            make_plan(load_run(folder / "run.yaml"))
        case "mergekit":
            make_plan(load_any_run(folder / "merge.yaml"), writes=False)
        case "scenario":
            load_scenario(folder / "scenario.yaml")
        case "rows":
            read_rows(folder / "rows.jsonl")
        case "record":
            result = open_result(folder, shown=True)
            coefficients(result), result.experts, result.merge_weights
        case "workspace":
            status(folder)


def said(case: Case, folder: Path) -> str:
    """What is said of a case, without the place where it lies."""
    from recall_merge.files.rows import FORMATS
    from recall_merge.runtime.errors import RecallError

    case.write(folder)
    try:
        use(case.kind, folder)
    except RecallError as error:
        words = re.sub(r"known: .*", "known: ...", str(error).replace(str(folder), "FOLDER"))  # what is known grows
        return words.replace(", ".join(FORMATS), "SUFFIXES")
    return "nothing"


def main() -> None:
    if sys.argv[1:] == ["--renew"]:
        os.environ["HF_HUB_OFFLINE"] = "1"  # as the tests have it
        with tempfile.TemporaryDirectory() as place:
            kept = {case.id: said(case, Path(place) / str(number)) for number, case in enumerate(cases())}
        KEPT.write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n", "utf-8")
    elif len(sys.argv) == 2 and not sys.argv[1].startswith("-"):
        for case in cases():
            target = Path(sys.argv[1]) / case.kind / case.name.replace("/", "_")
            shutil.rmtree(target, ignore_errors=True)
            case.write(target)
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main()
