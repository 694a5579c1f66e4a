"""Markdown: tables of figures, and whether the links of a document lead somewhere."""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path


@dataclass(frozen=True)
class Figure:
    """A number in a table. Its error follows after ±, and decides whether it may be bold."""

    value: float
    digits: int = 1
    error: float | None = None
    unit: str = ""
    least: bool = False  # less is better
    bold: bool = False

    def __str__(self) -> str:
        text = rounded(self.value, self.digits)
        text = f"**{text}**" if self.bold else text
        if self.error is not None:
            text += f" ± {rounded(self.error, self.digits)}"
        return text + self.unit


LEAST = ("C-FD", "c-fd_cs", "c-fd_langevin", "calibration_error")  # less is better


def figure(row: dict, key: str, digits: int = 1) -> Figure:
    return Figure(row[key], digits, row.get(f"{key} std"), least=key in LEAST)


def share(row: dict, key: str, unit: str = " %") -> Figure:
    """In percent, with the binomial standard error of n images, by Agresti and Coull (1998): that
    of two hits and two misses more, which is not 0 for a share of 0 or 1."""
    share, n = row[key], row.get(f"{key} n", row.get("n"))
    p = (share * n + 2) / (n + 4) if n else 0
    error = 100 * math.sqrt(p * (1 - p) / (n + 4)) if n else None
    return Figure(100 * share, error=error, unit=unit)


def rounded(value: float, digits: int) -> str:
    """Halves are rounded up. Float32 noise is removed first: 60.1499975 is 60.15, and so 60.2."""
    if not abs(value) < 1e15:  # or NaN: Decimal has 28 digits
        return f"{value:.3g}"
    return str(Decimal(f"{value:.7g}").quantize(Decimal(1).scaleb(-digits), ROUND_HALF_UP))


def percent(share: float, low: float, high: float) -> str:
    """A share and the ends of its interval, in percent."""
    return between(100 * share, 100 * low, 100 * high)


def between(value: float, low: float, high: float, digits: int = 1) -> str:
    """A figure and the ends of its interval."""
    value, low, high = (rounded(number, digits) for number in (value, low, high))
    return f"{value} ({low} to {high})"


def table(rows: Iterable[dict], bold: bool = True) -> str:
    """A row maps columns to figures, words and whole numbers.

    bold: the best figure of a column, if it is ahead of each other one by more than twice the root
    of the sum of their squared errors, and the two best have errors.
    """
    rows = list(rows)
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    if bold:
        columns = {name: _with_bold(column) for name, column in columns.items()}
    lines = [list(columns), *zip(*columns.values())]
    lines = ["".join("| " + f"{cell} ".lstrip() for cell in line) + "|\n" for line in lines]
    return "".join([lines[0], "|---" * len(columns) + "|\n", *lines[1:]])


def _with_bold(column: list) -> list:
    figures = [cell for cell in column if isinstance(cell, Figure)]
    ranked = sorted(figures, key=lambda f: f.value if f.least else -f.value)
    if len(ranked) < 2 or any(figure.error is None for figure in ranked[:2]):
        return column
    first, *others = ranked
    errors = [2 * math.hypot(first.error, other.error or 0) for other in others]
    ahead = all(abs(first.value - f.value) > error for f, error in zip(others, errors))
    return [replace(cell, bold=ahead) if cell is first else cell for cell in column]


def broken_links(document: Path) -> list[str]:
    """Files and headings that a document links to and scripts that it calls, but that do not exist.

    Scripts are looked up in the working directory, which should be the repository's root.
    """
    text = document.read_text()
    scripts = dict.fromkeys(re.findall(r"\bpython (\S+\.py)\b", text))
    missing = [name for name in scripts if not Path(name).is_file()]
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        name, _, anchor = link.partition("#")
        path = document.parent / name if name else document
        there = path.exists() and (not anchor or anchor in _anchors(path))
        if not there and not re.match("https?:", link):
            missing.append(link)
    return missing


def missing_files(document: Path) -> list[str]:
    """The files that a document names in backticks, also by a pattern, but that neither its folder
    nor the working directory has."""
    names = re.findall(r"`([\w./*-]+\.(?:jsonl?|md|png|py))`", document.read_text())
    folders = (document.parent, Path())
    return [name for name in names if not any(any(folder.glob(name)) for folder in folders)]


def _anchors(document: Path) -> set[str]:
    """The headings of a document, as GitHub names them."""
    text = re.sub("^```.*?^```", "", document.read_text(), flags=re.M | re.S)
    headings = re.findall("^#+ (.+)$", text, re.M)
    return {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}
