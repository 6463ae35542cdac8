"""A comparison as one HTML page that needs no network."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib.resources import files
from importlib.util import find_spec

from qlora_harness.compare.figures import figures
from qlora_harness.compare.report import Comparison, run_lines, same_line
from qlora_harness.compare.tables.table import Table
from qlora_harness.errors import SettingsError

_FLIPS_SHOWN = 200


def check_packages() -> None:
    """Refuses before any work where the packages of the page are missing.

    Raises:
        SettingsError: Plotly or Jinja is not installed.
    """
    for name in ("plotly", "jinja2"):
        if find_spec(name) is None:
            raise SettingsError(
                f"--html needs the package {name}", "pip install 'qlora-harness[reports]'"
            )


def to_html(comparison: Comparison) -> str:
    """Returns the page: verdict, tables, figures, changed answers, settings.

    Args:
        comparison: The comparison.
    """
    from jinja2 import Environment
    from markupsafe import Markup
    from plotly.io import to_html as figure_to_html
    from plotly.offline import get_plotlyjs

    drawn = [
        (
            heading,
            Markup(
                figure_to_html(
                    figure,
                    full_html=False,
                    include_plotlyjs=False,
                    div_id=f"figure-{number}",
                    config={"displayModeBar": False, "responsive": True},
                )
            ),
        )
        for number, (heading, figure) in enumerate(figures(comparison.evidence))
    ]
    template = files("qlora_harness.compare").joinpath("page.html").read_text(encoding="utf-8")
    page: str = (
        Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
        .from_string(template)
        .render(
            comparison=comparison,
            title=_listed([run.label for run in comparison.runs]),
            run_lines=list(run_lines(comparison)),
            same_line=same_line(comparison),
            shared=list(_shared(comparison.shared)),
            figures=drawn,
            flips=comparison.evidence.flips[:_FLIPS_SHOWN],
            flips_in_all=len(comparison.evidence.flips),
            plotly=Markup(get_plotlyjs()),
        )
    )
    return page


def _shared(table: Table) -> Iterator[tuple[str, Table]]:
    """Settings in which all runs agree, and apart from them what they ran on."""
    where = tuple(row for row in table.rows if ".environment." in row.key)
    rest = tuple(row for row in table.rows if ".environment." not in row.key)
    yield table.title, replace(table, rows=rest)
    # What differs of it stands among the settings that differ.
    yield "Environment, as far as it agrees", replace(table, key="environment", rows=where)


def _listed(names: Sequence[str]) -> str:
    """Joins names as in a sentence: "A and B", "A, B and C"."""
    *before, last = names
    return f"{', '.join(before)} and {last}" if before else last
