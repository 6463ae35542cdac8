"""Comparison of finished runs from their files alone.

    command.py      flags, output files; output.py: a pipe closed early
        ▼
    comparison.py ─► runs.py ─► evaluation.py, harness_results.py ─► fields.py (files → records)
        │               └─────► harness_samples.py, mmlu_progress.py ─► answers.py (files → answers)
        │  └───────► conditions.py                          (may they be compared? what differs?)
        ├──────────► intersection.py                        (questions that both answered)
        ├──────────► paired.py, losses.py, design.py ─► statistics.py (records → numbers)
        └──────────► tables/, verdict.py                              (numbers → rows, sentences)
                         ▼
    report.py       the same rows for the terminal, Markdown and JSON
    listing.py      `runs` and `show`; both fit their columns with column_widths.py

Nothing here imports torch, transformers or lm_eval: it runs on a laptop.
"""
