"""Recipes: settings in YAML files, which may extend each other."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from qlora_harness.errors import SettingsError, shown
from qlora_harness.locations import recipes_dir
from qlora_harness.settings import setting_fields
from qlora_harness.settings_checks import unknown_name

_LARGEST_RECIPE = 100_000  # bytes


class _RecipeLoader(yaml.SafeLoader):
    """Reads every value but null as text, and refuses a repeated key.

    YAML reads the revision 0123456 as 42798, and the language no as false.
    """

    yaml_implicit_resolvers = {  # noqa: RUF012  # declared in the base class
        first: [(tag, pattern) for tag, pattern in resolvers if tag.endswith(":null")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        keys = Counter(
            key.value.replace("-", "_") for key, _ in node.value if isinstance(key, yaml.ScalarNode)
        )
        if twice := [key for key, count in keys.items() if count > 1]:
            raise yaml.YAMLError(f"key {shown(twice[0])} is repeated")
        return super().construct_mapping(node, deep)


def read_recipe(
    path: Path, extending: tuple[Path, ...] = ()
) -> tuple[dict[str, Any], dict[str, str]]:
    """Reads a YAML recipe: its settings by name, and the file and key that each came from.

    `extending` are the recipes whose `extends` led here. Raises SettingsError.
    """
    path = path.resolve()
    if path in extending:
        raise SettingsError(f"recipe {path} extends itself", "Remove its 'extends' key")
    content = load_yaml(path, "recipe")
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    base = content.pop("extends", None)
    if base is not None:
        source = f"recipe {path}, key 'extends'"
        beside = _recipe_in(path.parent, str(base)) or find_recipe(str(base), source)
        values, sources = read_recipe(beside, (*extending, path))
    known = setting_fields()
    changes: dict[str, Any] = {}
    for key, value in content.items():
        name = str(key).replace("-", "_")
        sources[name] = f"recipe {path}, key {shown(str(key))}"
        if name not in known:
            raise unknown_name(name, sources[name], known)
        changes[name] = value
    return _merged(values, changes), sources


def load_yaml(path: Path, kind: str) -> dict[Any, Any]:
    """Reads a YAML mapping with values as text; `kind` names the file in errors: SettingsError."""
    try:
        with path.open("rb") as file:
            content = file.read(_LARGEST_RECIPE + 1)
        if len(content) > _LARGEST_RECIPE:
            raise SettingsError(
                f"{kind} {path} has more than {_LARGEST_RECIPE:,} bytes", f"Name a {kind}"
            )
        loaded = yaml.load(content.decode(), Loader=_RecipeLoader)
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{kind} {path} can't be read: {error}", "Check the file") from None
    except (yaml.YAMLError, ValueError, RecursionError, OverflowError) as error:
        reason = "brackets too deep" if isinstance(error, RecursionError) else error
        raise SettingsError(f"{kind} {path} is not YAML: {reason}", "Correct the file") from None
    if not isinstance(loaded, dict):
        raise SettingsError(
            f"{kind} {path} holds a {type(loaded).__name__}, not 'name: value' lines",
            "Correct the file",
        )
    return loaded


def _merged(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Returns values with changes applied; epochs replace max_steps, and the reverse."""
    merged = dict(values)
    for name, other in (("epochs", "max_steps"), ("max_steps", "epochs")):
        if name in changes and other not in changes:
            merged.pop(other, None)
    return merged | dict(changes)


def with_recipe(
    recipe: str | None, given: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, str]]:
    """Returns a recipe (name, path or None) overridden by settings, and the recipe's sources."""
    values, sources = ({}, {}) if recipe is None else read_recipe(find_recipe(recipe))
    return _merged(values, given), sources


def find_recipe(name: str, source: str = "--recipe") -> Path:
    """Returns the file of a recipe, given by path or by its name in launch/recipes.

    Raises SettingsError if there is none; `source` is the flag or the recipe key that named it.
    """
    folder = recipes_dir()
    path = Path(name) if os.path.isfile(name) else _recipe_in(folder, name)
    if path is None:
        names = sorted(p.stem for p in folder.glob("*.yaml"))
        raise SettingsError(
            f"{source}: there is no recipe {shown(name)}",
            f"Name a YAML file or one of {', '.join(names)}",
        )
    return path


def _recipe_in(folder: Path, name: str) -> Path | None:
    paths = (folder / name, folder / f"{name}.yaml")
    return next((path for path in paths if os.path.isfile(path)), None)
