"""A wheel, installed where neither the checkout nor the extras are, generates text.

Installing PyTorch once more would take minutes and gigabytes. So the new environment gets links to the packages that the
wheel asks for, and to what those ask for, and to nothing else that is installed here: an import that pyproject.toml
does not declare fails.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform == "win32", reason="needs links, which Windows gives to administrators only"),
]


def run(command: list, **options) -> str:
    """The output of a command that must succeed."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, encoding="utf-8", **options)
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel, built from a copy of what it is made of: an old build/ in the checkout must not get into it."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT / "minimoe", source / "minimoe", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    run([*pip, "--wheel-dir", out, source])
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory) -> Path:
    """The interpreter of an environment that holds the wheel and its declared dependencies."""
    home = tmp_path_factory.mktemp("venv")
    venv.create(home, with_pip=False, symlinks=True)
    interpreter = home / "bin" / "python"
    run([sys.executable, "-m", "pip", "--python", interpreter, "install", "--quiet", "--no-deps", "--no-index", wheel])
    (packages,) = home.glob("lib/python*/site-packages")
    for name in declared("minimoe"):
        link_distribution(name, packages)
    return interpreter


def declared(name: str, seen: tuple[str, ...] = ()) -> set[str]:
    """The distributions that `name` requires without extras, and those that they require, and so on.

    PyTorch's CUDA build requires some that are absent from its CPU build and the other way around: what is not
    installed here is left out.
    """
    found = set()
    for line in metadata.requires(name) or []:
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        child = re.sub(r"[-_.]+", "-", requirement.name).lower()
        try:
            metadata.distribution(child)
        except metadata.PackageNotFoundError:
            continue
        if child not in seen:
            found |= {child} | declared(child, (*seen, child))
    return found


def link_distribution(name: str, packages: Path) -> None:
    """Link the top-level files and folders of an installed distribution into the folder `packages`."""
    distribution = metadata.distribution(name)
    for top in {file.parts[0] for file in distribution.files or [] if file.parts[0] not in ("..", "__pycache__")}:
        target = packages / top
        if not target.exists():
            target.symlink_to(Path(distribution.locate_file(top)).resolve())


def test_wheel_holds_the_package(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    kinds = ("*.py", "*.js", "*.css", "assets/**/*")
    wanted = {p.relative_to(ROOT).as_posix() for kind in kinds for p in (ROOT / "minimoe").rglob(kind) if p.is_file()}
    wanted = {name for name in wanted if "__pycache__" not in name}
    assert wanted, "nothing to look for"
    assert not wanted - names, f"not in the wheel: {sorted(wanted - names)}"
    for name in ("LICENSE", "NOTICE"):
        assert any(n.endswith(f".dist-info/licenses/{name}") for n in names), f"{name} is not in the wheel"
    strangers = {n for n in names if not n.startswith(("minimoe/", "minimoe-"))}
    assert not strangers, strangers


def test_installed_wheel_generates(python, tmp_path):
    env = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    place = run([python, "-c", "import minimoe; print(minimoe.__file__)"], cwd=tmp_path, env=env).strip()
    assert Path(place).is_relative_to(python.parents[1]), f"imported from {place}"
    missing = "import importlib.util as u; print(*[n for n in ('plotly', 'datasets', 'pytest') if u.find_spec(n)])"
    assert not run([python, "-c", missing], cwd=tmp_path, env=env).strip(), "the environment is not a bare one"

    prompt = "The for statement"
    command = [python.with_name("minimoe"), "generate", "shipped", "--prompt", prompt, "--max-new-tokens", "20", "--seed", "0"]
    said = run(command, cwd=tmp_path, env=env)
    text = said.split(prompt)[-1].strip()
    assert len(text.split()) >= 2, f"no text came out: {said!r}"
    assert list(tmp_path.iterdir()) == [], "generating left files behind"
