"""Compares runs: what they left behind → contrasts of arms → text, JSON and a page.

Imports neither torch nor lm_eval. Called as a function it is `compare.comparison.compare`.
"""

from qlora_harness.callable_package import make_callable

_FUNCTION = "qlora_harness.compare.comparison:compare"
make_callable(__name__)
