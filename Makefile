# make report   the post-mortem of the shipped run, from nothing        make test   all tests
# make lab      JupyterLab on the notebooks                             make .venv  the environment alone
PYTHON ?= python3
BIN := .venv/bin
REPORT := reports/lenet5-mnist
JOBS ?= auto

.PHONY: report test lab lint figures paper clean

report: .venv
	$(BIN)/hoanalysis report data/lenet5-mnist/study.toml --out $(REPORT)

test: .venv lint
	$(BIN)/pytest -n $(JOBS)

lint: .venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

figures: report
	$(BIN)/python docs/figures.py $(REPORT)/summaries.nc docs/lenet5-mnist.png data/vgg11-cifar10/study.nc docs/vgg11-cifar10.png

# the notebook of the paper's figures with its outputs, from the stored summaries
paper: .venv
	$(BIN)/jupyter nbconvert --to notebook --execute --inplace --ExecutePreprocessor.record_timing=False notebooks/paper_figures.ipynb

lab: .venv
	$(BIN)/jupyter lab --notebook-dir=notebooks

# Made anew when what it installs has changed; built beside and renamed by `touch` last, so that a broken install is not
# mistaken for a whole one.
.venv: .venv/installed
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade -c constraints.txt pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[test,zarr,dask]'
	touch $@

clean:
	rm -rf .venv reports build dist .pytest_cache .ruff_cache .mypy_cache
