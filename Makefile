# Needle's pipeline, a target for each stage. Variables:
#   ARGS="loss=forward_kl seed=1"   settings for the stage (Hydra overrides)
#   EXP=001_losses JOBS=2           the experiment of sweep, reproduce and dashboard; cells that run side by side
#   FAST=1                          reproduce the cells of the experiment's sweep.fast alone
#   LOSS=reverse_kl RUN=FOLDER      what `make doctor` looks at
#   PYTHON=python3.12               interpreter of a new .venv, 3.11 or newer
#   TORCH_INDEX=URL                 index that holds another torch build, for a new .venv
#   PYTEST_ARGS="-x tests/loss"     what `make test` passes to pytest

PYTHON ?= python3
ARGS ?=
EXP ?=
JOBS ?= 2
FAST ?=
LOSS ?=
RUN ?=
TORCH_INDEX ?=
# Two workers with one thread each: more threads contend for the same cores and are slower.
PYTEST_ARGS ?= -n 2 --dist worksteal
# A folder of local wheels, used where it exists; `WHEELS=` switches it off.
WHEELS ?= $(wildcard /opt/wheels)

BIN := .venv/bin
STAMP := .venv/.setup-done
UNFINISHED := .venv/.setup-unfinished
UV_VERSION = $(shell sed -n 's/^uv==//p' requirements.lock)
UV_FLAGS = $(if $(WHEELS),--find-links $(WHEELS)) \
	$(if $(TORCH_INDEX),--index $(TORCH_INDEX) --index-strategy unsafe-best-match)
# The demo keeps to runs of its own, so that its report compares nothing else.
DEMO := paths.runs=runs/demo
SIDE_BY_SIDE = hydra/launcher=joblib hydra.launcher.n_jobs=$(JOBS)
IS_NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))

# Compiled modules are kept, whatever the shell says: without them every process compiles torch's imports again.
export PYTHONDONTWRITEBYTECODE :=

.DEFAULT_GOAL := help
.PHONY: help setup generate prepare teacher signals train score calibrate report sweep reproduce dashboard notebooks tune demo test lint types doctor bench bench-losses bench-teacher prove prove-slurm prove-sweep prove-launchers lock clean

help: ## List the targets
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "make %-15s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

setup: $(STAMP) ## Create .venv and install requirements.lock (nothing to do when up to date)

# The stamp comes last, and an environment whose installation was cut short is built again from nothing: a package
# that is half on disk looks installed to the installer.
$(STAMP): requirements.lock pyproject.toml
	@if test -e $(UNFINISHED) || ! $(BIN)/python -c '$(IS_NEW_ENOUGH)' 2>/dev/null \
		|| ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
		$(PYTHON) -c '$(IS_NEW_ENOUGH)' 2>/dev/null || { \
			echo "setup: PYTHON=$(PYTHON) is not Python 3.11 or newer; name one: make setup PYTHON=python3.11" >&2; \
			exit 1; }; \
		echo "setup: creating .venv" && $(PYTHON) -m venv --clear .venv; \
	fi
	@touch $(UNFINISHED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)
	$(BIN)/uv pip install --python $(BIN)/python $(UV_FLAGS) --requirement requirements.lock
	$(BIN)/uv pip install --python $(BIN)/python --no-deps --no-build-isolation --editable .
	@rm -f $(UNFINISHED)
	@touch $@

generate: setup ## Collect, label or author a teacher's examples; check and split them
	$(BIN)/python -m needle.generate $(ARGS)

prepare: setup ## Turn the examples into the tokenizer and packed training data
	$(BIN)/python -m needle.prepare $(ARGS)

teacher: setup ## Train the white-box teacher, whose distributions can be read
	$(BIN)/python -m needle.train experiment=teacher $(ARGS)

signals: setup ## Store the teacher's distributions over the training data
	$(BIN)/python -m needle.signals $(ARGS)

train: setup ## Train a student
	$(BIN)/python -m needle.train $(ARGS)

score: setup ## Score a trained student: make score ARGS=run=runs/train/NAME
	$(BIN)/python -m needle.score $(ARGS)

calibrate: setup ## Fit a confidence head: make calibrate ARGS=checkpoint=runs/train/NAME
	$(BIN)/python -m needle.calibrate $(ARGS)

report: setup ## Compare scored runs in tables and figures
	$(BIN)/python -m needle.report $(ARGS)

sweep: setup ## Run an experiment's cells side by side: make sweep EXP=001_losses JOBS=2
	$(BIN)/python -m needle.sweep $(if $(EXP),exp=$(EXP)) $(SIDE_BY_SIDE) $(ARGS)

reproduce: setup ## Run published cells again and compare: make reproduce EXP=001_losses FAST=1
	$(BIN)/python -m needle.reproduce $(if $(EXP),exp=$(EXP)) $(if $(FAST),fast=true) \
		$(SIDE_BY_SIDE) $(ARGS)

dashboard: setup ## Show an experiment as a local page: make dashboard EXP=001_losses
	$(BIN)/python -m needle.dashboard show=true $(if $(EXP),exp=$(EXP)) $(ARGS)

notebooks: setup ## Run the notebooks and keep their outputs (several minutes)
	$(BIN)/python -m needle.notebooks $(ARGS)

tune: setup ## Search settings: make tune ARGS="study=NAME exp=001_losses arm=forward_kl"
	$(BIN)/python -m needle.tune $(ARGS)

demo: setup ## Run the whole pipeline small: two losses, scored and compared (ten minutes)
	$(BIN)/python -m needle.generate
	$(BIN)/python -m needle.prepare data=demo
	$(BIN)/python -m needle.signals data=demo
	$(BIN)/python -m needle.train --multirun experiment=demo loss=hard_label,forward_kl \
		hydra/launcher=joblib hydra.launcher.n_jobs=2 $(DEMO) $(ARGS)
	$(BIN)/python -m needle.score suites=[test] $(DEMO)
	$(BIN)/python -m needle.report suite=test allow_dirty=true $(DEMO)
	$(BIN)/python -m needle.predict checkpoint=$$(ls -td runs/demo/train/*/ | head -n 1) \
		input=data/demo_requests.jsonl output=-

test: setup ## Run the linter and every test
	$(BIN)/ruff check .
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_ARGS)

lint: setup ## Check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup ## Check types
	$(BIN)/pyright

doctor: setup ## Check a loss or a run: make doctor LOSS=reverse_kl, or RUN=runs/train/NAME
	$(BIN)/python -m needle.doctor $(if $(LOSS),$(if $(findstring .,$(LOSS)),target,loss)=$(LOSS)) \
		$(if $(RUN),run=$(RUN)) $(ARGS)

bench: setup ## Measure training and decoding speed on this machine
	$(BIN)/python -m needle.bench $(ARGS)

bench-losses: setup ## Measure what each loss costs a step, next to hard labels (half an hour)
	$(BIN)/python -m needle.bench_losses $(ARGS)

bench-teacher: setup ## Measure buying and looking up answers against a local server (three minutes)
	$(BIN)/python tests/servers/bench_teacher.py $(ARGS)

prove: setup ## Kill generating processes at 50 random moments and compare (ten minutes)
	NEEDLE_KILLS=50 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -rP -n 2 -k killed tests/test_generate.py

prove-slurm: setup ## Start a Slurm of one node here (root, Debian), train through it, stop it
	tests/servers/slurm_node.sh start
	@status=0; OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/launchers/test_slurm.py || status=$$?; \
		tests/servers/slurm_node.sh stop; exit $$status

prove-sweep: setup ## Stop and kill a sweep of twelve cells, continue it, compare its table
	NEEDLE_SWEEP_SEEDS=6 NEEDLE_SWEEP_KILLS=2 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -k goes_on tests/test_sweep.py

prove-launchers: setup ## One sweep through joblib, Slurm, Ray and W&B's agent (root, Debian)
	tests/servers/slurm_node.sh start
	@status=0; NEEDLE_SWEEP_SEEDS=6 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -rs tests/launchers/test_same_table.py \
		|| status=$$?; tests/servers/slurm_node.sh stop; exit $$status

# The lock names no build, host or accelerator package: each machine takes the torch build that suits it.
lock: setup ## Resolve requirements.lock again, keeping its versions (newest: ARGS=--upgrade)
	@cp requirements.lock .lock.part
	$(BIN)/uv pip compile --quiet --no-annotate --no-header --extra dev $(ARGS) $(UV_FLAGS) \
		--no-emit-find-links --no-emit-index-url -o .lock.part pyproject.toml
	@{ sed -n '/^#/p' requirements.lock; \
		sed -E '/^(nvidia|cuda|triton)/d; /^(#|$$|--)/d; s/\+[a-z0-9.]+$$//' .lock.part; } > .lock.new
	@rm .lock.part && mv .lock.new requirements.lock

clean: ## Remove caches; the environment, artifacts/ and runs/ stay
	rm -rf .pytest_cache .ruff_cache .hypothesis build *.egg-info .lock.part .lock.new
	find needle tests -name __pycache__ -type d -prune -exec rm -rf {} +
