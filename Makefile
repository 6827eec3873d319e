# Shoal's commands. `make` alone lists them.
#
# PYTHON=python3.12           the Python that .venv is made from
# SHOAL_TORCH_INDEX=URL|DIR   where torch comes from, instead of pip's own choice
# XDG_CACHE_HOME=DIR          where the demo's models and torch's packages are kept (in DIR/shoal)
# SHELF=FILE                  what `make serve` serves
# MINUTES=60 SEED=N           how long `make soak` goes on, and with which dice
# HISTORIES=10000             how many `make histories` plays

PYTHON ?= python3
SHELF ?= examples/shelf.toml
MINUTES ?= 60
HISTORIES ?= 10000
VENV := .venv
BIN := $(VENV)/bin
STAMPS := .shoal/stamps
# The tests of servers that keep KV below the device: about as long as what runs beside all others of servers.
TIERS := $(addprefix tests/e2e/test_,disk_tier.py host_memory.py host_tier.py remote_tier.py)
SOURCES := $(shell find crates -type f) Cargo.toml Cargo.lock pyproject.toml

# The library's own tests link Python too; both halves then agree on which.
export PYO3_PYTHON := $(CURDIR)/$(BIN)/python
export VIRTUAL_ENV := $(CURDIR)/$(VENV)
export PATH := $(CURDIR)/$(BIN):$(PATH)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help demo serve test test-rust test-python test-servers test-tiers test-others test-wheel test-gpu soak histories check bench ui setup environment models clean

help: ## List these commands
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/\1|\2/' | column -t -s '|' 2>/dev/null \
	  || grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST)

demo: preflight-demo setup models ## Set up, then run the main job: three models share less memory than they need
	@$(BIN)/python -m shoal.demo run

serve: preflight-serve setup models ## Set up and serve examples/shelf.toml (or SHELF=FILE) until Ctrl-C
	@$(BIN)/shoal serve $(SHELF)

test: preflight-test setup ## Set up and run every test that needs no GPU
	@$(BIN)/python scripts/test_all.py $(MAKE)

test-rust: setup ## Tests of the Rust crates
	cargo test --locked --workspace --quiet --no-fail-fast

test-python: setup ## Tests of the Python package, the server and the repository
	$(BIN)/python -m pytest -q

test-servers: setup ## Those of them that start servers, vLLM's and those of tiers apart
	$(BIN)/python -m pytest -q tests/e2e $(TIERS:%=--ignore=%)

test-tiers: setup ## Those that start servers which keep KV in host memory, on disk or on a remote
	$(BIN)/python -m pytest -q $(TIERS)

test-others: setup ## All others
	$(BIN)/python -m pytest -q --ignore=tests/e2e

test-wheel: setup ## Build the wheel, install it into a clean environment, use it there
	$(BIN)/python scripts/check_wheel.py

test-gpu: ## Tests on a machine with an NVIDIA GPU (PART=name runs one part)
	@tests/gpu/run.sh $(PART)

soak: setup models ## Random traffic, orders and kills against the demo's server, every answer compared (MINUTES=60)
	@$(BIN)/python -m tests.soak.serve --minutes $(MINUTES) $(if $(SEED),--seed $(SEED)) --result .shoal/soak.json

histories: setup ## Ten thousand seeded histories in virtual time of the policy and of the server's core (HISTORIES=10000)
	SHOAL_HISTORIES=$(HISTORIES) cargo test --release --locked -p shoal-core --test policy_sim promise -- --nocapture
	SHOAL_HISTORIES=$(HISTORIES) cargo test --release --locked -p shoal-server --lib broker::histories -- --nocapture

check: setup ## Formatting, lints, types, licences and duplicates of dependencies
	cargo fmt --all --check
	cargo clippy --locked --workspace --all-targets --quiet -- -D warnings
	cargo clippy --locked -p shoal-device --features cuda --all-targets --quiet -- -D warnings
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python scripts/check_stubs.py
	$(BIN)/python scripts/check_dependencies.py

bench: setup models ## Run the benchmarks into benches/results/ and render them
	@for bench in criterion gateway_latency kv_blocks kv_footprint shelf_first_token shelf_in_order shelf_all_active shelf_sharing prefix_first_token tiers_disk tiers_weights tiers_restore tiers_hit_ratio tiers_concurrency; do \
	  echo "== $$bench"; $(BIN)/python -m benches.$$bench || exit 1; done
	$(BIN)/python scripts/render_results.py

ui: ## Build the page
	@echo "Nothing to build: the page is one hand-written file inside crates/shoal-server, embedded by cargo."

setup: environment $(STAMPS)/extension ## Make .venv and build the extension into it

environment:
	@$(PYTHON) scripts/environment.py

# A release build also for development: it is what the demo, the tests and the wheel share.
$(STAMPS)/extension: $(SOURCES) | environment
	@echo "Building the Rust half (some minutes the first time)"
	@PIP_QUIET=1 $(BIN)/maturin develop --release --locked --quiet
	@mkdir -p $(@D) && touch $@

models: setup ## Download or train the demo's models, once
	@$(BIN)/python -m shoal.demo prepare

preflight-%:
	@$(PYTHON) scripts/preflight.py $*

clean: ## Remove all that was built here (the demo's models stay in the cache)
	rm -rf target $(VENV) .shoal dist .pytest_cache .hypothesis .mypy_cache .ruff_cache python/shoal/_native*.so
	@echo "The demo's models and torch's packages are kept in $${XDG_CACHE_HOME:-$$HOME/.cache}/shoal."
