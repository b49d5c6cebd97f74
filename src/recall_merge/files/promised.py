"""What an adapter's config says that it trains must be in its file: PEFT leaves out what is not there without a word."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from recall_merge.files.checkpoint import Checkpoint
from recall_merge.files.edits import COPY_AGAIN
from recall_merge.files.names import Names

BLOCKS = f"{COPY_AGAIN}, or list only the blocks that it has under `layers_to_transform` of its config"
UNTRAINED = f"{COPY_AGAIN}; or take it out of the adapter's config, if it was not trained"
FULL_MATCH = Callable[[str, str], bool]


class Promises:
    """Compares an adapter's config with the parts that its file holds.

    `modules` gives those with factors and the base's tensor of each, `placed` every tensor of the base with a kind of part.
    """

    def __init__(self, config: Mapping[str, Any], base: Checkpoint, names: Names, matches: FULL_MATCH) -> None:
        self._config, self._base, self._names, self._matches = config, base, names, matches

    def broken(self, modules: Mapping[str, str], placed: Collection[tuple[str, str]]) -> Iterator[tuple[str, str]]:
        """What is wrong, in words, and the fix; the first few of each kind."""
        whole = {name for name, kind in placed if kind in ("weight", "bias")}
        factors = {*modules.values(), *(name for name, kind in placed if kind == "lora_A")}
        for module in sorted({*self._missing_in_blocks(modules), *self._missing_in_all(factors)})[:3]:
            yield f"the adapter lacks '{module}', which its config says it changes", BLOCKS
        for key, part in (("use_dora", "lora_magnitude_vector"), ("lora_bias", "lora_B.bias")):
            wanted = bool(self._config.get(key))
            wrong = [name for name in modules.values() if wanted != ((_bias(name) if key == "lora_bias" else name, part) in placed)]
            if wrong:
                what = f"the adapter {'lacks' if wanted else 'holds'} the {part} of '{wrong[0]}'"
                yield f"{what}, though its config has `{key}: {str(wanted).lower()}`", COPY_AGAIN
        for name in sorted(self._trained_biases(modules) - whole)[:3]:
            yield f"the adapter lacks '{name}', though its config has `bias: {self._config['bias']}`", UNTRAINED
        for name in sorted(self._saved() - whole)[:3]:
            yield f"the adapter lacks '{name}', which its config names under `modules_to_save`", UNTRAINED
        if self._config.get("trainable_token_indices") and not any("trainable_tokens" in kind for _, kind in placed):
            yield "the adapter lacks the tokens that its config names under `trainable_token_indices`", COPY_AGAIN

    def _missing_in_blocks(self, modules: Mapping[str, str]) -> Iterator[str]:
        """Modules that the adapter has in some blocks only, though its config means those of other blocks too."""
        layers = self._base.layers
        for module, name in modules.items():
            if 1 <= (layer := layers.of(name)) <= layers.blocks and f".{layer - 1}." in module:
                for block in set(range(layers.blocks)) - {layer - 1}:
                    there, theirs = (path.replace(f".{layer - 1}.", f".{block}.", 1) for path in (module, name))
                    if there not in modules and theirs in self._base.tensors and self._targets(there, block):
                        yield there

    def _missing_in_all(self, factors: Collection[str]) -> Iterator[str]:
        """Modules of the text model that the config spells out and that have no factors, by the names that transformers gives them.

        It is asked only if the files' names say that something is missing. Lists within a block, as of experts, may be one in memory.
        """
        for name in sorted(filter(self._is_of_text, self._base.tensors.keys() - set(factors))):
            block = self._block(name)
            nested = block is not None and any(part.isdigit() for part in name.split(f".{block}.", 1)[1].split("."))
            if nested or len(self._base.tensors[name].spec.shape) != 2 or not self._targets_weight(name, block):
                continue
            places = [model.place(name)[0] for model in self._names.models if model.place(name)[0] in model.parameters]
            yield from (place.removesuffix(".weight") for place in places[:1] if self._targets_weight(place, block))
            if not self._names.models:
                yield name.removesuffix(".weight")

    def _targets_weight(self, name: str, block: int | None) -> bool:
        """Whether the config names, by more than their kind, a module by its weight."""
        spelt = self._config.get("target_modules") != "all-linear"
        return spelt and name.endswith(".weight") and self._targets(name.removesuffix(".weight"), block)

    def _block(self, name: str) -> int | None:
        layers = self._base.layers
        return layers.of(name) - 1 if name.startswith(f"{layers.prefix}.") and layers.of(name) <= layers.blocks else None

    def _is_of_text(self, name: str) -> bool:
        """Whether a tensor is of the text model: its blocks, embeddings, final norm or head."""
        layers = self._base.layers
        after = layers.of(name) == layers.last and not name.startswith(f"{layers.prefix}.")
        return self._block(name) is not None or after or name in self._base.token_tensors

    def _targets(self, module: str, block: int | None) -> bool:
        """Whether the config means a module, as PEFT decides it."""
        wanted, only = self._config.get("target_modules") or (), self._config.get("layers_to_transform")
        saved = self._config.get("modules_to_save") or ()
        if self._fits(self._config.get("exclude_modules"), module) or any(f".{each}." in f".{module}." for each in saved):
            return False
        if isinstance(wanted, str) or module in wanted or only is None or only == []:
            return wanted == "all-linear" or self._fits(wanted, module)
        return self._fits(wanted, module) and block is not None and (block == only or (isinstance(only, list) and block in only))

    def _fits(self, wanted: Any, module: str) -> bool:
        if isinstance(wanted, str):
            return self._matches(wanted, module)
        return any(module == each or module.endswith(f".{each}") for each in wanted or ())

    def _trained_biases(self, modules: Mapping[str, str]) -> set[str]:
        biases = {"lora_only": map(_bias, modules.values()), "all": (name for name in self._base.tensors if name.endswith(".bias"))}
        return {name for name in biases.get(str(self._config.get("bias")), ()) if name in self._base.tensors and self._is_of_text(name)}

    def _saved(self) -> set[str]:
        """The tensors of modules that the adapter trains whole: PEFT means all modules whose names end so."""
        saved = tuple(f"{module}." for module in self._config.get("modules_to_save") or ())
        return {name for name in filter(self._is_of_text, self._base.tensors) if any(module in name for module in saved)}


def _bias(weight: str) -> str:
    return f"{weight.removesuffix('weight')}bias"
