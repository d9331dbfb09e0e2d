"""What a comparison has found: a sentence, tables, pictures; as Markdown, a page that opens offline, and JSON."""

from __future__ import annotations

import base64
import html
import json
import math
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from lightning_ire.compare import _pictures
from lightning_ire.compare.design import FEW_TRIALS, HALVING, Cell, Comparison, Design, Results
from lightning_ire.compare.statistics import detectable, expected_best, interval, seeds_needed
from lightning_ire.sweeps._runs import replace_text
from lightning_ire.sweeps._table import markdown, shown

__all__ = ["Report", "write_report"]


class Report:
    """The words and tables of a comparison.

    Args:
        design: What was compared.
        results: What the runs have logged.
        errors: What went wrong, by run.
        heading: Of what.
        effect: A difference for which the seeds that would show it are asked; None: half of what these seeds show.
    """

    def __init__(
        self, design: Design, results: Results, errors: Mapping[str, str], heading: str, effect: float | None = None
    ) -> None:
        self.design, self.results, self.errors, self.heading, self.effect = design, results, errors, heading, effect
        self.compared = design.compared(results)
        self.is_accuracy = "accuracy" in design.report
        self.unit = " points" if self.is_accuracy else ""

    def number(self, value: float, sign: str = "") -> str:
        """Return a difference as text: points of accuracy with two digits, others with three."""
        return format(100 * value, f"{sign}.2f") if self.is_accuracy else format(value, f"{sign}.3g")

    def price(self, method: str, tag: str, base: str = "") -> float:
        """Return passes or seconds of a step, the base's being 1."""
        one, other = (self.design.price(name, self.results, tag) for name in (method, base or self.design.base.name))
        return one / other if other else math.nan

    def gain(self, one: Comparison) -> float:
        """Return by how much the treated method is better."""
        return one.difference.mean if self.design.report_mode == "max" else -one.difference.mean

    @cached_property
    def sentence(self) -> str:
        """What a busy person can act on."""
        said = [self._verdict(one) for one in self.compared if self._is_answer(one)]
        if not said:
            missing = [
                name
                for name in self.design.by_name
                if not any(map(math.isfinite, self.design.reported(name, self.results).values()))
            ]
            return f"Nothing can be said: there is no finite {self.design.report} of {', '.join(missing)}."
        return "; ".join(said) + "."

    def _is_answer(self, one: Comparison) -> bool:
        return self.design.by_name[one.base].control_of is None

    def _verdict(self, one: Comparison) -> str:
        size = f"{self.number(abs(one.difference.mean))} ± {self.number(one.difference.half)}{self.unit}"
        better = f"{one.treated} is {'better' if self.gain(one) > 0 else 'worse'} than {one.base} by {size}"
        if one.difference.pairs < 2:
            return f"{one.treated} beside {one.base}: one pair of runs, which says nothing"
        cost = self._cost(one)
        if one.diverged:
            return (
                f"{one.treated} cannot be compared with {one.base}: {one.diverged} of their "
                f"{2 * self.design.seeds} runs diverged"
            )
        if one.clear:
            text = f"{better}{cost}"
        elif one.adjusted < 0.05 and not self.design.knows_luck:
            why = (
                "hopeless trials were stopped" if self.design.halving else f"there were fewer than {FEW_TRIALS} trials"
            )
            text = f"{better}{cost} over these seeds, which may be luck of the search: {why}"
        elif one.adjusted < 0.05 and one.luck is not None:
            share = one.luck.better if one.difference.mean > 0 else one.luck.worse
            text = (
                f"{better} over these seeds, but only in {100 * share:.0f} % of the searches with half of the trials: "
                "that may be luck of the search"
            )
        else:
            signed = f"{self.number(one.difference.mean, '+')} ± {self.number(one.difference.half)}{self.unit}"
            least = detectable(one.difference.spread, one.difference.pairs, len(self.compared))
            text = (
                f"{one.treated} is not told apart from {one.base} ({signed}{cost and ','}{cost}; "
                f"{one.difference.pairs} seeds show differences from about {self.number(least)}{self.unit} on)"
            )
        if one.clear and (
            controls := [each for each in self.compared if each.treated == one.treated and each is not one]
        ):
            beaten = [each for each in controls if self.design.by_name[each.base].control_of == one.treated]
            text += "".join(self._beside_control(each) for each in beaten)
        return text

    def _beside_control(self, one: Comparison) -> str:
        what = "a longer step (gamma = 1)" if one.base.endswith("gamma = 1") else "a random mask"
        word = "not told apart from" if not one.clear else "better than" if self.gain(one) > 0 else "worse than"
        return f", {word} {what}"

    def _cost(self, one: Comparison) -> str:
        passes = self.price(one.treated, "compare/passes", one.base)
        if self.design.budget != "steps":
            return f" in as many {self.design.budget}"
        return "" if not math.isfinite(passes) else f" at {passes:.2f} times the passes"

    @cached_property
    def cautions(self) -> list[str]:
        """What the reader has to know to believe it."""
        found, design = [], self.design
        if not design.knows_luck:
            why = "Hopeless trials were stopped" if design.halving else f"There were fewer than {FEW_TRIALS} trials"
            found.append(
                f"{why}, so the luck of the search is not known, and nothing is called told apart: by seeds alone, two "
                "methods that are the same are told apart in up to 70 % of studies."
            )
        if design.on_top:
            found.append(
                f"Methods were tuned on top of {design.base.name}'s best settings: they had more tuning than it."
            )
        if design.metric == design.report:
            found.append(
                f"What is compared, {design.metric}, is also what trials were chosen by, on other seeds; if the data "
                "are split the same way in all runs, a value on test data (--report) is more careful."
            )
        for one in self.compared:
            if one.lost:
                found.append(
                    f"{_count(one.lost, 'seed')} of {design.seeds} failed in {one.treated} or {one.base} and do not "
                    "count: their difference is one of the others."
                )
        for method in design.methods:
            diverged = sum(
                values is not None and not math.isfinite(values.get(design.report, math.nan))
                for cell, values in self.results.items()
                if cell.method == method.name
            )
            if diverged:
                found.append(f"{_count(diverged, 'run')} of {method.name} diverged (NaN or infinity).")
        return found

    @property
    def protocol(self) -> str:
        """How it was compared."""
        design = self.design
        seeds = f"{design.tuning_seeds} tuning seed" + ("s" if design.tuning_seeds > 1 else "")
        tuned = (
            f"Every method got {design.trials} trials, trial i at the same point of a scrambled Sobol sequence for the "
            f"keys that methods share, with {seeds} (from 1000 on); the best by {design.metric} was run with "
            f"{design.seeds} seeds (from 0 on) that no tuning saw."
            if design.trials > 1
            else f"Nothing was tuned; every method was run with {design.seeds} seeds."
        )
        if design.halving:
            tuned += (
                f" Trials were stopped at 1/{HALVING} of a run, and the best 1/{HALVING} of them made again to the end."
            )
        luck = (
            " and the sign is the same in all but 5 % / comparisons of the searches with half of the trials, which "
            "show how much is the luck of the search"
            if design.trials > 1
            else ""
        )
        budget = {
            "steps": "All runs have the same number of steps.",
            "passes": "All methods have as many passes as the base: the more passes a step takes, the fewer steps.",
            "seconds": "All methods have as much time as the base, by whole runs of each, one after the other.",
        }[design.budget]
        return (
            f"{tuned} {budget} Passes are counted as backward passes, over a part of a batch too. "
            "Differences are paired by seed; intervals are 95 % (Student's t), p is adjusted for "
            f"{_count(len(self.compared), 'comparison')} (Holm 1979). Two methods are told apart if p after Holm is "
            f"below 0.05{luck}."
        )

    @cached_property
    def tables(self) -> list[tuple[str, list[list[str]]]]:
        """The tables, each with its title."""
        parts = [("Differences", self._differences()), ("Methods", self._methods())]
        if self.design.trials > 1 and not self.design.halving:
            parts.append((f"Expected {self.design.report} after a search of n trials", self._search()))
        parts.append(("What these seeds can show", self._power()))
        if self.errors or None in self.results.values():
            failed = {cell.name: "failed" for cell, values in self.results.items() if values is None}
            failed |= self.errors
            parts.append(("Failed runs", [["run", "what went wrong"], *map(list, failed.items())]))
        return parts

    def _differences(self) -> list[list[str]]:
        scale = 100 if self.is_accuracy else 1
        head = [
            f"{self.design.report}{' (points)' if self.is_accuracy else ''}", "difference, 95 %", "p", "p after Holm",
            "searches with half of the trials: mean (95 %), higher in", "told apart",
        ]  # fmt: skip
        rows = [
            [
                f"{one.treated} - {one.base}",
                f"{self.number(one.difference.mean, '+')} ± {self.number(one.difference.half)}",
                f"{one.difference.p:.2g}",
                f"{one.adjusted:.2g}",
                one.luck.show(scale=scale) if one.luck else "",
                "yes" if one.clear else "no",
            ]
            for one in self.compared
        ]
        return [head, *rows]

    def _methods(self) -> list[list[str]]:
        rows = [["method", f"{self.design.report}, 95 %", "seeds", "passes", "time", "what tuning chose"]]
        for method in self.design.methods:
            values = [one for one in self.design.reported(method.name, self.results).values() if math.isfinite(one)]
            own, best = interval(values) if values else None, self.design.best(method.name, self.results)
            chosen = {} if best is None else self.design.settings(method, best, self.results)
            prices = [self.price(method.name, f"compare/{what}") for what in ("passes", "seconds")]
            rows.append([
                method.name,
                f"{shown(self.design.report, own.mean)} ± {self.number(own.half)}" if own else "-",
                str(len(values)),
                *(f"{price:.2f}" if math.isfinite(price) else "-" for price in prices),
                ", ".join(f"{key} {value}" for key, value in chosen.items()),
            ])  # fmt: skip
        return rows

    def _search(self) -> list[list[str]]:
        counts = sorted({min(n, self.design.trials) for n in (1, 4, 16, self.design.trials)})
        rows = [["method", *(f"n = {n}" for n in counts)]]
        for method in self.design.methods:
            values = [one.value for one in self.design.ranked(method, self.results).values()]
            best = expected_best([one for one in values if math.isfinite(one)])
            rows.append(
                [method.name, *(shown(self.design.report, best[n - 1]) if n <= len(best) else "-" for n in counts)]
            )
        return rows

    def _power(self) -> list[list[str]]:
        count = max(len(self.compared), 1)
        rows = [
            [
                "comparison",
                "spread of the differences",
                "seen with 80 % probability",
                f"seeds needed to see {'--effect' if self.effect else 'half of it'}",
            ]
        ]
        for one in self.compared:
            spread = one.difference.spread
            least = detectable(spread, one.difference.pairs, count)
            wanted = (self.effect / (100 if self.is_accuracy else 1)) if self.effect else least / 2
            needed = seeds_needed(wanted, spread, count) if math.isfinite(wanted) and wanted else None
            rows.append([
                f"{one.treated} - {one.base}",
                self.number(spread),
                f"{self.number(least)}{self.unit}" if math.isfinite(least) else "-",
                f"{self.number(wanted)}{self.unit}: {needed or 'more than 10,000'}" if math.isfinite(wanted) else "-",
            ])  # fmt: skip
        return rows

    def text(self, pictures: Sequence[Path]) -> str:
        """Return the report as Markdown; pictures lie beside it."""
        parts = [f"# Does it help? {self.heading}", f"**{self.sentence}**", *(f"- {one}" for one in self.cautions)]
        parts += [f"![{_title(path)}]({path.name})" for path in pictures]
        for title, rows in self.tables:
            parts.append(f"## {title}\n\n{markdown(rows)}")
        return "\n\n".join([*parts, f"## How it was compared\n\n{self.protocol}"]) + "\n"

    def page(self, pictures: Sequence[Path]) -> str:
        """Return the report as one HTML page, the pictures inside it."""
        quoted = html.escape
        parts = [f"<h1>Does it help? {quoted(self.heading)}</h1>", f"<p class=answer>{quoted(self.sentence)}</p>"]
        if cautions := self.cautions:
            parts.append(f"<ul>{''.join(f'<li>{quoted(one)}</li>' for one in cautions)}</ul>")
        for path in pictures:
            inside = base64.b64encode(path.read_bytes()).decode()
            parts.append(f'<img alt="{quoted(_title(path))}" src="data:image/png;base64,{inside}">')
        for title, (head, *rows) in self.tables:
            body = "".join(f"<tr>{''.join(f'<td>{quoted(cell)}</td>' for cell in row)}</tr>" for row in rows)
            heads = "".join(f"<th>{quoted(cell)}</th>" for cell in head)
            parts.append(f"<h2>{quoted(title)}</h2><table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>")
        parts.append(f"<h2>How it was compared</h2><p>{quoted(self.protocol)}</p>")
        title = quoted(f"{self.heading}: does it help?")
        return (
            f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title>"
            f"<meta name=viewport content='width=device-width'><style>{_STYLE}</style>"
            f"<body>{''.join(parts)}</body></html>\n"
        )

    def numbers(self) -> dict[str, Any]:
        """Return everything as plain data."""
        return {
            "sentence": self.sentence,
            "cautions": self.cautions,
            "comparisons": [
                {**one._asdict(), "difference": one.difference._asdict(), "luck": one.luck and one.luck._asdict()}
                for one in self.compared
            ],
            "runs": [
                {**cell._asdict(), "logged": values, "settings": self._settings(cell)}
                for cell, values in sorted(self.results.items())
            ],
        }

    def _settings(self, cell: Cell) -> dict[str, Any]:
        return self.design.settings(self.design.by_name[cell.method], cell.trial, self.results)


_STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "h1{font-size:1.4rem}h2{font-size:1.1rem;margin-top:2rem}.answer{font-size:1.25rem;font-weight:600}"
    "table{border-collapse:collapse;display:block;overflow-x:auto}td,th{border:1px solid #ccc;padding:.3rem .6rem;"
    "text-align:left;vertical-align:top}th{background:#f4f4f4}img{max-width:100%;display:block;margin:1rem 0}"
)


def write_report(report: Report, curves: Mapping[Cell, list[Any]], folder: Path, curve: str) -> str:
    """Write `report.md`, `report.html`, `results.json` and the pictures; return what is to be printed."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = _pictures.draw(report, curves, folder, curve)
    replace_text(folder / "report.md", report.text(pictures))
    replace_text(folder / "report.html", report.page(pictures))
    replace_text(folder / "results.json", json.dumps(report.numbers(), indent=1))
    return f"\n{report.sentence}\n\n{markdown(report.tables[0][1])}\n\nReport: {folder / 'report.html'} (or report.md)"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _title(path: Path) -> str:
    return re.sub(r"[_-]", " ", path.stem)
