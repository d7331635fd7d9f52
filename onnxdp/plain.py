"""Records as plain JSON, and a plan's back: what does not mean exactly one record is refused."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from onnxdp.errors import PlanError


def to_plain(value: Any) -> Any:
    """Turn records, mappings and tuples into what ``json.dumps`` takes."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): to_plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(v) for v in value]
    if isinstance(value, np.generic):
        return value.item()
    return value


def read_object(text: str) -> dict[str, Any]:
    """Return the JSON object that a plan's text is.

    Raises
    ------
    PlanError
        It is none, or leaves room for doubt.
    """
    try:
        raw = json.loads(text, object_pairs_hook=_once, parse_constant=_no_constant)
    except (ValueError, RecursionError) as e:
        raise PlanError(f"The plan is not JSON ({e}); write it again with 'onnxdp plan'.") from e
    if not isinstance(raw, dict):
        raise PlanError("The plan is not a JSON object; write it again with 'onnxdp plan'.")
    return raw


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build a JSON object, each key of which may be there once."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(n for n in names if names.count(n) > 1)!r} is there twice in one object")
    return found


def _no_constant(word: str) -> Any:
    raise ValueError(f"{word} is no number of JSON")


def read_record(cls: Any, raw: Any, where: str, *, parts: Sequence[type] = ()) -> Any:
    """Build a record from plain JSON, refusing what does not fit; ``parts`` are the records that it may hold.

    Raises
    ------
    PlanError
        A field is missing or unknown, or its value is of the wrong type.
    """
    if not isinstance(raw, dict):
        raise PlanError(
            f"{where} should be a JSON object and is {raw!r}; write the plan again with 'onnxdp plan'."
        )
    fields = {f.name: f for f in dataclasses.fields(cls)}
    unknown = sorted(set(raw) - set(fields))
    if unknown:
        raise PlanError(f"{where} has an unknown field {unknown[0]!r}; remove it or correct its spelling.")
    values: dict[str, Any] = {}
    for name, f in fields.items():
        if name not in raw:
            if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
                raise PlanError(f"{where} lacks the field {name!r}; write the plan again with 'onnxdp plan'.")
            continue
        values[name] = _field(str(f.type), raw[name], f"{where}.{name}", parts)
    return cls(**values)


def _field(kind: str, value: Any, where: str, parts: Sequence[type]) -> Any:
    """Check one JSON value against the annotation ``kind``."""
    wrong = PlanError(f"{where} is {value!r}, which is not of the kind {kind}; correct it by hand.")
    if kind.startswith("tuple["):
        if not isinstance(value, list):
            raise wrong
        if kind == "tuple[int, ...]":
            return tuple(_field("int", v, f"{where}[{i}]", ()) for i, v in enumerate(value))
        record = next(part for part in parts if kind == f"tuple[{part.__name__}, ...]")
        return tuple(read_record(record, v, f"{where}[{i}]") for i, v in enumerate(value))
    if kind.startswith(("Params", "Mapping")):
        simple: tuple[type, ...] = (
            (int, float, str) if kind == "Params" else (int, float, str, type(None), list)
        )
        if not isinstance(value, dict) or any(
            isinstance(v, bool) and kind == "Params" for v in value.values()
        ):
            raise wrong
        if not all(isinstance(v, simple) for v in value.values()):
            raise wrong
        return value
    if value is None:
        if "None" not in kind:
            raise wrong
        return None
    kinds: dict[str, Any] = {"str": str, "int": int, "float": (int, float)}
    if not isinstance(value, kinds[kind.split(" |")[0]]) or isinstance(value, bool):
        raise wrong
    return float(value) if kind.startswith("float") else value
