# make sweep   a real sweep on the embedded data set, on this machine
# make test    the tests; make test COVERAGE=1 fails where they leave too much of the code unrun
# make faults  the tests that kill or break what a study uses, or take long: minutes more
# make speed   what a step, an epoch and the explanation cost here; make speed DEVICE=cuda on a GPU
# make gpu     checks and measurements on a GPU, by PYTHON as it is: no environment is made
# make lint    style, types, the one-way imports, scripts and launch files
# make docs    the reference of the Python interface, from its docstrings, in build/docs
# make lock    constraints.txt anew, from the newest versions that pyproject.toml allows
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SWEEP ?=
COVERAGE ?=
DEVICE ?= cpu
SPEED = $(BIN)/python -m studies.benchmarks

export WANDB_MODE ?= offline

.PHONY: env sweep test faults speed gpu lint docs lock

env: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Python 3.11 or newer is needed; name one with make PYTHON=python3.11"; exit 1; }
	@$(PYTHON) -m venv $(VENV) \
	  || { echo "python3 -m venv failed; on Debian: apt-get install python3-venv"; exit 1; }
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

sweep: env
	$(BIN)/python studies/bcpl_sweep.py $(SWEEP)

test: env
	$(BIN)/pytest -m "not faults" --numprocesses 2 --dist loadgroup --durations 12 \
	  $(if $(COVERAGE),--cov --cov-report=term --cov-fail-under=90)

faults: env
	$(BIN)/pytest -m faults tests/cluster --ignore tests/cluster/test_local.py
	$(BIN)/pytest -m faults --ignore tests/cluster/test_faults.py --ignore tests/cluster/test_hosts.py \
	  --ignore tests/cluster/test_slurm.py --numprocesses 2 --dist loadgroup --durations 12

speed: env
	$(SPEED).steps --device $(DEVICE) --threads 2 --out results/speed/$(DEVICE)
	$(SPEED).throughput --device $(DEVICE) --out results/speed/$(DEVICE)
	$(SPEED).growth --device $(DEVICE) --out results/speed/$(DEVICE)

gpu:
	$(PYTHON) -m studies.benchmarks.gpu --out results/gpu

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/shellcheck .ci/run cluster/slurm/*.sh
	$(BIN)/yamllint --strict cluster
	$(BIN)/hadolint cluster/Dockerfile

# Every package and module but the command line's; pdoc finds the modules of a package itself.
DOCUMENTED = batchcam $(addprefix batchcam.,cam config data devices errors explainers export extras \
  figures losses models prototypes provenance similarity training) studies.engine

docs: env
	$(BIN)/python -W error::UserWarning -W error::RuntimeWarning:pdoc.doc -m pdoc --math \
	  --docformat google --output-directory build/docs $(DOCUMENTED)

lock:
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[dev]'
	{ echo '# The exact versions that are tested; ranges are in pyproject.toml. Made by `make lock`.'; \
	  $(BIN)/pip freeze --exclude-editable; } > constraints.txt
	@touch $(VENV)/.installed
