"""What all records have in common, and how one is read from its file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from qlora_harness.errors import ResultsError, shown
from qlora_harness.record import SCHEMA_VERSION, read_json

# Nothing that is measured here comes near; sums and squares of smaller numbers stay finite.
LARGEST = 1e100
Number = Annotated[float, Field(ge=-LARGEST, le=LARGEST, allow_inf_nan=False)]
Amount = Annotated[float, Field(ge=0, le=LARGEST, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0)]

_Record = TypeVar("_Record", bound="Header")


class Section(BaseModel):
    """A part of a record. Keys that this version doesn't know are kept."""

    model_config = ConfigDict(extra="allow", strict=True, use_attribute_docstrings=True)


class Header(Section):
    """What each record begins with."""

    schema_version: Annotated[int, Field(ge=1, le=SCHEMA_VERSION)] = SCHEMA_VERSION
    """Of the record; a reader refuses a newer one than it knows."""
    kind: str
    """What the file is."""

    def content(self) -> dict[str, Any]:
        """Returns the record as JSON: its version and kind, then what has been set."""
        head = {"schema_version": self.schema_version, "kind": self.kind}
        return head | self.model_dump(mode="json", exclude_unset=True)


class GgufFile(Section):
    """The GGUF file that a base was expanded from."""

    sha256: str
    tensor_types: dict[str, Count]
    """Number of weights of each type, such as Q4_K."""

    @property
    def quantised_types(self) -> list[str]:
        """The types in which weights have lost precision."""
        return [name for name in self.tensor_types if name not in ("F32", "F16", "BF16")]


class Environment(Section):
    """Where something was computed."""

    versions: dict[str, str] = {}
    """Of the packages that decide the numbers, by distribution."""
    git: dict[str, Any] = {}
    """Revision of qlora-harness, and whether it had uncommitted changes."""
    platform: str | None = None
    machine: str | None = None
    cpu_count: int | None = None
    """Logical cores of the host."""
    cpu_threads: Count | None = None
    """Threads that computed on the CPU."""
    command: str | None = None
    """The command line, without tokens and the home folder."""
    device: dict[str, Any] | None = None
    """Name, type, hashed id and memory of the device."""
    sharded_base: bool = False
    """Whether the base was spread over the processes (FSDP2)."""
    world_size: Count | None = None

    @field_validator("device", mode="before")
    @classmethod
    def _named(cls, device: object) -> object:
        """Evaluations of November 2026 have only the name."""
        return {"name": device} if isinstance(device, str) else device


def read_record(path: Path, model: type[_Record]) -> _Record:
    """Reads and checks one of this project's own records, or raises ResultsError with the field."""
    record = read_json(path, finite=True)
    kind = model.model_fields["kind"].default
    if record.get("kind") != kind:
        raise ResultsError(
            f'{path}: "kind" is {shown(record.get("kind"))}, not "{kind}"',
            "The file comes from another program; name the folder of a run of qlora-harness",
        )
    version = record.get("schema_version")
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise ResultsError(
            f"{path}: schema_version {version} is newer than this program knows ({SCHEMA_VERSION})",
            "Update qlora-harness",
        )
    try:
        return model.model_validate(record)
    except ValidationError as error:
        raise ResultsError(
            f"{path}: {first_problem(error)}",
            "The file is damaged or comes from another program; recreate or remove it",
        ) from None


def first_problem(error: ValidationError) -> str:
    """Returns the first field that is wrong, the value seen there, and what is wrong with it."""
    first = error.errors()[0]
    field = ".".join(map(str, first["loc"]))
    seen = "" if isinstance(first["input"], Mapping) else f"is {shown(first['input'])}"
    return " ".join(part for part in (field, seen, f"({first['msg']:.200})") if part)


def flatten(value: object, prefix: str) -> Iterator[tuple[str, object]]:
    """Yields the leaves of nested objects as ("prefix.a.b", value); lists are leaves."""
    if not isinstance(value, Mapping):
        yield prefix, value
        return
    for key, inner in value.items():
        yield from flatten(inner, f"{prefix}.{key}")
