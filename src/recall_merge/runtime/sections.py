"""Strict settings: sections of YAML files that refuse unknown keys; pydantic's faults become ours."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from copy import deepcopy
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from recall_merge.runtime.errors import Fault, RunError, did_you_mean, short
from recall_merge.runtime.safe_yaml import MAX_BYTES, NotYaml, parse_yaml

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]

M = TypeVar("M", bound=BaseModel)


class Section(BaseModel):
    """One part of a run: frozen, and strict about its keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def read_mapping(path: Path, kind: str, form: str) -> dict[str, Any]:
    """The keys and values of a YAML file that describes a `kind` of thing (a run, a scenario); the page `form` documents such files.

    Raises RunError if the file is missing, is not YAML, or holds no mapping.
    """
    try:
        if path.exists() and not path.is_file():  # a pipe would never end
            raise NotYaml("it is not a file")
        with path.open("rb") as file:
            data = parse_yaml(file.read(MAX_BYTES + 1).decode("utf-8"))
    except FileNotFoundError:
        raise RunError(f"this {kind} file does not exist", where=path, fix="give the path of a YAML file") from None
    except (OSError, UnicodeDecodeError, NotYaml) as error:
        raise RunError(f"this is not readable YAML: {' '.join(str(error).split())}", where=path, fix=f"see {form} for the form") from error
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        raise RunError(f"a {kind} file must hold a mapping of keys to values", where=path, fix=f"see {form} for the form")
    return data


def parse(model: type[M], data: Any, *, where: str) -> M:
    """Validate data. Raises RunError with all faults; an unknown key comes with a suggestion."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        wrong = RunError(_to_fault(model, detail, data, where) for detail in error.errors())
        if unknown := [_place(detail, data) for detail in error.errors() if detail["type"] == "extra_forbidden"]:
            for resembles in (False, True):  # the last that is valid
                with suppress(ValidationError):
                    wrong.rest = model.model_validate(_without(model, data, unknown, resembles))
        raise wrong from None


def _without(model: type[BaseModel], data: Any, places: list[list[Any]], resembles: bool) -> Any:
    """Data without unknown keys; what is under one goes to the key that it `resembles`, if that is free."""
    data = deepcopy(data)
    for *parents, key in places:
        section: Any = data
        for part in parents:
            section = section[part]
        if not isinstance(section, dict) or key not in section:  # a key with the name of a union's branch
            continue
        value, near = section.pop(key), get_close_matches(str(key), _known_keys(model, parents), n=1)
        if near and resembles:
            section.setdefault(near[0], value)
    return data


def _place(detail: Any, data: Any) -> list[Any]:
    """The keys that lead to a fault: what the data has, without what pydantic puts in between to name the branch of a union."""
    named = detail["type"] in {"extra_forbidden", "missing"}  # then the last part is a key, whatever it is called
    parts = [*detail["loc"]]
    last = [parts.pop()] if named else []
    place: list[Any] = []
    for part in parts:
        if part in (data if isinstance(data, dict) else range(len(data)) if isinstance(data, list) else ()):
            place.append(part)
            data = data[part]
    return place + last


def _to_fault(model: type[BaseModel], detail: Any, data: Any, where: str) -> Fault:
    place = _place(detail, data)
    key = ".".join(map(str, place))
    if detail["type"] == "extra_forbidden":
        return Fault(f"unknown key '{key}'", where, did_you_mean(str(place[-1]), _known_keys(model, place[:-1])))
    if detail["type"] == "missing":
        return Fault(f"'{key}' is missing", where, "add it")
    fix = detail.get("ctx", {}).get("fix") or f"it is {short(detail['input'])} now"
    return Fault(f"'{key}': {detail['msg'].removeprefix('Value error, ')}", where, fix)


def _known_keys(model: type[BaseModel], place: list[Any]) -> list[str]:
    """The keys allowed at a place of a model, in whichever branch of a union it lies."""
    models = [model]
    for part in place:
        fields = [each.model_fields[part] for each in models if part in each.model_fields]
        models = [section for field in fields for section in _sections(field.annotation)] or models
    return [key for each in models for key in each.model_fields]


def _sections(annotation: Any) -> Iterator[type[BaseModel]]:
    """The sections that an annotation names, also inside lists, unions and `Annotated`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _sections(inner)


def assign(data: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key in nested mappings."""
    *parents, last = key.split(".")
    for parent in parents:
        data = data.setdefault(parent, {})
        if not isinstance(data, dict):
            raise RunError(f"--set {key}: '{parent}' is not a mapping", fix="set the key itself")
    data[last] = value
