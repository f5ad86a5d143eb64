# Ten papers, one environment. Plain `make` prints what there is.
PAPERS  := pin dfgc2022 dfl mdrnets anyface faceswapper most_net meta_reid irisusformer biphasic_age
LANDED  := $(strip $(foreach paper,$(PAPERS),$(if $(wildcard $(paper)/train.py),$(paper))))
VENV    ?= .venv
PYTHON  ?= python3
WORKERS ?= 2
# Not abspath, which takes a path with a space for two.
WHERE   := $(if $(filter /%,$(VENV)),$(VENV),$(CURDIR)/$(VENV))
BIN     := $(WHERE)/bin
PINNED  := requirements.txt requirements-dev.txt requirements-alone.txt pyproject.toml
# The clone's own code comes first, so that several clones can share one VENV.
export PYTHONPATH := $(CURDIR)

# Flower pins other versions of a few packages, so it has an environment of its own that borrows the rest.
FLOWER  := $(WHERE)-flower

.PHONY: help setup setup-flower flower-environment demo test test-flower test-all bench report lint clean
.DEFAULT_GOAL := help

help:
	@echo 'make demo [PAPER=name]   train, evaluate and report the demo of one paper, or of all'
	@echo 'make test                the tests (make test-all: the slow ones too)'
	@echo 'make bench [PAPER=name]  size, cost and speed at the paper'"'"'s resolution; of all: BENCHMARKS.md'
	@echo 'make report              report/index.html from the runs that are there'
	@echo 'make lint                ruff'
	@echo 'make setup               the environment alone (all targets make it by themselves)'
	@echo 'make clean               delete runs, report and caches; the environment stays'
	@echo
	@echo 'papers here: $(LANDED)'
	@echo 'VENV=path of the environment (default .venv), PYTHON=interpreter to make it with (3.11 or later)'

setup:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo 'error: Python 3.11 or later is needed; name it with PYTHON=...' >&2; exit 2; }
	@pins=$$(cat $(PINNED) | sha256sum | cut -d' ' -f1); \
	if [ "$$(cat "$(WHERE)/.pins" 2>/dev/null)" != "$$pins" ]; then \
	  echo 'setting up $(VENV) (some GB, a few minutes; later calls reuse it)' && \
	  $(PYTHON) -m venv "$(WHERE)" && \
	  PYTHONPATH= "$(BIN)/python" -m pip install -q --disable-pip-version-check -r requirements-dev.txt && \
	  PYTHONPATH= "$(BIN)/python" -m pip install -qq --disable-pip-version-check --no-deps -r requirements-alone.txt -e . && \
	  echo "$$pins" > "$(WHERE)/.pins"; \
	fi

# pip keeps one core busy: the two environments are made side by side.
setup-flower:
	@$(MAKE) --no-print-directory -j 2 setup flower-environment

flower-environment:
	@pins=$$(cat $(PINNED) dfl/requirements-flower.txt | sha256sum | cut -d' ' -f1); \
	if [ "$$(cat "$(FLOWER)/.pins" 2>/dev/null)" != "$$pins" ]; then \
	  echo 'setting up $(FLOWER)' && \
	  $(PYTHON) -m venv "$(FLOWER)" && \
	  PYTHONPATH= "$(FLOWER)/bin/python" -m pip install -q --disable-pip-version-check -r dfl/requirements-flower.txt && \
	  own=$$("$(FLOWER)/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))') && \
	  echo "import site; site.addsitedir('$(WHERE)$${own#"$(FLOWER)"}')" > "$$own/borrowed.pth" && \
	  echo "$$pins" > "$(FLOWER)/.pins"; \
	fi

demo: setup
	@"$(BIN)/python" -m shared.demo $(or $(PAPER),$(LANDED))

# One thread per test process: small networks gain nothing from more, and two processes then fit two cores.
test: test-flower
	OMP_NUM_THREADS=1 "$(BIN)/python" -m pytest -q -n $(WORKERS) --dist loadfile -m 'not slow and not flower'

test-all: test-flower
	OMP_NUM_THREADS=1 "$(BIN)/python" -m pytest -q -n $(WORKERS) --dist loadfile -m 'not flower'

test-flower: setup-flower
	OMP_NUM_THREADS=1 "$(FLOWER)/bin/python" -m pytest -q -m flower tests/test_dfl_flower.py

bench: setup
	@"$(BIN)/python" -m shared.benchmarks $(or $(PAPER),$(LANDED))

report: setup
	@"$(BIN)/python" -m shared.report

lint: setup
	"$(BIN)/ruff" check .
	"$(BIN)/ruff" format --check .

clean:
	rm -rf runs report .pytest_cache .ruff_cache *.egg-info
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
