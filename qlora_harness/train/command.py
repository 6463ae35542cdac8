"""The training command line: flags and recipe to settings, settings to a run."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from qlora_harness.errors import SettingsError, printable, run_command
from qlora_harness.recipes import with_recipe
from qlora_harness.record import ADAPTER_DIR, nested
from qlora_harness.settings import GROUPS, Settings, field_kind, flag_of
from qlora_harness.settings_checks import build_settings, unknown_name

_DESCRIPTION = "Trains a LoRA adapter on a frozen base model in 4 bits (QLoRA), int8 or bf16."
_EPILOG = """\
Every flag is also a recipe key (learning_rate: 0.0002). Flags override the recipe, and the recipe
overrides the defaults. Included recipes: qlora-llama2-7b (the published one; its values are the
defaults), lora-llama2-7b (the same in bf16), demo (SmolLM2 on the embedded data, for CPUs).

examples:
  accelerate launch launch/train.py --quant nf4
  accelerate launch launch/train.py --quant bf16
  accelerate launch launch/train.py --recipe demo --quant nf4
  accelerate launch launch/train.py --quant nf4 --dataset rows.jsonl --languages all --epochs 3
"""


class _FlagParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        unknown = "unrecognized arguments: "
        if message.startswith(unknown):
            flag = message.removeprefix(unknown).split()[0]
            name = flag.split("=")[0].lstrip("-").replace("-", "_")
            known = [option[2:].replace("-", "_") for option in self._option_string_actions]
            raise unknown_name(name, f"flag {flag}", known)
        raise SettingsError(message, f"`{self.prog} --help` lists every flag")


def flag_parser(
    prog: str = "launch/train.py", description: str = _DESCRIPTION, epilog: str | None = _EPILOG
) -> argparse.ArgumentParser:
    """Returns a parser for flags of settings, which `add_settings` adds."""
    return _FlagParser(
        prog=prog,
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def add_settings(
    parser: argparse.ArgumentParser, leave_out: Sequence[str] = ()
) -> argparse.ArgumentParser:
    """Adds --recipe and a flag for each setting; their values stay unchecked."""
    parser.add_argument(
        "--recipe", metavar="NAME", help="YAML file, or the name of one in launch/recipes"
    )
    for group, cls in GROUPS.items():
        section = parser.add_argument_group(f"{group} settings")
        for f in dataclasses.fields(cls):
            if f.name not in leave_out:
                _add_flag(section, f)
    return parser


def _add_flag(section: Any, f: dataclasses.Field[Any]) -> None:
    kind, choices = field_kind(f), f.metadata["choices"]
    notes = [f.metadata["unit"]] if f.metadata["unit"] else []
    if choices:
        notes.append(" | ".join(choices))
    if f.default is not None:
        default = str(f.default).lower() if isinstance(f.default, bool) else f.default
        notes.append(f"default {default}")
    text = f.metadata["help"] + (f" ({'; '.join(notes)})" if notes else "")
    options: dict[str, Any] = {"help": text.replace("%", "%%"), "default": argparse.SUPPRESS}
    if kind is bool:
        options["action"] = argparse.BooleanOptionalAction
    else:
        options["metavar"] = {int: "N", float: "X", str: "TEXT"}[kind]
    section.add_argument(flag_of(f.name), **options)


def parse_settings(argv: Sequence[str] | None = None) -> tuple[Settings, bool]:
    """Returns a command line's settings and whether it has --resume; raises SettingsError."""
    flags = vars(add_settings(flag_parser()).parse_args(argv))
    return settings_of(flags), "resume" in flags


def settings_of(flags: Mapping[str, Any]) -> Settings:
    """Returns the settings of parsed flags, --recipe among them; raises SettingsError."""
    given = {name: value for name, value in flags.items() if name != "recipe"}
    values, sources = with_recipe(flags["recipe"], given)
    return build_settings(values, sources | {name: flag_of(name) for name in given})


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the training command; returns 0, 2 for a mistake in the input, 3 for a failed run."""
    # Before torch: it remembers the launcher, which may end during that import.
    import qlora_harness.train.process  # noqa: F401

    status = run_command(lambda: _train(argv))
    if status and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # In order, NCCL would wait for the other processes, which wait for this one.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


def _train(argv: Sequence[str] | None) -> int:
    settings, resume_given = parse_settings(argv)
    from accelerate import PartialState

    from qlora_harness.train.run import run_training

    summary = run_training(settings, resume_given=resume_given)
    state = PartialState()
    if state.is_main_process:
        print(f"{settings.quant.value}: " + "; ".join(_numbers(summary)))
        adapter = settings.run_dir / ADAPTER_DIR
        print(printable(f"adapter: {adapter}   record: {settings.run_dir}"))
    state.destroy_process_group()
    return 0


def _numbers(summary: dict[str, Any]) -> list[str]:
    """Returns the numbers that a user looks for, as far as the run has them."""
    parts = []
    results, memory = summary.get("results") or {}, summary.get("memory") or {}
    if (seconds := nested(summary, "runtime", "train_seconds")) is not None:
        speed = nested(summary, "throughput", "tokens_per_second")
        rate = f" ({speed:,.0f} tokens/s)" if speed else ""
        parts.append(f"{results.get('steps')} steps in {seconds:.0f} s{rate}")
    if (allocated := memory.get("peak_allocated_bytes")) is not None:
        paged = memory.get("peak_managed_bytes")
        managed = f" + {paged / 2**30:.2f} managed" if paged else ""
        parts.append(f"peak GPU memory {allocated / 2**30:.2f}{managed} GiB allocated")
    if (resident := memory.get("cpu_peak_rss_bytes")) is not None:
        parts.append(f"peak CPU memory {resident / 2**30:.2f} GiB (RSS)")
    if (loss := results.get("final_train_loss")) is not None:
        parts.append(f"last train loss {loss:.3f}")
    loss, perplexity = results.get("eval_loss"), results.get("perplexity")
    if loss is not None and perplexity is not None:
        parts.append(f"evaluation loss {loss:.3f}, perplexity {perplexity:.2f}")
    return parts
