"""The frame of every exercise check: properties with points, a report, and a message that names the mistake.

A check is a function `check_x(fn, seed=0)` that hands its properties to `run_check`. A property is a function of the
learner's function and a seeded `random.Random`; it raises `Wrong` at the first place that differs. What was expected
comes from a slow oracle in plain Python (`checks/oracle.py`), never from a shipped solution.

    LEAVES_ZERO = Mistake("zero kept", "relu(0) is 0: compare with <, not with <=.")

    def _positive_part(fn, rng):
        xs = [rng.uniform(-1, 1) for _ in range(7)]
        got = expect_tensor(fn(torch.tensor(xs)), "the result", (7,))
        compare(got, [max(x, 0.0) for x in xs], "result")

    def check_relu(fn, seed=0):
        return run_check("relu", fn, [Property("negative numbers become 0", 2, _positive_part)], seed)

Which mistake a report names, in this order: the one that `Wrong` carries; the one that `diagnose` recognizes (usually
by comparing with what each mistake would compute, `first_match`); the property's own `fallback`; else "not recognized".
"""
from __future__ import annotations

import copy
import inspect
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minimoe.course.report import MUTATES, RAISES, CheckFailed, Mistake, Report, Result, Wrong

__all__ = ["CheckFailed", "Learner", "Mistake", "Property", "Report", "Result", "Wrong", "compare", "expect_pair",
           "expect_tensor", "first_match", "run_check", "same"]


@dataclass(frozen=True)
class Property:
    """One thing that must hold: `name`, `points`, `test(fn, rng)`, and the mistake to name for want of a better one."""

    name: str
    points: int
    test: Callable[[Learner, random.Random], None]
    fallback: Mistake | None = None


class Learner:
    """The learner's function, called on copies; errors become `Wrong`, changes to the inputs are remembered."""

    def __init__(self, exercise: str, fn: Callable):
        self.exercise, self.fn = exercise, fn
        self.mutated: Wrong | None = None
        self.had_inputs = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.call(self.fn, *args, **kwargs)

    def call(self, fn: Callable, *args: Any, **kwargs: Any) -> Any:
        """`fn(*args, **kwargs)` under the same care: for a method, or a module that the learner's class made."""
        names = _names(fn, args) + list(kwargs)
        args = (*args, *kwargs.values())
        given = [_copy(a) for a in args]
        self.had_inputs = self.had_inputs or bool(args)
        positional = len(args) - len(kwargs)
        try:
            out = fn(*given[:positional], **dict(zip(kwargs, given[positional:])))
        except NotImplementedError as error:
            if not str(error) or str(error).startswith(self.exercise):
                raise _unwritten(str(error) or f"{self.exercise}: your code here") from None
            raise _raised(fn, error, names, args) from None
        except Exception as error:  # whatever the learner's code raises is a finding, not a failure of the check
            raise _raised(fn, error, names, args) from None
        if self.mutated is None:
            self.mutated = next(filter(None, map(_changed, names, args, given)), None)
        return out


def run_check(exercise: str, fn: Callable, properties: Iterable[Property], seed: int = 0,
              diagnose: Callable[[Learner, random.Random], Mistake | None] | None = None,
              value: bool = False) -> Report:
    """Tests every property of `fn`, prints the report, and gives it back.

    With `value=True` the object need not be a function: the properties find it as `fn.fn`.

    `diagnose(fn, rng)` is asked only when a property fails that cannot name the mistake itself. A last property, one
    point, is added where there are inputs: they are left as they were. The random state of the caller stays as it is.

    Raises:
        CheckFailed: a property does not hold; its `report` is the same report.
        NotImplementedError: the stub is still there; the message names the exercise.
        TypeError: `fn` is not a function.

    >>> def negative(fn, rng):
    ...     compare(fn(torch.tensor([-1.0, 2.0])), [0.0, 2.0], "result")
    >>> _ = run_check("relu", torch.relu, [Property("negative numbers become 0", 2, negative)])
    relu: 3 of 3 points, passed
      ok  2/2  negative numbers become 0
      ok  1/1  the inputs are left as they were
    """
    if not (value or callable(fn)):
        raise TypeError(f"check_{exercise} takes your function itself, got {type(fn).__name__}: write "
                        f"check_{exercise}({exercise})")
    learner, results, known = Learner(exercise, fn), [], []
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        for p in [*properties, Property("the inputs are left as they were", 1, _unchanged)]:
            if p.test is _unchanged and not learner.had_inputs:
                continue
            wrong = _fault(p, learner, _rng(exercise, p.name, seed))
            if wrong and wrong.mistake is None and diagnose and not known:
                known.append(_diagnosed(diagnose, learner, _rng(exercise, "diagnose", seed)))
            mistake = wrong and (wrong.mistake or (known and known[0]) or p.fallback or wrong.last_resort)
            judged = not wrong or wrong.mistake is not None or all(r.fault is None for r in results)
            results.append(Result(p.name, p.points, wrong, mistake, judged))
    report = Report(exercise, tuple(results))
    print(report)
    if not report.passed:
        raise CheckFailed(report)
    return report


def first_match(candidates: Iterable[tuple[Mistake, Callable[[], bool]]]) -> Mistake | None:
    """The first mistake whose test says that the learner's result is the one which this mistake gives."""
    return next((mistake for mistake, is_it in candidates if is_it()), None)


# --- what properties are written with ---------------------------------------------------------------------------------
def expect_tensor(value: Any, name: str, shape: tuple[int, ...], dtype: torch.dtype | None = torch.float32,
                  mistake: Mistake | None = None) -> Tensor:
    """`value`, if it is a tensor of that shape and dtype (None: any).

    Raises:
        Wrong: it is not.
    """
    if not isinstance(value, Tensor):
        raise Wrong(f"{name} as a tensor", type(value).__name__, mistake)
    if tuple(value.shape) != tuple(shape):
        raise Wrong(f"{name} of shape {tuple(shape)}", f"shape {tuple(value.shape)}", mistake)
    if dtype is not None and value.dtype != dtype:
        raise Wrong(f"{name} of dtype {dtype}", str(value.dtype), mistake)
    return value


def expect_pair(value: Any, what: str) -> tuple[Any, Any]:
    """The two members of `value`.

    Raises:
        Wrong: `value` is not a tuple or list of two.
    """
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        got = f"{type(value).__name__} of {len(value)}" if isinstance(value, (tuple, list)) else type(value).__name__
        raise Wrong(what, got)
    return value[0], value[1]


def compare(got: Any, expected: Any, name: str, tol: float = 1e-5, mistake: Mistake | None = None) -> None:
    """Compares numbers in nested lists (or tensors) of one shape, `tol` absolute plus relative.

    Raises:
        Wrong: at the first place that differs, with its index and both values.

    >>> compare([[1.0, 2.0]], [[1.0, 2.5]], "weights")
    Traceback (most recent call last):
    minimoe.course.report.Wrong: expected weights[0, 1] = 2.5, got 2
    """
    for index, g, e in _places(_lists(got), _lists(expected), ()):
        if g is None or e is None:
            raise Wrong(f"{name} with {'a' if g is None else 'no'} value at {list(index)}", "another shape", mistake)
        if not isinstance(g, (int, float)):
            raise Wrong(f"{name}{list(index)} = {_number(e)}", f"{type(g).__name__} {g!r}"[:60], mistake)
        if not abs(g - e) <= tol + tol * abs(e):    # written so that nan differs
            raise Wrong(f"{name}{list(index)} = {_number(e)}", _number(g), mistake)


def same(got: Any, expected: Any, tol: float = 1e-4) -> bool:
    """Whether `compare` finds no difference."""
    try:
        compare(got, expected, "", tol)
    except Wrong:
        return False
    return True


def _places(got, expected, index):
    if isinstance(got, list) or isinstance(expected, list):
        got, expected = (x if isinstance(x, list) else [x] for x in (got, expected))
        for i in range(max(len(got), len(expected))):
            g, e = (x[i] if i < len(x) else None for x in (got, expected))
            yield from _places(g, e, (*index, i))
    else:
        yield index, got, expected


def _lists(value):
    return value.detach().cpu().tolist() if isinstance(value, Tensor) else value


def _number(x: float | bool) -> str:
    return str(x) if isinstance(x, (bool, int)) else f"{x:.5g}"


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    return "(a generator)" if isinstance(value, torch.Generator) else f"= {value!r}"


def _copy(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()        # not detached: the gradient still reaches the property's own tensor
    return value if isinstance(value, torch.Generator) else copy.deepcopy(value)


def _changed(name: str, before: Any, after: Any) -> Wrong | None:
    if isinstance(before, Tensor):
        if before.shape != after.shape:
            return Wrong(f"{name} still of shape {tuple(before.shape)}", f"shape {tuple(after.shape)}", MUTATES)
        if torch.equal(before, after):
            return None
        at = (before != after).nonzero()[0].tolist()
        was, now = (_number(t[tuple(at)].item()) for t in (before, after))
        return Wrong(f"{name}{at} still {was} after the call", now, MUTATES)
    if isinstance(before, (list, dict)) and before != after:
        return Wrong(f"{name} still {before!r} after the call", repr(after), MUTATES)
    return None


def _fault(p: Property, learner: Learner, rng: random.Random) -> Wrong | None:
    try:
        p.test(learner, rng)
    except Wrong as wrong:
        return wrong
    except NotImplementedError:
        raise
    except Exception as error:      # the result was too odd for the check to look at
        return Wrong("a result that can be examined", f"{type(error).__name__}: {error}"[:90])
    return None


def _raised(fn: Callable, error: Exception, names: Sequence[str], args: Sequence) -> Wrong:
    """The error in one line: its kind, its line in the learner's own function if that can be told, and the inputs."""
    code, line, frame = getattr(fn, "__code__", None), None, error.__traceback__
    while frame is not None:
        line = frame.tb_lineno if frame.tb_frame.f_code is code else line
        frame = frame.tb_next
    where = "" if line is None else f" in line {line - code.co_firstlineno + 1} of {fn.__name__}"
    text = (str(error).strip() or "(no message)").splitlines()[0]
    inputs = ", ".join(f"{n} {_describe(a)}" for n, a in zip(names, args))
    return Wrong(f"a result for {inputs or 'no inputs'}", f"{type(error).__name__}{where}: {text}", last_resort=RAISES)


def _names(fn: Callable, args: Sequence) -> list[str]:
    try:
        names = list(inspect.signature(fn).parameters)
    except (TypeError, ValueError):
        names = []
    return [names[i] if i < len(names) else f"argument {i + 1}" for i in range(len(args))]


def _unwritten(message: str) -> NotImplementedError:
    error = NotImplementedError(message)
    # a notebook need not show the insides of the check
    error._render_traceback_ = lambda: [f"NotImplementedError: {message}"]
    return error


def _unchanged(learner: Learner, rng: random.Random) -> None:
    if learner.mutated is not None:
        raise learner.mutated


def _rng(*words: Any) -> random.Random:
    return random.Random("/".join(map(str, words)))


def _diagnosed(diagnose, learner: Learner, rng: random.Random) -> Mistake | None:
    try:
        return diagnose(learner, rng)
    except Exception:       # the learner's function gives nothing on these inputs that could be recognized
        return None
