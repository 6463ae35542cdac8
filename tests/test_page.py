"""The comparison page in a real browser: every figure is drawn, and nothing is cut off."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from qlora_harness.cli import main

STUDY = Path(__file__).resolve().parent.parent / "results" / "published" / "smollm2"
# A frame is a narrow screen; a browser window is never narrower than 500 pixels.
FRAME = """<iframe src="page.html" width="{width}" height="2000"></iframe><script>
addEventListener("load", () => setTimeout(() => {{
  const page = document.querySelector("iframe").contentDocument;
  document.title = [page.documentElement.scrollWidth,
    page.querySelectorAll(".js-plotly-plot .main-svg").length > 0,
    page.querySelectorAll(".plotly-graph-div").length,
    page.querySelectorAll(".js-plotly-plot").length].join(" ");
}}, 3000));
</script>"""


@pytest.mark.browser
@pytest.mark.parametrize("width", [1280, 390])
def test_page_fits_the_screen(width: int, tmp_path: Path) -> None:
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("needs chromium")
    if not STUDY.is_dir():
        pytest.skip("results/published is not part of this copy")
    pytest.importorskip("plotly")
    words = ["compare", str(STUDY / "4bit"), str(STUDY / "16bit")]
    for kind in ("html", "markdown", "json"):
        words += [f"--{kind}", str(tmp_path / f"page.{kind}")]
    assert main(words) == 0
    (tmp_path / "frame.html").write_text(FRAME.format(width=width), encoding="utf-8")
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files"]
    flags += ["--virtual-time-budget=15000", f"--user-data-dir={tmp_path / 'profile'}"]
    process = subprocess.run(
        [chromium, *flags, "--dump-dom", (tmp_path / "frame.html").as_uri()],
        capture_output=True,
        text=True,
        timeout=60,
    )
    title = re.search("<title>(.*)</title>", process.stdout)
    assert title is not None, process.stderr[-500:]
    scroll_width, drawn, graphs, plots = title[1].split()
    assert int(scroll_width) <= width
    assert drawn == "true"
    assert int(graphs) == int(plots) >= 4
