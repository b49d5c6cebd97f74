"""A weighted sum of models as a run file for mergekit, another merging tool: github.com/arcee-ai/mergekit.

Its `linear` takes a weight per model, a list of weights over the blocks, or either of them per part of a tensor's name. A list is read at
i / (L - 1), so a list of L numbers is exact. Tensors outside the blocks would get the first block's number, so each is listed by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from recall_merge.maths.layers import Layers


def linear_run(shares: Mapping[str, Sequence[float]], merged: Sequence[str], kept: Sequence[str], layers: Layers, dtype: str) -> str:
    """The text of the file.

    Args:
        shares: reference of a model -> its share at every layer 0..L+1; the first is the base.
        merged: names of all tensors that are merged.
        kept: names of those that stay the base's.
        dtype: of the result. Sums run in float32.
    """
    outside = [name for name in merged if not 1 <= layers.of(name) <= layers.blocks]
    base = next(iter(shares))
    models = []
    for reference, numbers in shares.items():
        weight: list[dict[str, Any]] = [{"filter": name, "value": 1.0 if reference == base else 0.0} for name in kept]
        weight += [{"filter": name, "value": float(numbers[layers.of(name)])} for name in outside]
        inside = [float(number) for number in numbers[1:-1]]
        weight.append({"value": inside if len(set(inside)) > 1 else inside[0]})
        models.append({"model": reference, "parameters": {"weight": weight}})
    if not kept and not any(shares[base]):
        del models[0]
    run = {"merge_method": "linear", "models": models, "parameters": {"normalize": False}, "dtype": "float32", "out_dtype": dtype}
    return yaml.safe_dump(run | {"tokenizer_source": base}, sort_keys=False, width=140, default_flow_style=None)
