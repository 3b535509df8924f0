"""Text in aligned columns."""

from __future__ import annotations

from collections.abc import Container, Sequence

WIDTH = 80  # columns of a terminal
LEAST = 10  # characters of a first column, in longer lines if need be


def aligned(
    rows: Sequence[Sequence[str]], numbers: Container[int] = (), limits: Sequence[int] = ()
) -> str:
    """Align rows of cells, a line each.

    Args:
        rows: the cells of each row, the header first.
        numbers: the columns that end at the right, as numbers do.
        limits: most characters of each column, none by default; the first column gets what the
            others leave of 80, but at least 10. A cell that is longer loses its middle.

    >>> print(aligned([("path", "count"), ("fc.weight", "6"), ("fc.bias", "12")], numbers=[1]))
    path       count
    fc.weight      6
    fc.bias       12
    >>> print(aligned([("w", "0123456789")], limits=(WIDTH, 5)))
    w  01…89
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    if limits:
        widths = [min(pair) for pair in zip(widths, limits, strict=True)]
        room = WIDTH - sum(widths[1:]) - 2 * (len(widths) - 1)
        widths[0] = min(widths[0], max(room, LEAST))
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i in numbers else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(map(_short, row, widths), widths, strict=True))
        ).rstrip()
        for row in rows
    )


def _short(text: str, width: int) -> str:
    if len(text) <= width:
        return text
    return f"{text[: (width - 1) // 2]}…{text[-(width // 2) :]}"
