# make help lists the targets. make setup builds .venv from constraints.txt; a second run does nothing.
PY ?= python3
# where torch alone comes from, if not from the default package index (PyTorch's install page names its CPU index)
TORCH_INDEX ?=
# more options for JupyterLab, such as LAB="--no-browser --port 8890"
LAB ?=
VENV := .venv
BIN := $(VENV)/bin
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)

.PHONY: help setup lab test lint book notebooks exercises clean
.DEFAULT_GOAL := help

help:                    ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' Makefile

setup: $(VENV)/.stamp    ## create .venv and install everything that constraints.txt pins
$(VENV)/.stamp: pyproject.toml constraints.txt
	@$(PY) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit("minimoe needs Python 3.11 or newer, this is %d.%d: name another with  make setup PY=python3.12" % v[:2])'
	$(PY) -m venv $(VENV)
	if command -v uv >/dev/null; then pip="uv pip install -q --python $(BIN)/python"; else pip="$(BIN)/python -m pip install -q --no-compile"; fi; \
	$$pip -c constraints.txt torch $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) && \
	$$pip -c constraints.txt -e '.[dev]'
	touch $@

lab: setup               ## open chapter 0 in JupyterLab
	@$(BIN)/python -m nbformat.sign notebooks/*.ipynb exercises/*.ipynb solutions/*.ipynb >/dev/null
	$(BIN)/python -m jupyterlab notebooks/00_start.ipynb $(if $(filter 0,$(shell id -u)),--allow-root) $(LAB)

test: setup              ## run everything: style, library, notebooks, exercises, the site in a browser
	@failed=; \
	$(BIN)/python -m ruff check -q . || failed=1; \
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile tests minimoe || failed=1; \
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --nbval notebooks solutions || failed=1; \
	exit $${failed:-0}

lint: setup              ## check the code's style and the chapters' contract
	$(BIN)/python -m ruff check .
	$(BIN)/python -m minimoe.course.lint

book: setup              ## build the site into _build/html; it works from disk
	$(BIN)/jupyter-book build -W --keep-going .

notebooks: setup         ## execute all notebooks in place; nothing changes if nothing changed
	$(BIN)/python -m minimoe.course.run_notebooks

exercises: setup         ## write exercises/ anew from solutions/
	$(BIN)/python -m minimoe.course.exercises

clean:                   ## remove what was built; .venv and runs/ stay
	rm -rf _build build dist .pytest_cache .ruff_cache
	find minimoe tests benchmarks book -name __pycache__ -type d -prune -exec rm -rf {} +
