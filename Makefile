# Everything happens in .venv, made from the pinned versions in constraints.txt.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo serve-demo test test-all bench bench-scale bench-serving bench-runtime torture audit docs fuzz fuzz-atheris fuzz-server figures report-figures packages lowest notebooks interop-adapterhub interop-torchao interop-wandb margins format clean

demo: .venv/demo-installed
	$(BIN)/hyperadapters demo --output runs/demo --overwrite

# Trains the demo if there is none, and serves it until it is interrupted.
serve-demo: .venv/serve-installed
	test -f runs/demo/hyperadapter.json || $(BIN)/hyperadapters demo --output runs/demo --overwrite
	$(BIN)/hyperadapters serve runs/demo

PYTEST := HF_HUB_OFFLINE=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist worksteal

test: .venv/dev-installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(PYTEST) -m "not slow"

# With the tests that take more than five seconds: clusters, servers that are killed, exports of each kind.
test-all: .venv/dev-installed
	$(PYTEST)

bench: .venv/bench-installed
	$(BIN)/python benchmarks/speed.py
	$(BIN)/python benchmarks/speed.py --preset paper --only train_ mixed_batch_ routing_ predictor_ forward_
	$(BIN)/python benchmarks/scale_plot.py

# Task stores of up to a million tasks, about ten minutes and 3 GB in the folder for temporary files. Needs Linux.
bench-scale: .venv/bench-installed
	$(BIN)/python benchmarks/scale.py

bench-serving: .venv/bench-installed .venv/serve-installed
	test -f runs/demo/hyperadapter.json || $(BIN)/hyperadapters demo --output runs/demo --overwrite
	$(BIN)/python benchmarks/server_load.py

# TASKS are tasks of the demo with single texts, or of a folder DATA with TASK/train.jsonl and TASK/test.jsonl.
TASKS ?= support_intent
bench-runtime: .venv/bench-installed
	test -f runs/demo/hyperadapter.json || $(BIN)/hyperadapters demo --output runs/demo --overwrite
	$(BIN)/python benchmarks/runtime.py --tasks $(TASKS) $(if $(DATA),--data $(DATA))

# Kills, full disks, damaged files, made-up inputs and a million rows. Mounts file systems in memory, which needs root on
# Linux.
torture: .venv/bench-installed .venv/dev-installed
	$(BIN)/python benchmarks/torture.py

# Known vulnerabilities of the pinned dependencies (asks PyPI), and a software bill of materials of the environment.
audit: .venv/dev-installed .venv-audit/installed
	mkdir -p dist
	.venv-audit/bin/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible \
		--output-file dist/sbom.cdx.json $(BIN)/python
	.venv-audit/bin/pip-audit --strict --requirement constraints.txt --no-deps --disable-pip

# The documentation site, in site/. Its pages open from disk; the search needs a server, such as `mkdocs serve`.
docs: .venv/docs-installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

# The fuzz tests, which are part of `test`, with more inputs, which differ from run to run. Takes hours.
fuzz: .venv/dev-installed
	HF_HUB_OFFLINE=1 HYPERADAPTERS_FUZZ=100000 $(BIN)/python -m pytest tests/fuzz

# The same with inputs that atheris chooses by the lines that they reach. It has an environment of its own.
fuzz-atheris: .venv-atheris/installed
	HF_HUB_OFFLINE=1 PYTHONPATH=tests .venv-atheris/bin/python tests/fuzz/run_atheris.py

# Not part of `test`: schemathesis needs packages of its own.
fuzz-server: .venv/dev-installed .venv-schemathesis/installed
	HF_HUB_OFFLINE=1 HYPERADAPTERS_FUZZ=5000 $(BIN)/python -m pytest tests/serving/test_predictions.py -k "json"
	test -f runs/demo/hyperadapter.json || $(BIN)/hyperadapters demo --output runs/demo --overwrite
	$(BIN)/python benchmarks/server_schema.py .venv-schemathesis/bin/schemathesis

figures: .venv/bench-installed
	$(BIN)/python benchmarks/efficiency_figures.py

report-figures: .venv/bench-installed
	$(BIN)/hyperadapters report benchmarks/results/demo-report --output runs/report/report.html --figures runs/report
	cp runs/report/map-t-sne.svg docs/images/report_map.svg
	cp runs/report/risk-coverage.svg docs/images/report_risk_coverage.svg

# Not part of `test`: the package adapters needs another transformers, so it has an environment of its own.
interop-adapterhub: .venv/dev-installed .venv-adapterhub/installed
	rm -rf runs/interop-adapterhub
	HF_HUB_OFFLINE=1 PYTHONPATH=tests $(BIN)/python tests/interop/write_adapterhub.py runs/interop-adapterhub
	HF_HUB_OFFLINE=1 .venv-adapterhub/bin/python -W ignore::FutureWarning tests/interop/check_adapterhub.py \
		runs/interop-adapterhub

# Not part of `test` either: where torchao is installed, transformers imports it, and every command shows its warnings.
interop-torchao: .venv-torchao/installed
	HF_HUB_OFFLINE=1 .venv-torchao/bin/python -m pytest tests/backbones/test_backbones.py -k int8

# Not part of `test`: Weights & Biases brings many packages.
interop-wandb: .venv-wandb/installed
	HF_HUB_OFFLINE=1 .venv-wandb/bin/python -m pytest tests/training/test_wandb_run.py

# Builds the distributions, and tries the wheel and each extra in environments of their own. Not part of `test`.
packages: .venv-packages/installed
	.venv-packages/bin/python tests/packaging/check_wheel.py

# Tests of the lowest versions that pyproject.toml accepts. Not part of `test`: torch alone takes gigabytes.
lowest: .venv-lowest/installed
	HF_HUB_OFFLINE=1 .venv-lowest/bin/python -m pytest tests/checkpoints tests/config tests/core tests/data tests/fewshot \
		tests/heads tests/methods tests/model

# Runs the notebooks of examples/ from top to bottom, and writes them with their output to runs/notebooks.
notebooks: .venv/notebooks-installed
	mkdir -p runs/notebooks
	HF_HUB_OFFLINE=1 $(BIN)/jupyter-execute --timeout=300 --output=../../runs/notebooks/{notebook_name} \
		examples/notebooks/*.ipynb

# Every comparison of floats with a margin of less than ten, see tests/margins.py.
margins: .venv/dev-installed
	PYTHONPATH=tests HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -p margins --margins runs/margins.tsv

format: .venv/dev-installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv .venv-adapterhub .venv-atheris .venv-audit .venv-lowest .venv-packages .venv-schemathesis .venv-torchao .venv-wandb runs dist site

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/demo-installed: .venv/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[demo]'
	touch $@

# Further extras, each into the same environment.
.venv/%-installed: .venv/demo-installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[$*]'
	touch $@

.venv-adapterhub/installed: tests/interop/adapterhub.txt
	$(PYTHON) -m venv .venv-adapterhub
	.venv-adapterhub/bin/python -m pip install --quiet --requirement $<
	touch $@

.venv-torchao/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-torchao
	.venv-torchao/bin/python -m pip install --quiet --constraint constraints.txt --editable . pytest pytest-randomly torchao
	touch $@

.venv-wandb/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-wandb
	.venv-wandb/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[demo]' pytest pytest-randomly \
		'wandb>=0.31,<1'
	touch $@

.venv-packages/installed:
	$(PYTHON) -m venv .venv-packages
	.venv-packages/bin/python -m pip install --quiet 'build>=1.2,<2'
	touch $@

.venv-lowest/installed: pyproject.toml tests/packaging/lowest.txt
	$(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/python -m pip install --quiet --constraint tests/packaging/lowest.txt --editable '.[rouge]' \
		hypothesis pytest pytest-randomly
	touch $@

.venv-audit/installed:
	$(PYTHON) -m venv .venv-audit
	.venv-audit/bin/python -m pip install --quiet 'pip-audit>=2.9,<3' 'cyclonedx-bom>=7,<8'
	touch $@

.venv-atheris/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-atheris
	.venv-atheris/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[peft]' hypothesis 'atheris>=3,<4'
	touch $@

.venv-schemathesis/installed:
	$(PYTHON) -m venv .venv-schemathesis
	.venv-schemathesis/bin/python -m pip install --quiet 'schemathesis>=4.32,<5'
	touch $@
