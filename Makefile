# SPDX-License-Identifier: Apache-2.0
# `make demo` and `make test` do all set-up themselves; `make help` lists the rest.
.DEFAULT_GOAL := help
.PHONY: help setup demo test check protos format bench bench-sealed fuzz clean node softhsm

PY := .venv/bin
DATA ?=
MODEL ?=
KMS ?=
KEEP ?=
# Extra arguments for pytest, such as ARGS="-k sealed -x".
ARGS ?=

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: ## make .venv with everything in it (once)
	@./scripts/setup.sh

demo: setup ## seal data, train on two attested ranks, serve the model (DATA=dir, MODEL=dir, KMS=ehsm, KEEP=1)
	@$(PY)/cloister --state .cloister/demo demo $(if $(DATA),--data $(DATA)) $(if $(MODEL),--model $(MODEL)) $(if $(KMS),--kms $(KMS)) $(if $(KEEP),--keep)

test: setup node softhsm ## run the tests
	@$(PY)/pytest -n 2 --dist loadgroup $(ARGS)

check: setup ## lint, types, import contracts, generated code
	@echo "[check] ruff"; $(PY)/ruff check . && $(PY)/ruff format --check --quiet .
	@echo "[check] mypy"; $(PY)/mypy lib services/attest services/keybroker services/trainer services/serving scripts
	@echo "[check] import contracts"; $(PY)/lint-imports
	@echo "[check] generated code and documents"; $(PY)/python scripts/generate_api.py --check && $(PY)/python scripts/generate_error_docs.py --check

protos: setup ## generate lib/cloister/api from protos/
	@$(PY)/python scripts/generate_api.py

format: setup ## format and sort imports
	@$(PY)/ruff check --fix --quiet . ; $(PY)/ruff format .

bench: setup ## print the figures of README and docs
	@for file in benchmarks/bench_*.py; do echo "== $$file"; $(PY)/python $$file || exit 1; done

bench-sealed: setup ## print the figures of sealed data: files, loaders, memory
	@for name in sealed data; do echo "== benchmarks/bench_$$name.py"; $(PY)/python benchmarks/bench_$$name.py || exit 1; done

fuzz: setup ## fuzz every parser of outside bytes for a minute each
	@for file in tests/fuzz/fuzz_*.py; do echo "== $$file"; $(PY)/python $$file -max_total_time=60 || exit 1; done

# The foreign client and the proto linter are Node programs; without Node their tests are skipped, in CI they fail.
node:
	@if command -v npm >/dev/null; then for dir in tests/contract tests/foreign; do \
	  [ -d $$dir/node_modules ] || { echo "[setup] npm packages of $$dir"; npm install --prefix $$dir --ignore-scripts --no-package-lock --silent --no-fund --no-audit; } || exit 1; done; \
	else echo "[setup] npm is not installed: tests with Node clients will be skipped (sudo apt-get install npm)"; fi

# A software token for the tests of the PKCS#11 back end; without it they are skipped, in CI they fail.
softhsm:
	@if command -v softhsm2-util >/dev/null; then :; \
	elif command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ]; then echo "[setup] SoftHSM2"; apt-get install -y -qq softhsm2 >/dev/null; \
	elif command -v apt-get >/dev/null && sudo -n true 2>/dev/null; then echo "[setup] SoftHSM2"; sudo -n apt-get install -y -qq softhsm2 >/dev/null; \
	else echo "[setup] SoftHSM2 is not installed: tests of the PKCS#11 back end will be skipped (sudo apt-get install softhsm2)"; fi

clean: ## remove what was built and what the demo made (not .venv)
	@rm -rf .cloister .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache build dist
