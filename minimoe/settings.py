"""Settings as frozen dataclasses: values checked against their declared types, plain dicts in and out.

A bad value, an unknown key or an impossible combination is a `ConfigError`: one line that names the key and the remedy.
"""
from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from typing import Literal


class ConfigError(ValueError):
    """A setting that cannot be used. The message is one line: what is wrong and what to write instead."""


def need(condition: bool, message: str) -> None:
    """Raises ConfigError(message) unless the condition holds."""
    if not condition:
        raise ConfigError(message)


def _fits(value: object, hint: object) -> bool:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, a) for a in args)
    if origin is Literal:
        return value in args
    if origin is tuple:
        return isinstance(value, tuple) and (args[-1] is Ellipsis or len(value) == len(args))
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _spell(hint: object) -> str:
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, typing.get_args(hint)))
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join("null" if a is type(None) else _spell(a) for a in typing.get_args(hint))
    return {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}.get(hint, str(hint))


def check_choices(config: object) -> None:
    """Every field holds a value of its declared type, else a ConfigError that names field, value and what is possible."""
    hints = typing.get_type_hints(type(config))
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        need(_fits(value, hints[f.name]), f"{f.name}={value!r}: must be {_spell(hints[f.name])}")


def from_dict(cls: type, values: object, where: str = "config") -> object:
    """Builds a config dataclass from plain dicts and lists; an unknown key names the nearest known one."""
    need(isinstance(values, dict), f"{where}: expected keys and values, found {type(values).__name__}")
    hints, known = typing.get_type_hints(cls), [f.name for f in dataclasses.fields(cls)]
    built = {}
    for key, value in values.items():
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else "known keys: " + ", ".join(known)
            raise ConfigError(f"{where}: unknown key {key!r}; {hint}")
        if dataclasses.is_dataclass(hints[key]):
            value = from_dict(hints[key], value or {}, f"{where}, section {key!r}")
        elif isinstance(value, list) and dataclasses.is_dataclass((typing.get_args(hints[key]) or (None,))[0]):
            value = tuple(from_dict(typing.get_args(hints[key])[0], v, f"{where}, {key}") if isinstance(v, dict) else v
                          for v in value)
        elif isinstance(value, list):
            value = tuple(value)
        elif isinstance(value, str) and hints[key] in (float, float | None):      # YAML reads 1e-3 as a text
            try:
                value = float(value)
            except ValueError:
                pass
        built[key] = value
    try:
        return cls(**built)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}" if not str(error).startswith(where) else str(error)) from None


def to_dict(config: object) -> dict:
    """Plain dicts, lists and numbers, ready for YAML or JSON."""
    return _lists(dataclasses.asdict(config))


def _lists(value: object) -> object:
    if isinstance(value, dict):
        return {k: _lists(v) for k, v in value.items()}
    return [_lists(v) for v in value] if isinstance(value, (list, tuple)) else value
