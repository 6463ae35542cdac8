"""The folders of the package's files, in a checkout or an installed wheel."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def _folder(name: str) -> Path:
    """Returns a top-level folder of the checkout, which a wheel has inside the package."""
    installed = _PACKAGE / name
    return installed if installed.is_dir() else _PACKAGE.parent / name


def expanded(name: str) -> Path:
    """Returns a path with ~ expanded, unless there is no such user."""
    path = Path(name)
    try:
        return path.expanduser()
    except RuntimeError:
        return path


def tasks_dir() -> Path:
    """Returns the folder of the task YAML files."""
    return _folder("tasks")


def recipes_dir() -> Path:
    """Returns the folder of the training recipes."""
    return _folder("launch") / "recipes"


def demo_dir() -> Path:
    """Returns the folder of the embedded demo data."""
    return _PACKAGE / "data" / "demo"


def cache_dir() -> Path:
    """Returns this project's cache folder of the user, which may not exist yet."""
    import pooch

    return Path(pooch.os_cache("qlora-harness"))
