"""The shape of the library: imports run one way, `import minimoe` stays light, files stay small, text files are UTF-8."""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "minimoe"

# from the bottom up; a room may import any room below it, and its own level without cycles
LEVELS = [
    {"settings", "counts", "model_config", "config", "device", "norm", "rope"},
    {"attention", "router"},
    {"balance", "experts"},
    {"model"},
    {"decode", "generate", "nf4", "lora", "parallel", "cost", "launch", "data", "optimizer", "measure", "track", "plot"},
    {"checkpoint", "limits", "adapter"},
    {"trainer"},
    {"start"},
    {"stages"},
    {"evaluate", "hub", "explore", "chat", "doctor", "compare", "compare_figure"},
    {"course"},
    {"cli"},
    {"__main__"},
]
LEVEL = {room: number for number, rooms in enumerate(LEVELS) for room in rooms}
CORE = ["norm", "rope", "attention", "router", "experts", "balance", "model"]
HEAVY = ["transformers", "datasets", "plotly", "gradio", "jupyter", "IPython", "ipywidgets", "anywidget", "pandas", "matplotlib",
         "fastapi", "starlette", "uvicorn"]
SOURCES = sorted(p for top in ("minimoe", "tests", "book", "benchmarks") for p in (ROOT / top).rglob("*.py"))


def module_of(path: Path) -> str:
    """`minimoe/data/loader.py` -> `minimoe.data.loader`; a package's `__init__.py` -> the package."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(path): path for path in PACKAGE.rglob("*.py")}


def room(module: str) -> str:
    return module.split(".")[1]


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imports(module: str) -> list[tuple[str, bool, int]]:
    """(module of minimoe, inside a function?, line) for each import in `module`, names of the top package resolved.

    Imports under `if TYPE_CHECKING:` count too: who needs the type knows the room.
    """
    path, found = MODULES[module], []
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]

    def walk(node: ast.AST, inside: bool) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                found.extend((alias.name, inside, child.lineno) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                base = child.module or ""
                if child.level:
                    base = ".".join([*package.split(".")[: len(package.split(".")) - child.level + 1], *filter(None, [base])])
                for alias in child.names:
                    full = f"{base}.{alias.name}"
                    found.append((full if full in MODULES else base, inside, child.lineno))
                    if base == "minimoe" and full not in MODULES:
                        found[-1] = (f"minimoe.{alias.name}", inside, child.lineno)
            walk(child, inside or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef))

    walk(tree(path), False)
    return [entry for entry in found if entry[0].split(".")[0] == "minimoe"]


def test_every_room_has_a_level():
    unknown = {room(module) for module in MODULES if module != "minimoe"} - set(LEVEL)
    assert not unknown, f"name the level of {sorted(unknown)} in tests/test_layers.py"


def test_imports_run_one_way():
    wrong = []
    for module in MODULES:
        if module == "minimoe":
            continue
        for target, _, line in imports(module):
            where = f"{MODULES[module].relative_to(ROOT)}:{line} imports {target}"
            if target == "minimoe" or room(target) not in LEVEL:  # also a name that only minimoe/__init__.py makes
                wrong.append(f"{where}: import from the module that defines it")
            elif LEVEL[room(target)] > LEVEL[room(module)]:
                wrong.append(f"{where}: that room is above")
    assert not wrong, "\n".join(wrong)


def test_no_cycles():
    graph = {m: {t for t, _, _ in imports(m) if t in MODULES and t != m} for m in MODULES if m != "minimoe"}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in done:
            for target in sorted(graph.get(module, ())):
                # a package's __init__ imports its parts, which may well name the package
                if not (module.startswith(target + ".") or target.startswith(module + ".")):
                    visit(target, (*path, module))
            done.add(module)

    for module in sorted(graph):
        visit(module, ())


def test_course_is_imported_by_cli_only_and_late():
    for module in MODULES:
        for target, inside, line in imports(module):
            if target.startswith("minimoe.course") and not module.startswith("minimoe.course"):
                where = f"{MODULES[module].relative_to(ROOT)}:{line}"
                assert room(module) == "cli", f"{where}: only cli imports course"
                assert inside, f"{where}: import course inside the command that needs it"


def test_import_is_light():
    code = f"import sys, minimoe; print([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, encoding="utf-8", cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]", f"import minimoe also imports {done.stdout}"


def test_public_names_in_a_fresh_process():
    """`minimoe.generate` must be the function, although there is a module of that name."""
    names = ["ModelConfig", "MoETransformer", "Routing", "TrainConfig", "Trainer", "load", "save", "generate", "routing_trace"]
    code = f"import minimoe; print([name for name in {names} if not callable(getattr(minimoe, name, None))])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, encoding="utf-8", cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]", f"not callable: {done.stdout}"


def lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def test_line_budgets(record_property):
    core = sum(lines(PACKAGE / f"{name}.py") for name in CORE)
    package = sum(lines(path) for path in MODULES.values() if "course" not in path.relative_to(PACKAGE).parts)
    record_property("core lines", core)
    record_property("package lines", package)
    assert core <= 1200, f"{', '.join(CORE)} have {core} lines together"
    assert package <= 12500, f"the package without course/ has {package} lines"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_file(path):
    """At most 350 lines (but for the lists of wrong answers), and every text file is opened with its encoding named."""
    assert lines(path) <= 350 or path.parent.name == "wrong_answers", f"{lines(path)} lines"
    bare = []
    for call in (node for node in ast.walk(tree(path)) if isinstance(node, ast.Call)):
        name = call.func.id if isinstance(call.func, ast.Name) else getattr(call.func, "attr", "")
        keywords = {keyword.arg for keyword in call.keywords}
        positional = {"open": 3, "read_text": 0, "write_text": 1}.get(name)  # how many arguments stand before encoding
        if positional is None or "encoding" in keywords or None in keywords:
            continue
        if name == "open" and (not isinstance(call.func, ast.Name) or binary(call)):
            continue
        if len(call.args) <= positional:
            bare.append(f"line {call.lineno}: {name}")
    assert not bare, f"no encoding named: {bare}"


def binary(call: ast.Call) -> bool:
    """Whether an `open` call names a binary mode."""
    modes = [*call.args[1:2], *(keyword.value for keyword in call.keywords if keyword.arg == "mode")]
    return any(isinstance(mode, ast.Constant) and "b" in str(mode.value) for mode in modes)


ENGINE = [*CORE, "decode", "generate", "hub", "counts", "device"]


@pytest.mark.parametrize("name", ENGINE)
def test_public_names_of_the_engine_have_a_doctest(name):
    bare = [node.name for node in tree(PACKAGE / f"{name}.py").body
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
            and ">>>" not in (ast.get_docstring(node) or "")]
    assert not bare, f"no doctest: {bare}"
