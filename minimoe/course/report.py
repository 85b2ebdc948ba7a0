"""What a check says: mistakes with a name, the place where something is wrong, the report."""
from __future__ import annotations

import textwrap
from dataclasses import dataclass


@dataclass(frozen=True)
class Mistake:
    """A misconception: a short `name` for tables, and the `text` that the learner reads."""

    name: str
    text: str


UNKNOWN = Mistake("not recognized", "none of the usual mistakes gives this result: work out this one place by hand.")
RAISES = Mistake("raises an error",
                 "the error comes from your own code; look at the shapes of the inputs in the lines above.")
MUTATES = Mistake("changes its input", "your function changes a tensor that belongs to its caller: an operation that "
                  "ends in _ or an assignment to x[...] writes into the argument. Work on a new tensor.")


class Wrong(Exception):
    """What a property raises: what it `expected`, what it `got` (first place and value), the `mistake` if known."""

    def __init__(self, expected: str, got: str, mistake: Mistake | None = None, last_resort: Mistake = UNKNOWN):
        super().__init__(f"expected {expected}, got {got}")
        self.expected, self.got, self.mistake, self.last_resort = expected, got, mistake, last_resort


@dataclass(frozen=True)
class Result:
    """How one property came out; `fault` is None when it holds, and then `mistake` is None too.

    It is not `judged` where it fails after another one without a mistake of its own: the earlier fault may be the cause.
    """

    name: str
    points: int
    fault: Wrong | None = None
    mistake: Mistake | None = None
    judged: bool = True


@dataclass(frozen=True)
class Report:
    """What a check found: `passed`, `points` of `out_of`, one `Result` per property, `mistake` (of the first fault)."""

    exercise: str
    results: tuple[Result, ...]

    @property
    def passed(self) -> bool:
        return all(r.fault is None for r in self.results)

    @property
    def points(self) -> int:
        return sum(r.points for r in self.results if r.fault is None)

    @property
    def out_of(self) -> int:
        return sum(r.points for r in self.results)

    @property
    def mistake(self) -> Mistake | None:
        return next((r.mistake for r in self.results if r.fault), None)

    @property
    def message(self) -> str:
        """What was expected, the first place that differs, and the likely mistake; "" when all is well."""
        first = next((r for r in self.results if r.fault), None)
        if first is None:
            return ""
        rows = [("fault in", first.name), ("expected", first.fault.expected), ("got", first.fault.got),
                ("likely", first.mistake.text)]
        return "\n".join(textwrap.fill(f"{label:<10}{text}", 100, subsequent_indent=" " * 10) for label, text in rows)

    def __str__(self) -> str:
        lines = [f"{self.exercise}: {self.points} of {self.out_of} points, {'passed' if self.passed else 'not yet'}"]
        for r in self.results:
            mark = "ok" if r.fault is None else "no" if r.judged else "--"
            lines.append(f"  {mark:<3} {0 if r.fault else r.points}/{r.points}  {r.name}")
        if not all(r.judged for r in self.results):
            lines.append("  (-- cannot be judged before the fault below is mended)")
        return "\n".join([*lines, self.message]).rstrip()

    def __repr__(self) -> str:
        return f"Report({self.exercise}: {self.points} of {self.out_of} points)"

    def _ipython_display_(self) -> None:
        """Nothing: the report was printed already, a notebook need not show it twice."""


class CheckFailed(AssertionError):
    """The learner's object does not do what the exercise asks; `report` says what and where."""

    def __init__(self, report: Report):
        super().__init__(f"{report.exercise}, {report.points} of {report.out_of} points")   # `run_check` prints the rest
        self.report = report

    def _render_traceback_(self) -> list[str]:
        return [f"CheckFailed: {self}"]
