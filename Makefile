# The one place that says how things are done. Every target sets up what it needs: Python 3.11 to 3.13, make and git suffice.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

VENV := .venv
READY := $(VENV)/.ready
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

CONTRACTS := $(wildcard protos/mainspring/v1/*.proto)
BASELINE := protos/baseline/v1.binpb
PROTOC := python -m grpc_tools.protoc -I protos -I protos/third_party
COMPILE := build/lock/bin/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
  --no-emit-find-links --no-annotate --no-header
OVERLAYS := $(wildcard k8s/overlays/*)
# What mypy reads; generated code is left out in pyproject.toml.
TYPED := sdk services gateway examples benchmarks tests test_framework
# A bill for `make run`; empty: the example makes its own.
BILL ?=
# Arguments for `make dev`: modules with tools, options.
ARGS ?=
# What `make bench` measures, and whether others beside it.
ONLY ?= throughput latency cancel growth footprint
PEERS ?= --peers

.PHONY: help setup run dev test test-long check fmt proto docs baseline bench bench-peers lock clean
.PHONY: check-style check-types check-contracts check-generated check-manifests check-tidy

help: ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-11s %s\n", $$1, $$2}'

setup: $(READY) ## Make .venv from the lock file; instant when it is up to date

$(READY): requirements.lock pyproject.toml
	@for python in python3.11 python3.12 python3.13 python3; do \
	  if "$$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null; then break; fi; \
	  python=; \
	done; \
	if [ -z "$$python" ]; then echo "No Python 3.11, 3.12 or 3.13 found: install one and run make again." >&2; exit 1; fi; \
	[ -x $(VENV)/bin/python ] || "$$python" -m venv $(VENV)
	@echo "Setting up $(VENV) (the first time takes a minute or two)"
	@python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	@python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $(READY)

run: $(READY) ## Run the example from an empty folder: events as they arrive, then the answer (BILL=path)
	@python examples/cost_optimizer/run.py $(if $(BILL),"$(BILL)")

dev: $(READY) ## Start the whole platform here (ARGS="my_tools --port 8080")
	@mainspring dev $(ARGS)

test: $(READY) ## Run all tests but the long ones
	@python -m pytest -m "not long"

test-long: $(READY) ## Run the long tests: faults, loads, drills
	@python -m pytest -m long || { code=$$?; [ "$$code" -eq 5 ] && echo "There are no long tests yet."; }

check: $(READY) ## Everything a change must pass besides the tests; works offline
	@$(MAKE) --keep-going -j2 --output-sync=target check-types check-style check-contracts check-generated check-manifests check-tidy
	@echo "check: all good"

check-style:
	@ruff format --check --quiet .
	@ruff check --quiet .

check-types:
	@mypy $(wildcard $(TYPED))

check-contracts:
	@buf lint
	@buf format --diff --exit-code
	@mkdir -p build && buf build --path protos/mainspring --output build/contracts.binpb
	@buf breaking build/contracts.binpb --against $(BASELINE) --config buf.yaml

check-generated:
	@rm -rf build/generated && mkdir -p build/generated
	@$(call generate,build/generated)
	@for folder in mainspring/v1 buf; do \
	  diff -r --exclude=__init__.py --exclude=__pycache__ "build/generated/$$folder" "sdk/$$folder" \
	    || { echo "sdk/$$folder is not what protos/ says: run 'make proto'." >&2; exit 1; }; \
	done

check-manifests:
	@mkdir -p build
	@for overlay in $(OVERLAYS); do \
	  kubectl kustomize "$$overlay" > "build/$$(basename "$$overlay").yaml"; \
	  kubernetes-validate --strict --quiet "build/$$(basename "$$overlay").yaml"; \
	done

check-tidy:
	@python -m pytest tests/tidy --quiet

fmt: $(READY) ## Format Python and contracts, mend what can be mended
	@ruff check --quiet --fix-only .
	@ruff format --quiet .
	@buf format --write

# The generated code of all contracts, under the folder given.
define generate
$(PROTOC) --python_out=$(1) --grpc_python_out=$(1) --mypy_out=quiet:$(1) --mypy_grpc_out=quiet:$(1) \
  $(CONTRACTS:protos/%=%) && \
$(PROTOC) --python_out=$(1) --mypy_out=quiet:$(1) buf/validate/validate.proto
endef

proto: $(READY) ## Generate the Python code of the contracts
	@buf lint
	@$(call generate,sdk)

docs: $(READY) ## Write the tables of settings, errors and specifications into docs/
	@python -m tests.tidy.tables

baseline: $(READY) ## Record contracts and migrations as released: from now on they may only be added to
	@mkdir -p $(dir $(BASELINE))
	@buf build --path protos/mainspring --output $(BASELINE)
	@sha256sum services/*/sql/migrations/*.sql > tests/data/migrations.sha256

# Workloads one after the other, each alone on the machine; what they found is kept, and the page made from it.
bench: $(READY) ## Measure everything and write docs/benchmarks.md, 15 to 25 minutes (ONLY="latency growth", PEERS=)
	@mkdir -p build docs/benchmarks; failed=; \
	for workload in $(ONLY); do \
	  python -m "benchmarks.$$workload" --json $(PEERS) | python -m json.tool > build/bench.json || failed+=" $$workload"; \
	  [ ! -s build/bench.json ] || mv build/bench.json "docs/benchmarks/$$workload.json"; \
	done; \
	python -m benchmarks.page; \
	[ -z "$$failed" ] || { echo "These found faults, or did not end:$$failed" >&2; exit 1; }

bench-peers: $(READY) ## Set up what `benchmarks.throughput --peers` measures beside it, under build/peers
	@python -m benchmarks.peers

# Exact versions and hashes for Python 3.11 to 3.13 on every system, without the address of any index. The first file
# is what a developer and CI install; the second the part of it that the container image needs, hatchling to build it.
lock: ## Bring the lock files in step with pyproject.toml (asks the package index; UPGRADE=1: newest versions)
	@rm -rf build/lock && python3 -m venv build/lock
	@build/lock/bin/python -m pip install --quiet --disable-pip-version-check uv
	@$(COMPILE) $(if $(UPGRADE),--upgrade) --all-extras --output-file requirements.lock pyproject.toml
	@echo hatchling | $(COMPILE) --extra platform --extra models --constraint requirements.lock \
	  --output-file requirements.platform.lock pyproject.toml -

clean: ## Remove what can be made again; keeps .mainspring/, the data of `make dev`
	@rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
