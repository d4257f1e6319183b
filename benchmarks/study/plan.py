"""Which trainings there are, and in which order: rates are searched with the first seed, then every seed is trained."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from . import contestants
from .contestants import Contestant, Rates
from .trials import Outcome, Setting, Subject, Trial

Run = Callable[[Trial], Outcome | None]
"""A trial's outcome, from the store or trained now; None: it failed."""


@dataclass(frozen=True)
class Plan:
    """What is to be trained; ``lengths`` maps a prefix method's name to its contestants by length."""

    table: list[Contestant]
    lengths: dict[str, dict[int, Contestant]]
    seeds: Sequence[int]
    length_seeds: Sequence[int]
    setting: Setting
    subject: Subject

    def trial(self, contestant: Contestant, rates: Rates, seed: int, search: bool = False) -> Trial:
        """One training of this study."""
        return Trial(contestant, rates, seed, search, self.setting, self.subject)

    def steps(self) -> int:
        """Of all trainings together, if none ends early."""
        searched = [*self.table, *(searched_length(by_length) for by_length in self.lengths.values())]
        over_lengths = [contestant for by_length in self.lengths.values() for contestant in by_length.values()]
        runs = [(contestant, self.seeds) for contestant in self.table]
        runs += [(contestant, self.length_seeds) for contestant in over_lengths]
        trials = [
            *(
                self.trial(c, rates, 0, search=True)
                for c in searched
                if len(c.candidates) > 1
                for rates in c.candidates
            ),
            *(self.trial(c, c.candidates[0], seed) for c, seeds in runs for seed in seeds),
        ]
        return sum(trial.steps for trial in trials)


@dataclass
class Row:
    """A contestant's outcomes: of the search by learning rates, of the runs by seed."""

    contestant: Contestant
    rates: Rates | None = None
    search: list[tuple[Rates, Outcome]] = field(default_factory=list)
    runs: dict[int, Outcome] = field(default_factory=dict)


@dataclass
class Findings:
    """All rows so far."""

    table: list[Row] = field(default_factory=list)
    lengths: dict[str, dict[int, Row]] = field(default_factory=dict)


def carry_out(plan: Plan, run: Run, findings: Findings) -> None:
    """Run everything, first the table, then the lengths; ``findings`` is filled on the way.

    Seeds are the outer loop: a study that is stopped has some seeds of all methods, and not all seeds of some.
    """
    findings.table += [Row(contestant) for contestant in plan.table]
    for row in findings.table:
        _search(plan, row, run)
    _runs(plan, findings.table, plan.seeds, run)
    for name, by_length in plan.lengths.items():
        findings.lengths[name] = rows = {length: Row(contestant) for length, contestant in by_length.items()}
        searched = Row(searched_length(by_length))
        _search(plan, searched, run)
        for row in rows.values():
            row.rates, row.search = searched.rates, searched.search
    _runs(plan, [row for rows in findings.lengths.values() for row in rows.values()], plan.length_seeds, run)


def searched_length(by_length: dict[int, Contestant]) -> Contestant:
    """The one whose rates all lengths are trained with: of the middle length, the shorter of two."""
    lengths = sorted(by_length)
    return by_length[lengths[(len(lengths) - 1) // 2]]


def _search(plan: Plan, row: Row, run: Run) -> None:
    candidates = row.contestant.candidates
    if len(candidates) == 1:
        row.rates = candidates[0]
        return
    for rates in candidates:
        outcome = run(plan.trial(row.contestant, rates, plan.seeds[0], search=True))
        if outcome is not None:
            row.search.append((rates, outcome))
    if row.search:
        row.rates = max(row.search, key=lambda scored: scored[1].score)[0]


def _runs(plan: Plan, rows: list[Row], seeds: Sequence[int], run: Run) -> None:
    for seed in seeds:
        for row in rows:
            if row.rates is not None:
                outcome = run(plan.trial(row.contestant, row.rates, seed))
                if outcome is not None:
                    row.runs[seed] = outcome


def over_lengths(methods: Sequence[str], lengths: Sequence[int]) -> dict[str, dict[int, Contestant]]:
    """The named prefix methods of each length."""
    if not lengths:
        return {}
    by_method = [{length: contestants.of_length(key, length) for length in lengths} for key in methods]
    return {next(iter(by_length.values())).name: by_length for by_length in by_method}
