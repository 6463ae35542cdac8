"""`qlora-harness data`: what a data set holds, before anything is trained on it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_harness.data.mixture import parse_parts
from qlora_harness.data.templates import TOKENIZERS_OWN
from qlora_harness.errors import SettingsError
from qlora_harness.flag_checks import check_output_file
from qlora_harness.settings import Settings, flag_of, setting_fields
from qlora_harness.settings_checks import build_settings
from qlora_harness.train.command import add_settings, flag_parser

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_DESCRIPTION = (
    "Reads a data set as training would, and prints its form, what is left out and why, lengths, "
    "duplicates, MMLU questions in it (with QLORA_MMLU_DIR), and three examples with what is "
    "learned. Takes the flags of launch/train.py for data."
)
_FLAGS = (
    *("model", "revision", "dataset_revision", "format"),
    *("languages", "conversations", "template", "mask", "max_length"),
)


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the command."""
    built = flag_parser("qlora-harness data", _DESCRIPTION, epilog=None)
    built.add_argument("dataset", metavar="DATA", help="what launch/train.py --dataset takes")
    built.add_argument(
        "--html",
        nargs="?",
        type=Path,
        const=Path("data.html"),
        metavar="FILE",
        help="also write a page with figures, about 5 MB (default data.html)",
    )
    leave_out = [name for name in setting_fields() if name not in _FLAGS]
    return add_settings(built, leave_out=leave_out)


def run(words: Sequence[str]) -> None:
    """Prints the survey of each data set and split; raises SettingsError and DataError."""
    flags = vars(parser().parse_args(words))
    html, recipe = flags.pop("html"), flags.pop("recipe")
    if recipe is not None:
        raise SettingsError("--recipe: `qlora-harness data` takes none", "Give its flags instead")
    settings = build_settings(flags, {name: flag_of(name) for name in flags})
    check_output_file("--html", html)
    if html is not None:
        from qlora_harness.compare.page import check_packages

        check_packages()
    parts = parse_parts(settings.data.dataset)
    tokenizer = _tokenizer(settings, is_named="model" in flags)
    from qlora_harness.data.reading import check_tree_settings
    from qlora_harness.record import write_text
    from qlora_harness.results.terminal import PipedConsole
    from qlora_harness.survey.overlap import local_questions
    from qlora_harness.survey.page import to_html
    from qlora_harness.survey.survey import take_surveys
    from qlora_harness.survey.text import print_survey

    questions = local_questions()
    surveys = [
        survey
        for part in parts
        for survey in take_surveys(
            part.name, replace(settings.data, dataset=part.name), tokenizer, questions
        )
    ]
    check_tree_settings({survey.form for survey in surveys}, settings.data)
    # Written before printing: whoever closes the pipe early loses no file.
    if html is not None:
        write_text(html, to_html(surveys))
    console = PipedConsole(highlight=False)
    for survey in surveys:
        print_survey(survey, console)
        console.print()


def _tokenizer(settings: Settings, *, is_named: bool) -> PreTrainedTokenizerBase | None:
    """Returns the tokenizer of --model; None without that flag."""
    model = settings.model
    if not is_named:
        if settings.data.template == TOKENIZERS_OWN:
            raise SettingsError(
                "--template tokenizer is the chat template of a model's tokenizer",
                "Name the model with --model",
            )
        if model.revision is not None:
            raise SettingsError(
                f"--revision {model.revision} is that of a model, and --model is not given",
                "Give --model, or --dataset-revision for the data",
            )
        return None
    from qlora_harness.model.source import find_base, load_tokenizer

    return load_tokenizer(find_base(model.model, model.revision))
