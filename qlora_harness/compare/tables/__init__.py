"""The tables of a comparison as data; the terminal, Markdown and JSON all show these rows.

table.py          cells, rows, columns, tables
number_text.py    numbers as a person reads them
cells.py          accuracies, differences, intervals and p-values as cells
▼
training.py, losses.py, accuracy.py, common.py, paired.py, groups.py, design.py, seeds.py,
settings.py       a table each
"""
