"""What mergekit 0.1.5 makes of given tensors. Run by its own Python: mergekit_oracle.py CASES.json IN.safetensors OUT.safetensors

CASES.json: {case: {"method", "parameters", "base_index", "compute", "out", "tensors": number of inputs, "numbers": number of uniform
tensors that stand in for torch.bernoulli's own}}; IN holds "case/i" and "case/u/i". OUT holds "case"; what raised is printed as JSON.
"""

import json
import sys
from functools import partial
from pathlib import Path

import torch
from mergekit.merge_methods import merge_tensors
from safetensors.torch import load_file, save_file


def bernoulli(numbers, p):
    """torch.bernoulli with given numbers in [0, 1); it refuses what the real one refuses."""
    if not ((p >= 0) & (p <= 1)).all():
        raise RuntimeError("a probability is not in [0, 1]")
    return (next(numbers).reshape(p.shape) < p).to(p.dtype)


def main(cases: str, inputs: str, outputs: str) -> None:
    given, merged, errors = load_file(inputs), {}, {}
    for name, case in json.loads(Path(cases).read_text()).items():
        tensors = [given[f"{name}/{i}"] for i in range(case["tensors"])]
        numbers = iter([given[f"{name}/u/{i}"] for i in range(case["numbers"])])
        if case["numbers"]:
            torch.bernoulli = partial(bernoulli, numbers)
        dtypes = {key: getattr(torch, case[field]) for key, field in (("dtype", "compute"), ("out_dtype", "out")) if case[field]}
        try:
            found = merge_tensors(tensors, case["method"], parameters=case["parameters"], base_index=case["base_index"], **dtypes)
            merged[name] = found.contiguous().clone()
        except Exception as error:
            errors[name] = f"{type(error).__name__}: {error}"
    save_file(merged, outputs)
    json.dump(errors, sys.stdout)


if __name__ == "__main__":
    main(*sys.argv[1:])
