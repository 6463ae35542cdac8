"""Widths of the columns of a table in the terminal, so that words stay whole where they can."""

from __future__ import annotations

from collections.abc import Sequence

# After these a name or a path may be broken, if it has to be.
_SEPARATORS = "/_-.,:="


def longest_word(texts: Sequence[str]) -> int:
    """Returns the length of the longest word.

    Args:
        texts: Of one column.
    """
    return max((len(word) for text in texts for word in text.split()), default=1)


def fit_columns(natural: Sequence[int], floors: Sequence[Sequence[int]], width: int) -> list[int]:
    """Narrows columns until they fit, the widest first.

    Args:
        natural: The width that each column would take.
        floors: What the columns may be narrowed to, one sequence a stage: a later stage begins
            where the earlier one was not enough. No column is narrowed below 1.
        width: What there is for all of them.

    Returns:
        The widths; above `width` together only where the last stage was not enough.
    """
    widths = [max(1, size) for size in natural]
    for floor in floors:
        for _ in range(max(0, sum(widths) - width)):
            wide = [i for i, size in enumerate(widths) if size > max(1, floor[i])]
            if not wide:
                break
            widths[max(wide, key=lambda i: widths[i])] -= 1
    return widths


def break_words(text: str, width: int) -> str:
    """Breaks words that are too long for a column, after a separator where there is one.

    Args:
        text: Of one cell.
        width: Of the column.

    Returns:
        The text with line ends in it; unchanged where every word fits.
    """
    if all(len(word) <= width for word in text.split(" ")):
        return text
    return " ".join("\n".join(_pieces(word, width)) for word in text.split(" "))


def _pieces(word: str, width: int) -> list[str]:
    pieces = []
    while len(word) > width:
        cut = max(word.rfind(sign, 0, width) for sign in _SEPARATORS) + 1
        cut = cut or width
        pieces.append(word[:cut])
        word = word[cut:]
    return [*pieces, word]
