"""O-LoRA: a new adapter for each task, whose rows of A are held at right angles to earlier ones (Wang et al. 2023, arXiv:2310.14152).

Task i is trained on loss_i + lambda * sum_{j<i} sum over maps of the sum of |A_j A_i^T|, an (r, r) matrix; the adapters add up.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from recall_merge.files.adapter import WEIGHTS
from recall_merge.training.trained_maps import add_gradient


class Orthogonality(TrainerCallback):
    """Adds the penalty's gradient, lambda sign(A_i A_j^T) A_j, to that of the loss in every training step.

    Args:
        adapters: the folders of earlier tasks' adapters.
    """

    def __init__(self, adapters: Sequence[Path], strength: float) -> None:
        from safetensors.torch import load_file

        found = defaultdict[str, list[Tensor]](list)
        for folder in adapters:
            for name, tensor in load_file(folder / WEIGHTS).items():
                if (map_ := name.removesuffix(".lora_A.weight")) != name:
                    found[map_].append(tensor.float())
        self._rows = {map_: torch.cat(rows) for map_, rows in found.items()}  # (j r, i)
        self._strength = strength

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        for name, parameter in model.named_parameters():
            map_, found, _ = name.partition(".lora_A.")
            if found and parameter.requires_grad:
                rows = self._rows[map_] = self._rows[map_].to(parameter.device)
                signs = torch.sign(parameter.detach().float() @ rows.mT)
                add_gradient(parameter, self._strength * signs @ rows)
