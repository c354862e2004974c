"""Plain-text tables for the summaries of results."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Table", "format_fields", "format_grid", "format_share", "format_value"]


@dataclass(frozen=True)
class Table:
    """A title, rows of cells, and notes below: as text or as HTML.

    Attributes:
        title: First line.
        rows: Cells by row; without a header, pairs of a name and a value.
        notes: Sentences, one line each.
        header: Names of the columns, or nothing.
        footer: With a header: pairs of a name and a value that belong to no row.
    """

    title: str
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()
    header: Sequence[str] = ()
    footer: Sequence[tuple[str, str]] = ()

    def to_text(self) -> str:
        """Formats plain text, without a final newline."""
        if not self.header:
            pairs = [(name, value) for name, value in self.rows]
            return format_fields(self.title, pairs, self.notes)
        below = [f"{name}: {value}" for name, value in self.footer]
        below += [f"note: {note}" for note in self.notes]
        return "\n".join([self.title, format_grid(self.header, self.rows), *below])

    def to_html(self) -> str:
        """Formats an HTML table for notebooks."""
        lines = ["<div><strong>", html.escape(self.title), "</strong><table>"]
        if self.header:
            cells = "".join(f"<th>{html.escape(cell)}</th>" for cell in self.header)
            lines.append(f"<thead><tr>{cells}</tr></thead>")
        lines.append("<tbody>")
        for row in self.rows:
            cells = f'<th style="text-align: left">{html.escape(row[0])}</th>'
            cells += "".join(
                f'<td style="text-align: left">{html.escape(cell)}</td>' for cell in row[1:]
            )
            lines.append(f"<tr>{cells}</tr>")
        lines.append("</tbody></table>")
        for name, value in self.footer:
            lines.append(f"<div>{html.escape(name)}: {html.escape(value)}</div>")
        if self.notes:
            items = "".join(f"<li>{html.escape(note)}</li>" for note in self.notes)
            lines.append(f"<ul>{items}</ul>")
        return "".join([*lines, "</div>"])


def format_value(value: float, std_error: float | None = None) -> str:
    """Formats a value in nats, with its standard error where there is one.

    Args:
        value: The value.
        std_error: Its standard error; ``None`` or NaN leaves it out.

    Returns:
        Digits down to the second of the standard error, to a thousandth at least.

    Example:
        >>> format_value(-2.26551, 0.00123)
        '-2.2655 +- 0.0012'
        >>> format_value(-309.92433), format_value(-0.00001)
        ('-309.924', '0.000')
    """
    if std_error is None or math.isnan(std_error):
        return f"{value:.3f}" if abs(value) >= 0.0005 else "0.000"
    digits = 3
    if 0.0 < std_error < math.inf:
        digits = min(max(1 - math.floor(math.log10(std_error)), 3), 9)
    return f"{value:.{digits}f} +- {std_error:.2g}"


def format_share(share: float) -> str:
    """Formats a share in percent, which is 0% only if it is none.

    Args:
        share: The share, in [0, 1].

    Returns:
        Whole percents; two digits of a share below a tenth.

    Example:
        >>> [format_share(share) for share in (0.0, 0.0005, 0.022, 0.253, 1.0)]
        ['0%', '0.05%', '2.2%', '25%', '100%']
    """
    percent = 100.0 * share
    return f"{percent:.2g}%" if 0.0 < percent < 10.0 else f"{percent:.0f}%"


def format_fields(title: str, fields: Sequence[tuple[str, str]], notes: Sequence[str] = ()) -> str:
    """Formats a title, aligned names and values, and notes below.

    Args:
        title: First line.
        fields: Pairs of a name and a value.
        notes: Sentences, one line each.

    Returns:
        The text, without a final newline.

    Example:
        >>> print(format_fields("Run", [("lower", "-2.3"), ("ESS", "8 of 10")], ["simulated data"]))
        Run
          lower  -2.3
          ESS    8 of 10
          note: simulated data
    """
    width = max((len(name) for name, _ in fields), default=0)
    lines = [title, *(f"  {name:<{width}}  {value}" for name, value in fields)]
    return "\n".join(lines + [f"  note: {note}" for note in notes])


def format_grid(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Formats a table with a header: first column to the left, the others to the right.

    Args:
        header: Names of the columns.
        rows: Cells, as many per row as there are columns.

    Returns:
        The text, without a final newline.

    Example:
        >>> print(format_grid(["model", "log Z"], [["linear", "-3.1"], ["quadratic", "-12.5"]]))
        model      log Z
        linear      -3.1
        quadratic  -12.5
    """
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = []
    for row in [header, *rows]:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
