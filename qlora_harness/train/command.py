"""The training command line: flags and recipe to settings, settings to a run."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from typing import Any, NoReturn

from qlora_harness.errors import SettingsError, printable, run_command
from qlora_harness.record import nested
from qlora_harness.settings import (
    GROUPS,
    Settings,
    build_settings,
    field_kind,
    setting_fields,
    with_recipe,
)

_EPILOG = """\
Every flag is also a recipe key (learning_rate: 0.0002). Flags win over the recipe, the recipe over
the defaults. Recipes that come along: qlora-llama2-7b (the published one; its values are the
defaults), lora-llama2-7b (the same in bf16), demo (SmolLM2 on the embedded data, for CPUs).

examples:
  accelerate launch launch/train.py --quant nf4
  accelerate launch launch/train.py --quant bf16
  accelerate launch launch/train.py --recipe demo --quant nf4
  accelerate launch launch/train.py --quant nf4 --dataset rows.jsonl --languages all --epochs 3
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        unknown = "unrecognized arguments: "
        if message.startswith(unknown):
            flag = message.removeprefix(unknown).split()[0]
            from qlora_harness.settings import unknown_name

            name = flag.split("=")[0].lstrip("-").replace("-", "_")
            raise unknown_name(name, f"flag {flag}", [*setting_fields(), "recipe"])
        raise SettingsError(message, "`launch/train.py --help` lists every flag")


def build_parser(prog: str = "launch/train.py") -> argparse.ArgumentParser:
    """Returns the parser; it names flags only, defaults and checks are those of `settings`.

    Args:
        prog: The command that takes the flags: the launcher, or `qlora-harness plan`.
    """
    trains = prog == "launch/train.py"
    parser = _Parser(
        prog=prog,
        description="Fine-tunes a base model with LoRA, held in 4 bits (QLoRA) or in bf16."
        if trains
        else "Predicts the GPU memory of a training run with these flags, for every way to save "
        "memory, from the model's configuration alone; needs no GPU.",
        epilog=_EPILOG if trains else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--recipe", metavar="NAME", help="YAML file, or the name of one in launch/recipes"
    )
    for group, cls in GROUPS.items():
        section = parser.add_argument_group(f"{group} settings")
        for f in dataclasses.fields(cls):
            _add_flag(section, cls, f)
    return parser


def _add_flag(section: Any, cls: type, f: dataclasses.Field[Any]) -> None:
    kind, _ = field_kind(cls, f.name)
    flag = f"--{f.name.replace('_', '-')}"
    unit, choices = f.metadata["unit"], f.metadata["choices"]
    notes = [unit] if unit else []
    if choices:
        notes.append(" | ".join(choices))
    if f.default is not None:
        shown = str(f.default).lower() if isinstance(f.default, bool) else f.default
        notes.append(f"default {shown}")
    text = f.metadata["help"] + (f" ({'; '.join(notes)})" if notes else "")
    text = text.replace("%", "%%")
    if kind is bool:
        section.add_argument(
            flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text
        )
    else:
        metavar = {int: "N", float: "X", str: "TEXT"}[kind]
        section.add_argument(flag, default=argparse.SUPPRESS, metavar=metavar, help=text)


def parse_settings(
    argv: Sequence[str] | None = None, *, prog: str = "launch/train.py"
) -> tuple[Settings, bool]:
    """Turns a command line into settings.

    Args:
        argv: The arguments, or None for those of this process.
        prog: The command that takes them.

    Returns:
        The settings, and whether --resume was given.

    Raises:
        SettingsError: A flag, recipe key or value is wrong.
    """
    flags = vars(build_parser(prog).parse_args(argv))
    values, sources = with_recipe(flags.pop("recipe"), flags)
    sources |= {name: f"--{name.replace('_', '-')}" for name in flags}
    return build_settings(values, sources), "resume" in flags


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the training command.

    Args:
        argv: The arguments, or None for those of this process.

    Returns:
        The exit status: 0, 2 for a mistake in the input, 3 for a run that failed.
    """
    # Imported early: it remembers the launcher, which may end while torch is imported.
    import qlora_harness.train.process  # noqa: F401

    return run_command(lambda: _train(argv))


def _train(argv: Sequence[str] | None) -> int:
    settings, resume_given = parse_settings(argv)
    from qlora_harness.train.run import run_training

    _report(settings, run_training(settings, resume_given=resume_given))
    return 0


def _report(settings: Settings, summary: dict[str, Any]) -> None:
    from accelerate import PartialState

    if not PartialState().is_main_process:
        return
    memory = {
        name: nested(summary, "memory", name)
        for name in ("peak_allocated_bytes", "peak_managed_bytes", "cpu_peak_rss_bytes")
    }
    gib = {name: f"{size / 2**30:.2f}" for name, size in memory.items() if size is not None}
    parts = []
    if (seconds := nested(summary, "runtime", "train_seconds")) is not None:
        speed = nested(summary, "throughput", "tokens_per_second")
        parts.append(
            f"{nested(summary, 'results', 'steps')} steps in {seconds:.0f} s"
            + (f" ({speed:,.0f} tokens/s)" if speed else "")
        )
    if "peak_allocated_bytes" in gib:
        managed = f" + {gib['peak_managed_bytes']} managed" if memory["peak_managed_bytes"] else ""
        parts.append(f"peak GPU memory {gib['peak_allocated_bytes']}{managed} GiB allocated")
    if "cpu_peak_rss_bytes" in gib:
        parts.append(f"peak CPU memory {gib['cpu_peak_rss_bytes']} GiB (RSS)")
    results = {
        name: nested(summary, "results", name)
        for name in ("final_train_loss", "eval_loss", "perplexity")
    }
    if results["final_train_loss"] is not None:
        parts.append(f"last train loss {results['final_train_loss']:.3f}")
    if results["eval_loss"] is not None and results["perplexity"] is not None:
        parts.append(
            f"evaluation loss {results['eval_loss']:.3f}, perplexity {results['perplexity']:.2f}"
        )
    print(f"{settings.quant.value}: " + "; ".join(parts))
    print(printable(f"adapter: {settings.run_dir / 'adapter'}   record: {settings.run_dir}"))
