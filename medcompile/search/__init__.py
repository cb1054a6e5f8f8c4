"""Search: the cheapest precision, layer by layer, that is shown to stay inside the budget.

For each menu of formats every format is built whole, measured, and compared with the original on calibration data; each
group of layers is quantized alone to see what it does to the outputs. That gives a line of assignments from the
cheapest to all float (line.py), along which tuning data decides where the budget begins to hold. What passes there,
cheapest first, is tested on the acceptance data: a bounded number of looks, at a confidence that allows for them all.

How anything is built, run or judged is the workbench's business.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from medcompile.errors import BackendError, QuantizeError
from medcompile.search.cost import FLOAT, CostModel, Shares, assumed, fitted
from medcompile.search.line import Assignment, Group, Option, line, predicted_error
from medcompile.search.looks import at_looks, chance_to_pass, error_to_pass, promising
from medcompile.search.menu import Menu
from medcompile.search.record import Alternative, LayerChoice, Look, Point, Search
from medcompile.spec import Evidence, Variant, Verdict

__all__ = ["Searcher", "Workbench", "at_looks", "told_way"]

_WORTH = 0.01  # a saving below this share is not worth another point: measured times differ by as much
_BACK = 0.5  # where tuning data refuses what a look asked for, how far along what is left of the line to go
_CHANCE, _SAVING = 0.25, 0.03  # a look that can be spared goes to a point that may pass, if it saves so much


class Workbench(Protocol):
    """What a search needs of a build, for one target. Every answer is kept, so that a search goes on where it was."""

    @property
    def here(self) -> bool:
        """True where the target runs on this machine, so that costs can be measured."""
        ...

    def groups(self) -> Mapping[Group, Mapping[str, float]]:
        """Every group of linear layers, and how much work it is in each graph: weights, which are products a token."""
        ...

    def cost(self, variant: Variant) -> Mapping[str, float]:
        """By graph, in the objective's unit. Raises BackendError where the target refuses the variant."""
        ...

    def size(self, variant: Variant) -> int:
        """Bytes of its artifacts. Raises BackendError likewise."""
        ...

    def error(self, variant: Variant) -> float:
        """What the variant does to the graphs' outputs on calibration data: the norm of the change over theirs."""
        ...

    def errors(self, formats: Mapping[str, Variant]) -> Mapping[Group, Mapping[str, float]]:
        """The same of each group alone in each format."""
        ...

    def tuning(self, variant: Variant) -> tuple[Evidence, ...]: ...
    def acceptance(self, variant: Variant) -> tuple[Evidence, ...]: ...


@dataclass(frozen=True)
class _Tried:
    """A point, and what the search needs to go on from it."""

    point: Point
    menu: Menu
    assignment: Assignment
    shares: Shares
    place: int = -1


@dataclass
class _Line:
    """A menu's line of assignments. ways: the variant chosen for each format. options: what each group may have."""

    menu: Menu
    ways: Mapping[str, Variant]
    options: Mapping[Group, Sequence[Option]]
    assignments: Sequence[Assignment]
    model: CostModel


@dataclass
class Searcher:
    """One search.

    variant: the name that what is found has in the bundle; every point has it, so that none is made twice. reference:
    the yardstick's name. growth: acceptance items for one tuning item. most_points: how many points may be judged on
    the tuning data. told: what progress and decisions are told to, a line each.
    """

    bench: Workbench
    target: str
    objective: str
    menus: Sequence[Menu]
    most_looks: int
    growth: float
    most_points: int
    told: Callable[[str], None]
    variant: str
    reference: str
    elsewhere: CostModel | None = None
    tried: dict[str, _Tried] = field(default_factory=dict)
    looks: list[Look] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    lines: dict[str, _Line] = field(default_factory=dict)
    groups: Mapping[Group, Mapping[str, float]] = field(default_factory=dict)

    def run(self) -> Search:
        """The record; its chosen is empty where nothing was confirmed."""
        started = time.perf_counter()
        self.groups = self.bench.groups()
        for menu in self.menus:
            self._explore(menu)
        chosen = self._confirm()
        return Search(
            target=self.target,
            objective=self.objective,
            basis=self._basis(),
            reference=self.reference,
            points=tuple(t.point for t in self.tried.values()),
            layers=self._choices(chosen) if chosen else (),
            looks=tuple(self.looks),
            most_looks=self.most_looks,
            chosen=chosen.point.name if chosen else "",
            variant=self.variant if self.looks else "",
            seconds=round(time.perf_counter() - started, 1),
            notes=tuple(self.notes),
        )

    def best(self) -> _Tried | None:
        """The cheapest that passed on the tuning data."""
        return min((t for t in self.tried.values() if t.point.passed), key=_cost, default=None)

    # ---- one menu

    def _explore(self, menu: Menu) -> None:
        """Find where the budget begins to hold on the menu's line."""
        base = self._try(menu, f"{menu.name}: {FLOAT}", dict.fromkeys(self.groups, FLOAT), {}, judge=False)
        if base is None:
            return
        ways = {name: self._way(menu, name, ways) for name, ways in menu.formats.items()}
        whole = [base]
        for name in ways:
            found = self._try(menu, f"{menu.name}: {name}", dict.fromkeys(self.groups, name), ways, judge=False)
            if found is None:
                continue
            if self.bench.here and _cost(found) >= _cost(base):
                self.note(f"{menu.name}: {name} is no cheaper than {FLOAT} here, and is left out")
                continue
            whole.append(found)
        formats = [next(iter(t.assignment.values())) for t in whole[1:]]
        model = self._model(whole, formats)
        ways = {name: ways[name] for name in formats}
        best = self.best()
        if best is not None and min(model.predict(t.shares) for t in whole) > (1 - _WORTH) * _cost(best):
            self.note(f"{menu.name}: nothing of it is cheaper than {best.point.name}, which passed")
            return
        options = self._options(ways, model)
        found_line = _Line(menu, ways, options, line(options), model)
        self.lines[menu.name] = found_line
        self._walk(found_line)
        for found in sorted(whole, key=_cost):
            self._judge_if_cheaper(found, found_line)

    def _way(self, menu: Menu, name: str, ways: tuple[Variant, ...]) -> Variant:
        """The way of finding a format's numbers that moves the outputs least on calibration data."""
        errors: dict[int, float] = {}
        for i, way in enumerate(ways) if len(ways) > 1 else ():
            self.told(f"{menu.name}: {name} by {told_way(way)}")
            try:
                errors[i] = self.bench.error(replace(way, name=self.variant))
            except QuantizeError as error:
                self.note(f"{menu.name}: {name} by {told_way(way)} can't be made: {error.message}")
        if not errors:
            return ways[0]
        best = min(errors, key=lambda i: (errors[i], i))
        ranked = ", ".join(f"{told_way(ways[i])} {errors[i]:.4f}" for i in sorted(errors, key=lambda i: errors[i]))
        self.note(f"{menu.name}: {name} is made by {told_way(ways[best])} (error of the outputs: {ranked})")
        return ways[best]

    def _options(self, ways: Mapping[str, Variant], model: CostModel) -> dict[Group, list[Option]]:
        errors = self.bench.errors(ways) if ways else {}
        found = {}
        for group in self.groups:
            found[group] = [Option(FLOAT, 0.0, 0.0)]
            for name in ways:
                change = sum(part * model.of(graph, name) for graph, part in self._part(group).items())
                found[group].append(Option(name, change, errors[group][name]))
        return found

    def _walk(self, on: _Line) -> None:
        """The cheapest place of the line that passes: steps that double from the cheapest end on, then halving."""
        last = len(on.assignments) - 1
        failed, place, step = -1, 0, 1
        passed: int | None = None
        while passed is None:
            found = self._at(on, place)
            if found is None or (found.point.passed is None):
                return
            if found.point.passed:
                passed = place
            elif place == last or (failed < 0 and not self._within_reach(on)):
                return
            else:
                failed, place, step = place, min(place + step, last), step * 2
        while passed - failed > 1:
            saving = self._predicted(on, passed) - self._predicted(on, failed + 1)
            if saving < _WORTH * abs(self._predicted(on, passed)):
                return
            middle = (passed + failed) // 2
            found = self._at(on, middle)
            if found is None or found.point.passed is None:
                return
            failed, passed = (failed, middle) if found.point.passed else (middle, passed)

    def _judge_if_cheaper(self, found: _Tried, on: _Line) -> None:
        """The line begins where the cost model is lowest; one format for all, measured to be cheaper, counts too."""
        best = self.best()
        if found.point.passed is None and best is not None and _cost(found) < (1 - _WORTH) * _cost(best):
            self._try(on.menu, found.point.name, found.assignment, on.ways, judge=True, on=on)

    def _within_reach(self, on: _Line) -> bool:
        """Whether data can show the budget to be kept at all: where it can't of all in float, whose every answer is the
        original's, nothing else is worth judging."""
        found = self._at(on, len(on.assignments) - 1)
        if found is None or found.point.passed is not False or any(e.discordant for e in found.point.tuning):
            return True
        self.note(f"{on.menu.name}: not even {FLOAT}, which answers as the original does, would pass: too few items")
        return False

    def _at(self, on: _Line, place: int) -> _Tried | None:
        assignment = on.assignments[place]
        given = set(assignment.values())
        name = (
            f"{on.menu.name}: {next(iter(given)) if len(given) == 1 else f'mix {place} of {len(on.assignments) - 1}'}"
        )
        return self._try(on.menu, name, assignment, on.ways, judge=True, on=on, place=place)

    def _predicted(self, on: _Line, place: int) -> float:
        return on.model.predict(self._shares(on.assignments[place]))

    # ---- one point

    def _try(
        self,
        menu: Menu,
        name: str,
        assignment: Assignment,
        ways: Mapping[str, Variant],
        *,
        judge: bool,
        on: _Line | None = None,
        place: int = -1,
    ) -> _Tried | None:
        """Build and measure a point, and judge it on the tuning data if asked. None where the target refuses it."""
        known = self.tried.get(name)
        if known is not None and (known.point.passed is not None or not judge):
            return known
        judged = sum(t.point.passed is not None for t in self.tried.values())
        if judge and judged >= self.most_points:
            self.note(f"{name} is not judged: {self.most_points} points are the most (search.points)")
            return known
        self.told(f"{name} (point {len(self.tried) + (known is None)}; {judged} of at most {self.most_points} judged)")
        variant = menu.mixture(self.variant, assignment, ways)
        shares = self._shares(assignment)
        try:
            cost = sum(self.bench.cost(variant).values()) if self.bench.here or self.objective == "size" else None
            size = self.bench.size(variant)
            evidence = self.bench.tuning(variant) if judge else ()
        except (BackendError, QuantizeError) as error:
            self.note(f"{name} is left out: {error.message}")
            return None
        short = promising(evidence, self.growth) if judge else ""
        predicted = on.model.predict(shares) if on else None
        point = Point(
            name=name,
            variant=variant,
            formats=dict(Counter(assignment.values())),
            cost=cost,
            predicted=predicted,
            size_bytes=size,
            error=predicted_error(on.options, assignment) if on else None,
            tuning=evidence,
            passed=not short if judge else None,
            why=(short or "passed on the tuning data") if judge else "measured for the cost model",
        )
        self.tried[name] = found = _Tried(point, menu, assignment, shares, place)
        if judge:
            self.told(f"{name}: {_amount(point.cost, self.objective)}; {point.why}")
        return found

    def _part(self, group: Group) -> dict[str, float]:
        """By graph, the group's share of its linear work."""
        totals = self._totals()
        return {graph: work / totals[graph] for graph, work in self.groups[group].items()}

    def _totals(self) -> dict[str, float]:
        totals: Counter[str] = Counter()
        for works in self.groups.values():
            for graph, work in works.items():
                totals[graph] += work  # type: ignore[assignment]
        return dict(totals)

    def _shares(self, assignment: Assignment) -> Shares:
        shares: dict[str, dict[str, float]] = {graph: {} for graph in self._totals()}
        for group, format_ in assignment.items():
            for graph, part in self._part(group).items():
                shares[graph][format_] = shares[graph].get(format_, 0.0) + part
        return shares

    def _model(self, whole: Sequence[_Tried], formats: Sequence[str]) -> CostModel:
        if self.bench.here or self.objective == "size":
            points = [(t.shares, self.bench.cost(t.point.variant)) for t in whole]
            return fitted(points, f"fitted to {len(points)} measured points")
        graphs = list(self._totals())
        return self.elsewhere or assumed(graphs, formats)

    def _basis(self) -> str:
        if self.bench.here or self.objective == "size":
            return "measured on this machine"
        return self.elsewhere.basis if self.elsewhere else next((on.model.basis for on in self.lines.values()), "")

    # ---- the acceptance data

    def _confirm(self) -> _Tried | None:
        """The first point that the acceptance data confirms. After one that fails come those with less error."""
        if not any(t.point.passed for t in self.tried.values()):
            self.note("no point passed on the tuning data; the most exact one is tested all the same")
        candidate = self._bold() or self.best() or self._most_exact()
        while candidate is not None and len(self.looks) < self.most_looks:
            number = len(self.looks) + 1
            self.told(f"{candidate.point.name}: look {number} of at most {self.most_looks} at the acceptance data")
            evidence = self.bench.acceptance(candidate.point.variant)
            judged = [e for e in evidence if e.verdict is not None]
            accepted = bool(judged) and all(e.verdict is Verdict.NON_INFERIOR for e in judged)
            confidence = tuple(e.confidence for e in judged)
            self.looks.append(Look(number, candidate.point.name, confidence, evidence, accepted))
            if accepted:
                return candidate
            self.note(f"{candidate.point.name} is not confirmed by the acceptance data (look {number})")
            candidate = self._next(candidate)
        return None

    def _bold(self) -> _Tried | None:
        """Where looks can be spared: the cheapest point that tuning data refused by so little that chance may have."""
        best = self.best()
        if best is None or self.most_looks < 2:
            return None
        saving = (t for t in self.tried.values() if t.point.passed is False and _cost(t) < (1 - _SAVING) * _cost(best))
        bold = (t for t in saving if chance_to_pass(t.point.tuning, self.growth) >= _CHANCE)
        found = min(bold, key=_cost, default=None)
        if found is not None:
            self.note(
                f"{found.point.name} is looked at first: on the tuning data it missed by no more than chance may do"
            )
        return found

    def _most_exact(self) -> _Tried | None:
        judged = [t for t in self.tried.values() if t.point.passed is not None]
        return min(judged, key=lambda t: (t.point.error or 0.0, _cost(t)), default=None)

    def _next(self, failed: _Tried) -> _Tried | None:
        """The cheapest point whose error is as far below the failed one's as its look asks for.

        Another that passed already, or one further along the failed one's line.
        """
        seen = {look.point for look in self.looks}
        last_look = len(self.looks) + 1 == self.most_looks
        wanted = (failed.point.error or 0.0) * error_to_pass(self.looks[-1].evidence, last=last_look)
        safer = [
            t
            for t in self.tried.values()
            if t.point.passed and t.point.name not in seen and (t.point.error or 0.0) <= wanted
        ]
        known = min(safer, key=_cost, default=None)
        on = self.lines.get(failed.menu.name)
        if on is None:
            return known
        last = len(on.assignments) - 1
        near = (i for i in range(failed.place + 1, last) if predicted_error(on.options, on.assignments[i]) <= wanted)
        place = next(near, last)
        if known is not None and _cost(known) <= self._predicted(on, place):
            return known
        while place > failed.place:
            found = self._at(on, place)
            if found is not None and found.point.passed and found.point.name not in seen:
                return found
            if place == last:
                break
            place = min(last, place + max(1, math.ceil((last - place) * _BACK)))
        return known

    # ---- why

    def _choices(self, chosen: _Tried) -> tuple[LayerChoice, ...]:
        on = self.lines[chosen.menu.name]
        worst = {
            f: max((o.error for os in on.options.values() for o in os if o.format == f), default=0.0) for f in on.ways
        }
        found = []
        for group, options in on.options.items():
            by_name = {o.format: o for o in options}
            own = by_name[chosen.assignment[group]]
            others = tuple(Alternative(o.format, o.error, o.cost - own.cost) for o in options if o.format != own.format)
            why = _why(own, options, worst, self.objective)
            found.append(LayerChoice(", ".join(self.groups[group]), group, own.format, own.error, others, why))
        return tuple(found)

    def note(self, message: str) -> None:
        self.notes.append(message)
        self.told(message)


def told_way(variant: Variant) -> str:
    """How a variant's numbers are found, in words: `smoothquant`, `rtn, percentile, bias correction`."""
    clipping = f", {variant.clipping}" if variant.clipping else ""
    return f"{variant.method}{clipping}{', bias correction' if variant.bias_correction else ''}"


def _cost(tried: _Tried) -> float:
    """Measured, else predicted, else infinite."""
    found = tried.point.cost if tried.point.cost is not None else tried.point.predicted
    return math.inf if found is None else found


def _amount(cost: float | None, objective: str) -> str:
    if cost is None:
        return "not measured"
    return f"{cost / 1e6:.2f} MB" if objective == "size" else f"{cost:.3f} ms"


def _why(own: Option, options: Sequence[Option], worst: Mapping[str, float], objective: str) -> str:
    cheapest = min(options, key=lambda o: o.cost)
    if own.format == cheapest.format:
        if own.format == FLOAT:
            return "no format is cheaper than float for it"
        return f"the cheapest format; alone it moves the outputs by {own.error:.2%}, which the budget bears"
    most = cheapest.error >= worst.get(cheapest.format, 0.0)
    rank = "more than any other layer" if most else "with the others more than the budget bears"
    more = _amount(own.cost - cheapest.cost, objective)
    moved = f"{cheapest.format} alone would move the outputs by {cheapest.error:.2%}, {rank}"
    return f"{moved}; {own.format} costs {more} more"
