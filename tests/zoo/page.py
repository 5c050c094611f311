"""docs/compatibility.md, from the measured results."""

from __future__ import annotations

import re
import textwrap
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, Final

from starfire_prune.utils.text import first_few
from tests.support.paths import ROOT
from tests.zoo.cells import CELLS, LIMITS
from tests.zoo.models import ZOO, ZooModel, left_out

__all__ = ["PAGE", "page"]

PAGE: Final = ROOT / "docs" / "compatibility.md"
_SIGNS: Final = {
    "right": "✓",
    "refused": "refused",
    "late": "late",
    "wrong": "**wrong**",
    "unclear": "**unclear**",
    "open": "",
}
_REASON: Final = re.compile(r"because ([^;]*)")
_HEAD: Final = """\
# What works with which model

Each family of timm, by its smallest model (timm's own `test_*` models are left out), and
torchvision's segmentation, detection and video networks go through the same cells, with random
weights, two small images a batch, and
`{"method": "ck", "amount": 0.6, "era": [1, 2], "fc": {"method": "fine", "amount": 0.5}}`:

"""
_MARKS: Final = """
✓ is right. *Refused* is an error of this package: one sentence that names a layer or an argument;
the numbers refer to the sentences below. A plan that is refused is tried again without the layers
that its sentences name, and the other cells of that row are without them. *Late* was given up after
{limits} of processor time. Anything else is **wrong** (a result that differs) or **unclear**
(another error). A cell that is empty has not been tried.

`python -m tests.zoo` measures all models and writes this page. The slow test
`tests/zoo/test_zoo.py` holds every cell to it.
"""


def page(results: Mapping[str, Any]) -> str:
    """The page in Markdown."""
    models, sentences = results["models"], _Sentences()
    rows = [line for name in ZOO for line in _row(ZOO[name], models.get(name, {}), sentences)]
    cells = "\n".join(f"- *{name}*: {text}" for name, text in CELLS.items())
    limits = " or ".join(f"{seconds:.0f} s" for seconds in sorted(set(LIMITS.values())))
    versions = ", ".join(f"{name} {value}" for name, value in results["versions"].items())
    return "\n".join(
        [
            _HEAD + cells + "\n" + _MARKS.format(limits=limits),
            *textwrap.wrap(f"Measured on {results['date']} with {versions}.", 100),
            "",
            *_summary(models),
            *_notices(models),
            "\n## The models\n",
            f"| model | family | input | {' | '.join(CELLS)} |",
            "|---|---|---|" + "---|" * len(CELLS),
            *rows,
            "\nLeft out, by their size: "
            + "; ".join(f"{family} ({reason})" for family, reason in left_out().items())
            + ".",
            "\n## The sentences\n",
            *sentences.lines(),
            "",
        ]
    )


class _Sentences:
    """The different sentences, numbered as they first appear."""

    def __init__(self) -> None:
        self._numbers: dict[tuple[str, str], int] = {}
        self._texts: list[tuple[str, str, str]] = []
        self.models: dict[int, list[str]] = {}

    def number(self, cell: str, text: str, model: str) -> int:
        key = (cell, _kind(text))
        if key not in self._numbers:
            self._numbers[key] = len(self._texts) + 1
            self._texts.append((cell, model, text))
        number = self._numbers[key]
        self.models.setdefault(number, []).append(model)
        return number

    def lines(self) -> Iterator[str]:
        for number, (cell, model, text) in enumerate(self._texts, 1):
            others = len(self.models[number]) - 1
            more = f" and {others} more" if others else ""
            shown = text.replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")
            shown = shown.replace("](", "]\\(")  # not a link
            yield f"{number}. *{cell}* of `{model}`{more}: {shown}"


def _kind(text: str) -> str:
    """A sentence without what differs between models: names, numbers and lists."""
    text = text.split(" [")[0]
    text = re.sub(r"\b\w+(\.\w+)+\b|\b\w*\d[\w.]*|\b[A-Z]\w*[A-Z]\w*|\([^)]*\)", "*", text)
    return re.sub(r"\*(, \*)+", "*", text)[:60]


def _row(model: ZooModel, cells: Mapping[str, Any], sentences: _Sentences) -> Iterator[str]:
    shown = []
    for name in CELLS:
        cell = cells.get(name, {"status": "open", "text": ""})
        text = _SIGNS[cell["status"]]
        if name == "plan" and cell["status"] == "right" and cell["text"]:
            text += " \\*"
        if cell["status"] in ("refused", "wrong", "unclear"):
            text += f" {sentences.number(name, cell['text'], model.name)}"
        shown.append(text)
    size = "×".join(map(str, model.shape[1:]))
    yield f"| `{model.name}` | {model.family} | {size} | {' | '.join(shown)} |"


def _summary(models: Mapping[str, Any]) -> Iterator[str]:
    statuses = [status for status in _SIGNS if status != "open"]
    yield f"| cell | {' | '.join(statuses)} | not tried |"
    yield "|---|" + "--:|" * (len(statuses) + 1)
    for name in CELLS:
        counts = Counter(cells[name]["status"] for cells in models.values() if name in cells)
        numbers = [counts[status] for status in statuses]
        yield f"| {name} | {' | '.join(map(str, numbers))} | {len(ZOO) - sum(numbers)} |"
    every = sum(
        all(cells.get(name, {}).get("status") == "right" for name in CELLS)
        for cells in models.values()
    )
    yield f"\n{every} of {len(ZOO)} models are right in every cell."


def _notices(models: Mapping[str, Any]) -> Iterator[str]:
    """The reasons why plans leave out layers that only `*` selects, with the models."""
    found: dict[str, list[str]] = {}
    for name, cells in models.items():
        if cells["plan"]["status"] == "right":
            for reason in dict.fromkeys(_REASON.findall(cells["plan"]["text"])):
                found.setdefault(reason, []).append(name)
    if found:
        yield "\nPlans with a notice (✓ \\*) leave out layers that only `*` selects, because\n"
    for reason, names in sorted(found.items(), key=lambda item: -len(item[1])):
        yield f"- {reason}: {first_few([f'`{name}`' for name in names], 4)}"
