"""Where a base model comes from: the Hub, a folder, a GGUF file or the embedded SmolLM2."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_harness.errors import ModelError, first_line
from qlora_harness.locations import expanded
from qlora_harness.model.gguf import expand_gguf
from qlora_harness.model.rope import scale
from qlora_harness.model.smollm2 import smollm2_file

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EMBEDDED = "smollm2"
RANDOM_WEIGHTS_KEY = "qlora_harness_random_weights"
WEIGHTS_SEED_KEY = "qlora_harness_weights_seed"  # of weights that are made while they are loaded


@dataclass(frozen=True)
class BaseSource:
    """Where a base model comes from."""

    name: str  # as the user named it
    path: str  # what transformers loads: a folder or a Hub id
    revision: str | None  # branch, tag or commit, as the user named it
    commit: str | None  # the commit that the Hub resolved it to; None for a folder
    random_weights: bool  # as its configuration declares
    argument: str = "--model"  # the flag or model argument that named it, for messages
    gguf: dict[str, Any] | None = None  # of `expand_gguf`: hash and tensor types of the file
    weights_seed: int | None = None  # of a folder without weights, which are made when loaded

    @property
    def recorded_name(self) -> str:
        """The name in records: that of a GGUF file, without its folder."""
        return self.name if self.gguf is None else expanded(self.name).name

    def record(self) -> dict[str, Any]:
        """Returns the fields to store: all but the path, which is local, and the argument."""
        record = asdict(self) | {"name": self.recorded_name}
        local = ("path", "argument", "weights_seed", *(["gguf"] if self.gguf is None else []))
        return {name: value for name, value in record.items() if name not in local}

    @property
    def shown(self) -> str:
        """The flag with its value: "--model: 'x'", or "--model_args pretrained=x"."""
        return _flag_and_value(self.argument, self.name)


def find_base(name: str, revision: str | None = None, *, argument: str = "--model") -> BaseSource:
    """Resolves a Hub id, a folder, a GGUF file or "smollm2", and reads the configuration.

    Expands a GGUF file into a folder, once. Raises ModelError if the model is missing, gated or
    already quantised, or has no readable configuration; the message names `argument`.
    """
    from transformers import AutoConfig

    path = expanded(name)
    if revision is not None and (name == EMBEDDED or path.exists()):
        raise ModelError(
            f"{argument}: {name!r} is not on the Hub and has no revision {revision!r}",
            "Leave the revision out",
        )
    if name == EMBEDDED or path.is_file():
        file = smollm2_file() if name == EMBEDDED else path
        folder, gguf = expand_gguf(file, _flag_and_value(argument, name))
        return BaseSource(name, str(folder), None, None, False, argument, gguf)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(
                f"{argument}: folder {name} holds no config.json",
                "Name a Hugging Face model folder, or a .gguf file",
            )
        name_or_path = str(path)
    elif name.startswith((".", "/", "~")) or name.endswith(".gguf"):
        flag = argument if argument.endswith("=") else f"{argument}: "
        raise ModelError(f"{flag}{name} does not exist", "Name a folder, a GGUF file or a Hub id")
    else:
        name_or_path = name
    try:
        config = AutoConfig.from_pretrained(
            name_or_path, revision=revision or "main", trust_remote_code=False
        )
    except Exception as error:  # noqa: BLE001  # the Hub client and the parsers raise many kinds
        raise unreadable(_flag_and_value(argument, name), error, remedy_of(argument)) from None
    if getattr(config, "quantization_config", None):
        # transformers would load it as it is and ignore `quant`.
        raise ModelError(
            f"{_flag_and_value(argument, name)} is already quantised (its config.json has a "
            "quantization_config)",
            "Name the model that it was made from",
        )
    return BaseSource(
        name,
        name_or_path,
        revision,
        getattr(config, "_commit_hash", None),
        bool(getattr(config, RANDOM_WEIGHTS_KEY, False)),
        argument,
        weights_seed=getattr(config, WEIGHTS_SEED_KEY, None),
    )


def read_config(source: BaseSource, rope_scaling: str | None) -> Any:
    """Returns the configuration of a base that `find_base` has read, with its RoPE scaling.

    Raises ModelError if the base can't have it.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(
        source.path, revision=source.revision or "main", trust_remote_code=False
    )
    if rope_scaling is not None:
        scale(config, rope_scaling, source.shown)
    return config


def unreadable(shown: str, error: Exception, remedy: str) -> ModelError:
    """Returns the error for a model or tokenizer that transformers can't load."""
    if _is_refused_by_hub(error):
        return ModelError(
            f"{shown} is gated on the Hub and this account has no access",
            "Accept its licence on its Hub page and log in with `hf auth login`, or give a local "
            "folder",
        )
    if "trust_remote_code" in str(error):
        return ModelError(
            f"{shown} comes with its own code, which is never run",
            "Use a model and a tokenizer that transformers implements",
        )
    return ModelError(f"{shown} can't be loaded ({first_line(error)})", remedy)


def remedy_of(argument: str) -> str:
    """Returns what to do about a base that can't be loaded."""
    revision = "revision=" if argument.endswith("=") else "--revision"
    return f"Check the name, {revision} and the network, or give a local folder"


def _flag_and_value(argument: str, name: str) -> str:
    return f"{argument}{name}" if argument.endswith("=") else f"{argument}: {name!r}"


def _is_refused_by_hub(error: BaseException) -> bool:
    """Whether any exception in the chain says that the Hub denied access."""
    current: BaseException | None = error
    while current is not None:
        status = getattr(getattr(current, "response", None), "status_code", None)
        gated = type(current).__name__ == "GatedRepoError" or "gated repo" in str(current)
        if gated or status in (401, 403):
            return True
        current = current.__cause__ or current.__context__
    return False


def load_tokenizer(source: BaseSource, folder: Path | None = None) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a base model, or its copy in an adapter folder.

    Adds nothing to the vocabulary; raises ModelError if there is no readable tokenizer.
    """
    from transformers import AutoTokenizer

    path = str(folder) if folder else source.path
    revision = None if folder else source.revision
    try:
        return AutoTokenizer.from_pretrained(
            path, revision=revision or "main", trust_remote_code=False
        )
    except Exception as error:  # noqa: BLE001  # as in `find_base`
        what = f"the tokenizer of {folder or source.shown}"
        raise unreadable(what, error, "Put the tokenizer's files there") from None
