"""Mutation testing of the core: break it in a small way, many times, and see whether a test goes red.

`make mutants` tries a sample, `make mutants ARGS=--all` every mutant, and with ``--only _sizing`` those
of one room. Mutants that no test can or should notice are listed in `mutants.md`, with why; they are
not tried.

First the tests of the core run once, to see which of them reach which line, and how long each takes.
Then each mutant gets a process of its own, forked from one that has collected the tests. There,
functions of the package get other code, and the tests that reach the line run, the quickest first,
until one fails or takes far too long.
"""

from __future__ import annotations

import argparse
import ast
import copy
import faulthandler
import gc
import os
import random
import re
import resource
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any, NamedTuple

import coverage
import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "whitepool"
LISTED = ROOT / "tests" / "mutants.md"
CORE = sorted(path for path in PACKAGE.glob("_*.py") if path.name != "__init__.py")
# These look at the source, or run other processes, where there is no mutant; or they search at random,
# or simulate, and take long: a test that says what must hold should notice a mutant.
LEFT_OUT = (
    "cancellation_sweep", "chaos", "documents", "examples", "exit", "fleet", "graceful", "live",
    "model", "package", "pages", "public_api", "rolling", "rooms", "schedule_sweep", "service",
    "telemetry", "traces", "typing",
)  # fmt: skip
PYTEST = [
    *("-p", "no:cacheprovider", "-o", "faulthandler_timeout=0", "-m", "not postgres and not pgbouncer"),
    *(f"--ignore=tests/test_{name}.py" for name in LEFT_OUT),
    *("--ignore=tests/postgres", "-k", "not fleet"),
]
SWAPPED: dict[type[ast.AST], type[ast.AST]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.Pow: ast.Mult,
    ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult, ast.And: ast.Or, ast.Or: ast.And,
    ast.Break: ast.Continue, ast.Continue: ast.Break,
}  # fmt: skip
NOT_PUT_IN_PLACE = 3
OWN = {
    "_checking": "check_first", "_nesting": "mistakes", "_operating": "resize",
    "_sharing": "full", "_worker_task": "hooks",
}  # fmt: skip
"""The tests of a room, where they are not in a module of its name."""
SWAPPED_CALLS = {"min": "max", "max": "min", "all": "any", "any": "all"}


class Mutant(NamedTuple):
    """One small change of one file."""

    path: Path
    tree: ast.Module
    parent: ast.AST
    field: str
    position: int | None
    changed: ast.AST
    lines: range
    """The lines of the statement."""
    name: tuple[str, str, str, str]
    """File, function, line and change, as they stand in the list."""


def changes(node: ast.AST) -> Iterator[tuple[ast.AST, str]]:
    """Return what may stand in place of a node, and how the list names that, if not by the code."""

    def with_(text: str = "", **fields: Any) -> tuple[ast.AST, str]:
        changed = copy.copy(node)
        for field, value in fields.items():
            setattr(changed, field, value)
        return changed, text

    match node:
        case ast.Compare(ops=[first, *others]):
            yield with_(ops=[SWAPPED[type(first)](), *others])
            if others:
                yield with_(ops=[first, *(SWAPPED[type(op)]() for op in others)])
        case ast.BinOp(op=op) | ast.BoolOp(op=op) | ast.AugAssign(op=op) if type(op) in SWAPPED:
            yield with_(op=SWAPPED[type(op)]())
        case ast.UnaryOp(op=ast.Not() | ast.USub(), operand=operand):
            yield operand, ""
        case ast.Break() | ast.Continue():
            yield SWAPPED[type(node)](), ""
        case ast.Constant(value=bool(value)):
            yield with_(value=not value)
        case ast.Constant(value=int(value) | float(value)):
            yield with_(value=value + 1)
        case ast.Call(func=ast.Name(id=name)) if name in SWAPPED_CALLS:
            yield with_(func=ast.Name(SWAPPED_CALLS[name], ast.Load()))
        case ast.Return(value=value) if value is not None and not isinstance(value, ast.Constant):
            yield with_("return None", value=ast.Constant(None))
        case ast.If() | ast.IfExp():
            yield with_("if True", test=ast.Constant(True))
            yield with_("if False", test=ast.Constant(False))
    match node:
        case ast.Expr() | ast.AugAssign() | ast.Raise() | ast.Delete():
            yield ast.Pass(), "pass"
        case ast.Assign(targets=[ast.Attribute() | ast.Subscript()]):
            yield ast.Pass(), "pass"


def is_left_out(node: ast.AST, field: str) -> bool:
    """Say whether nothing is changed in a node: it is no code, or a change of it breaks no promise."""
    match node:
        case ast.Expr(value=ast.Constant()):  # a docstring
            return True
        case ast.Assert() | ast.FormattedValue():  # they find bugs in the pool; they word a message
            return True
        case ast.If(test=ast.Name(id="TYPE_CHECKING")):
            return True
    return field in ("annotation", "returns", "decorator_list", "defaults", "kw_defaults")


def mutants_of(path: Path) -> Iterator[Mutant]:
    """Return every mutant of a file. What is set at the top of a module or class is a choice."""
    lines = path.read_text().splitlines()
    tree = ast.parse("\n".join(lines))
    seen: Counter[tuple[str, str, str]] = Counter()

    def visit(parent: ast.AST, function: str, span: range, is_code: bool) -> Iterator[Mutant]:
        for field, value in ast.iter_fields(parent):
            for index, node in enumerate(value if isinstance(value, list) else [value]):
                if not isinstance(node, ast.AST) or is_left_out(node, field):
                    continue
                inner = span_of(node) if isinstance(node, ast.stmt) else span
                if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                    is_inner = is_code or not isinstance(node, ast.ClassDef)
                    yield from visit(node, f"{function}.{node.name}".lstrip("."), inner, is_inner)
                    continue
                for changed, text in changes(node) if is_code else ():
                    if isinstance(node, ast.Assign) and function.endswith("__init__"):
                        continue  # without it, every test would fail
                    line = lines[node.lineno - 1].strip()  # type: ignore[attr-defined]
                    text = text or f"{ast.unparse(node)} -> {ast.unparse(changed)}"
                    seen[function, line, text] += 1
                    if seen[function, line, text] > 1:
                        text += f" ({seen[function, line, text]})"
                    name = (path.name, function, line, text)
                    at = index if isinstance(value, list) else None
                    yield Mutant(path, tree, parent, field, at, changed, inner, name)
                yield from visit(node, function, inner, is_code)

    yield from visit(tree, "", range(0), False)


def span_of(statement: ast.stmt) -> range:
    """Return the lines of a statement; of an ``if`` or a ``for``, those before its body."""
    last = statement.end_lineno or statement.lineno
    if not isinstance(statement, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        body = getattr(statement, "body", None)
        last = max(statement.lineno, body[0].lineno - 1) if body else last
    return range(statement.lineno, last + 1)


# -- Which tests reach which line ----------------------------------------------------------------------


class Durations:
    """A plugin: notes how long each test takes that passes."""

    def __init__(self) -> None:
        self.of: dict[str, float] = defaultdict(float)
        self.failed: set[str] = set()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.of[report.nodeid] += report.duration
        if report.failed:
            self.failed.add(report.nodeid)


class Reached(NamedTuple):
    tests: dict[str, dict[int, set[str]]]
    """For each file and line: the tests that reach it."""
    seconds: dict[str, float]


def run_once(folder: Path, jobs: int) -> None:
    """Run all tests, and leave in the folder what is needed for `Reached`."""
    pid = os.fork()  # so that the package is loaded again, without what measures the coverage
    if pid:
        os.waitpid(pid, 0)
        return
    os.environ["COVERAGE_FILE"] = str(folder / "coverage")
    os.environ["COVERAGE_CORE"] = "ctrace"
    args = ["--cov=whitepool", "--cov-context=test", "--cov-report=", "--cov-fail-under=0"]
    if jobs > 1:
        args += ["-n", str(jobs), "--dist", "loadfile"]
    durations = Durations()
    pytest.main([*PYTEST, *args], plugins=[durations])
    print(f"left out, because they fail without any mutant: {sorted(durations.failed)}")
    passed = {test: taken for test, taken in durations.of.items() if test not in durations.failed}
    (folder / "seconds").write_text("".join(f"{taken:.4f} {test}\n" for test, taken in passed.items()))
    sys.stdout.flush()
    os._exit(0)


def reached(folder: Path) -> Reached:
    rows = (line.partition(" ") for line in (folder / "seconds").read_text().splitlines())
    seconds = {test: float(taken) for taken, _, test in rows}
    data = coverage.CoverageData(str(folder / "coverage"))
    data.read()
    tests = {
        path.name: {
            line: {context.partition("|")[0] for context in contexts} & seconds.keys()
            for line, contexts in data.contexts_by_lineno(str(path)).items()
        }
        for path in CORE
    }
    return Reached(tests, seconds)


def tests_for(mutant: Mutant, reached: Reached, most: float) -> list[str]:
    """Return the tests to run, in order: first those of the room itself, then the quickest."""
    room = mutant.path.stem
    own = f"tests/test_{OWN.get(room, room[1:])}.py"
    lines = reached.tests[mutant.path.name]
    found = {test for line in mutant.lines for test in lines.get(line, ())}
    seconds = reached.seconds
    chosen: list[str] = []
    total = 0.0
    for test in sorted(found, key=lambda test: (not test.startswith(own), seconds[test], test)):
        total += seconds[test] + 0.005
        if total > most and chosen:
            break
        chosen.append(test)
    return chosen


# -- The mutants ---------------------------------------------------------------------------------------


class Trial:
    """A plugin: instead of running the tests that pytest has collected, tries the mutants with them."""

    def __init__(self, mutants: list[Mutant], reached: Reached, jobs: int, most: float) -> None:
        self.mutants = mutants
        self.reached = reached
        self.jobs = jobs
        self.most = most
        self.survivors: list[Mutant] = []

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        items = {item.nodeid: item for item in session.items}
        quick = sorted(self.reached.seconds, key=lambda test: self.reached.seconds[test])[:100]
        if not (pid := os.fork()):
            try_one(None, [items[test] for test in quick], self.reached.seconds)
        assert os.waitpid(pid, 0)[1] == 0, (
            "a test fails without any mutant, in a process that was forked"
        )

        running: dict[int, Mutant] = {}
        for mutant in [*self.mutants, None]:
            while len(running) == self.jobs or (mutant is None and running):
                pid, status = os.wait()
                tried = running.pop(pid)
                if os.waitstatus_to_exitcode(status) == NOT_PUT_IN_PLACE:
                    self.mutants.remove(tried)
                elif status == 0:
                    self.survivors.append(tried)
                    print("survived: | " + " | ".join(f"`{cell}`" for cell in tried.name) + " | |")
            if mutant is None:
                break
            tests = [items[test] for test in tests_for(mutant, self.reached, self.most)]
            sys.stdout.flush()
            if pid := os.fork():
                running[pid] = mutant
            else:
                try_one(mutant, tests, self.reached.seconds)
        return True


def try_one(mutant: Mutant | None, tests: list[pytest.Item], seconds: dict[str, float]) -> None:
    """Run the tests against a mutant, or None, in a process that ends with that."""
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        resource.setrlimit(resource.RLIMIT_AS, (1 << 32, resource.RLIM_INFINITY))  # a mutant may grow
        if mutant is not None and not put_in_place(mutant):
            os._exit(NOT_PUT_IN_PLACE)
        for test, following in zip(tests, [*tests[1:], None], strict=False):
            faulthandler.dump_traceback_later(3 + 20 * seconds[test.nodeid], exit=True)
            test.config.hook.pytest_runtest_protocol(item=test, nextitem=following)
            if test.session.testsfailed:
                break
        else:
            os._exit(0)
    finally:
        os._exit(1)


def put_in_place(mutant: Mutant) -> bool:
    """Give the functions of the package, which are loaded already, the code of the mutant.

    Return whether that is possible: not where a closure loses a variable, such as that of `super`.
    """
    if mutant.position is None:
        setattr(mutant.parent, mutant.field, mutant.changed)
    else:
        getattr(mutant.parent, mutant.field)[mutant.position] = mutant.changed
    code = compile(ast.fix_missing_locations(mutant.tree), str(mutant.path), "exec")
    codes = {(inner.co_firstlineno, inner.co_name): inner for inner in codes_in(code)}
    for found in gc.get_objects():
        if isinstance(found, FunctionType) and found.__code__.co_filename == code.co_filename:
            old = found.__code__
            new = codes.get((old.co_firstlineno, old.co_name), old)
            if len(new.co_freevars) != len(old.co_freevars):
                return False
            if new != old:
                found.__code__ = new
    return True


def codes_in(code: CodeType) -> Iterator[CodeType]:
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield constant
            yield from codes_in(constant)


# -- The command ---------------------------------------------------------------------------------------


def listed() -> set[tuple[str, ...]]:
    """Return the names of the mutants in the list."""
    rows = re.findall(r"^\| `(.+?)` \| `(.+?)` \| `(.+?)` \| `(.+?)` \|", LISTED.read_text(), re.M)
    return {tuple(cell.replace("\\|", "|") for cell in row) for row in rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--all", action="store_true", help="try every mutant, with all tests")
    parser.add_argument("--only", action="append", default=[], help="one room, such as _sizing")
    parser.add_argument("--sample", type=int, help="how many to try; 300, or all of some rooms")
    parser.add_argument("--seed", type=int, default=1, help="which")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument("--least", type=float, default=95.0, help="the score to reach, in percent")
    parser.add_argument("--keep", type=Path, help="a folder for what the first run finds out, or found")
    options = parser.parse_args()
    os.chdir(ROOT)
    known = listed()
    everything = [mutant for path in CORE for mutant in mutants_of(path)]
    if gone := known - {mutant.name for mutant in everything}:
        sys.exit(f"listed in {LISTED.name}, but not there any more: {sorted(gone)}")
    mutants = [mutant for mutant in everything if mutant.name not in known]
    if options.only:
        mutants = [mutant for mutant in mutants if mutant.path.stem in options.only]
    most = options.sample or (len(mutants) if options.all or options.only else 300)
    if most < len(mutants):
        mutants = random.Random(options.seed).sample(mutants, most)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep or Path(temporary)
        folder.mkdir(exist_ok=True)
        if not (folder / "seconds").exists():
            run_once(folder, options.jobs)
        trial = Trial(mutants, reached(folder), options.jobs, 600 if options.all else 30)
    began = time.monotonic()
    if pytest.main(["-q", "-s", *PYTEST], plugins=[trial]):
        sys.exit(1)
    alive = Counter(mutant.path.name for mutant in trial.survivors)
    tried = Counter(mutant.path.name for mutant in mutants)
    for name in sorted(tried):
        print(f"{name:20}{tried[name] - alive[name]:5} of{tried[name]:5} noticed")
    score = 100 * (1 - alive.total() / max(1, tried.total()))
    print(
        f"{tried.total()} of {len(everything)} mutants tried in {time.monotonic() - began:.0f} s, "
        f"{len(known)} are listed; score: {score:.1f} %"
    )
    sys.exit(score < options.least)


if __name__ == "__main__":
    main()
