"""A run from a YAML recipe and ``key=value`` overrides, with every fault at once."""

from __future__ import annotations

import ast
import difflib
import inspect
import itertools
import textwrap
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError

from invar_ray.config.faults import explain_invalid, known_only
from invar_ray.config.run import Config, cross_checks
from invar_ray.errors import ConfigError

ARM_SECTIONS = {"model", "retriever", "experimental"}
"""What one of ``evaluation.arms`` may change: all that makes a stage 1 from the same data."""
_ADAPTER: TypeAdapter[Config] = TypeAdapter(Config)


def recipe_names() -> list[str]:
    """Names of the recipes that come with the package, sorted."""
    folder = resources.files("invar_ray") / "recipes"
    return sorted(
        entry.name.removesuffix(".yaml")
        for entry in folder.iterdir()
        if entry.name.endswith(".yaml")
    )


def load_config(recipe: str = "tiny", overrides: Sequence[str] = ()) -> Config:
    """Load a recipe and apply overrides.

    Args:
        recipe: name of a recipe of the package (see :func:`recipe_names`) or path of a YAML file.
            ``extends:`` in it names another one, which it then changes.
        overrides: ``dotted.key=value`` strings; values are YAML (``null``, ``true``, ``[a, b]``).

    Raises:
        ConfigError: with every fault of recipe and overrides at once, each with its dotted key and,
            for an unknown key, the nearest valid one; or a recipe that is not there, is not YAML or
            extends itself.
    """
    values = _read_recipe(recipe)
    faults: list[str] = []
    known = config_keys()
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator:
            faults.append(f"override {override!r}: expected key=value")
            continue
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            faults.append(f"{key}: value {text!r} is not YAML ({str(error).splitlines()[0]})")
            continue
        if isinstance(value, str) and " #" in text and text[:1] not in {"'", '"'}:
            value = text.strip()  # a path may hold what YAML takes for a remark
        _set_path(values, key.strip(), value, faults)
    values = known_only(values, known, "", faults)
    invalid: dict[str, str] = {}
    try:
        config = _ADAPTER.validate_python(values)
    except ValidationError as error:
        invalid = explain_invalid(error, known)
        faults += [f"{key}: {said}" for key, said in invalid.items()]
        # The rest is checked with the defaults of those.
        config = _ADAPTER.validate_python(_without(values, invalid, ""))
    faults += [fault for fault in cross_checks(config) if not any(key in fault for key in invalid)]
    for name in config.evaluation.arms:
        faults += _arm_faults(config, name, known)
    if faults:
        listing = "\n".join(f"  - {fault}" for fault in faults)
        raise ConfigError(
            f"{len(faults)} fault{'s'[: len(faults) > 1]} in recipe {recipe!r} and its "
            f"overrides:\n{listing}\n",
            action="correct them all and run again; every field is explained in invar_ray/config/",
        )
    return config


@dataclass(frozen=True, slots=True)
class Setting:
    """A setting as :func:`explain_settings` lists it.

    Attributes:
        key: with its sections, e.g. ``retriever.steps``.
        value: in this config.
        default: of the class, before any recipe.
        meaning: its docstring, on one line.
    """

    key: str
    value: Any
    default: Any
    meaning: str


def explain_settings(config: Config) -> list[Setting]:
    """Every setting of a config with its meaning and default, in the order of the classes."""
    return list(_settings_of(config, Config(), ""))


def _settings_of(section: Any, default: Any, prefix: str) -> Iterator[Setting]:
    meanings = _meanings(section.__class__)
    for entry in fields(section):
        value, usual = getattr(section, entry.name), getattr(default, entry.name)
        if is_dataclass(value):
            yield from _settings_of(value, usual, f"{prefix}{entry.name}.")
        else:
            meaning = meanings.get(entry.name, "")
            yield Setting(f"{prefix}{entry.name}", to_plain(value), to_plain(usual), meaning)


@cache
def _meanings(section: type[Any]) -> dict[str, str]:
    """Name of a field -> the docstring that stands below it in the source."""
    body = ast.parse(textwrap.dedent(inspect.getsource(section))).body[0]
    assert isinstance(body, ast.ClassDef)
    found = {}
    for entry, text in itertools.pairwise(body.body):
        match entry, text:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=said)):
                found[name] = " ".join(str(said).split())
    return found


def to_plain(value: Any) -> Any:
    """A field's value as JSON has it."""
    return list(value) if isinstance(value, tuple) else value


def arm_config(config: Config, name: str) -> Config:
    """The run of one of ``evaluation.arms``: another stage 1 over the same data."""
    values = _merged(asdict(config), config.evaluation.arms[name])
    values["evaluation"]["arms"] = {}
    return _ADAPTER.validate_python(values)


def _arm_faults(config: Config, name: str, known: Sequence[str]) -> list[str]:
    faults: list[str] = []
    change, at = config.evaluation.arms[name], f"evaluation.arms.{name}"
    if other := sorted(set(change) - ARM_SECTIONS):
        return [f"{at}: changes {', '.join(other)}, expected {', '.join(sorted(ARM_SECTIONS))}"]
    known_only(change, known, "", faults)
    if not faults:
        try:
            faults = cross_checks(arm_config(config, name))
        except ValidationError as error:
            faults = [f"{key}: {said}" for key, said in explain_invalid(error, known).items()]
    return [f"{at}.{fault}" for fault in faults]


def to_dict(config: Any) -> dict[str, Any]:
    """A (part of a) config as plain JSON-able values, for manifests and fingerprints."""
    return {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in _plain(asdict(config)).items()
    }


def config_keys() -> list[str]:
    """Every dotted key that a recipe may set, sections included."""
    return sorted(_keys(Config, ""))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def _keys(section: type[Any], prefix: str) -> Iterable[str]:
    hints = get_type_hints(section)
    for entry in fields(section):
        path = f"{prefix}{entry.name}"
        yield path
        if is_dataclass(hints[entry.name]):
            yield from _keys(hints[entry.name], f"{path}.")


def _read_recipe(recipe: str, above: tuple[str, ...] = ()) -> dict[str, Any]:
    """The values of a recipe over those of the recipe that it extends.

    Args:
        recipe: a name or a path.
        above: the recipes that extend this one, nearest last.
    """
    if recipe in above:
        raise ConfigError(
            f"recipe {recipe!r} extends itself: {' -> '.join((*above, recipe))}",
            action="take one extends: out",
        )
    values = _parse(recipe, _text(recipe, above))
    if "extends" not in values:
        return values
    other = values.pop("extends")
    if not isinstance(other, str):
        raise ConfigError(
            f"recipe {recipe!r} extends {other!r}", expected="the name or path of one recipe"
        )
    if other not in recipe_names() and recipe not in recipe_names():
        # A path counts from the recipe that names it.
        other = str((Path(recipe).parent / Path(other).expanduser()).resolve())
    return _merged(_read_recipe(other, (*above, recipe)), values)


def _text(recipe: str, above: tuple[str, ...]) -> str:
    if recipe in recipe_names():
        return (resources.files("invar_ray") / "recipes" / f"{recipe}.yaml").read_text(
            encoding="utf-8"
        )
    path = Path(recipe)
    if not path.is_file():
        close = difflib.get_close_matches(path.name, recipe_names(), n=1)
        hint = f"; did you mean {close[0]!r}" if close else ""
        asked = f" (which {above[-1]!r} extends)" if above else ""
        raise ConfigError(
            f"no recipe {recipe!r}{asked}{hint}",
            expected=f"one of {', '.join(recipe_names())}, or the path of a YAML file",
        )
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"recipe {recipe!r} cannot be read ({error})", expected="a YAML file in UTF-8"
        ) from error


def _parse(recipe: str, text: str) -> dict[str, Any]:
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"recipe {recipe!r} is not YAML: {error}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(
            f"recipe {recipe!r} holds a {type(values).__name__}", expected="a mapping of sections"
        )
    return values


def _merged(base: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    """``base`` with what ``change`` sets; sections are merged, lists and values replaced."""
    merged = dict(base)
    for key, value in change.items():
        below = merged.get(key)
        if isinstance(value, dict) and isinstance(below, dict):
            value = _merged(below, value)
        merged[key] = value
    return merged


def _without(values: Mapping[str, Any], keys: Collection[str], prefix: str) -> dict[str, Any]:
    """``values`` without some dotted keys."""
    return {
        key: _without(value, keys, f"{prefix}{key}.") if isinstance(value, Mapping) else value
        for key, value in values.items()
        if f"{prefix}{key}" not in keys
    }


def _set_path(values: dict[str, Any], key: str, value: Any, faults: list[str]) -> None:
    *sections, last = key.split(".")
    for name in sections:
        inner = values.setdefault(name, {})
        if not isinstance(inner, dict):
            faults.append(f"{key}: {name} is not a section")
            return
        values = inner
    values[last] = value
