# Every target is one line over a Python entry point; `make help` lists them.

SIM    ?= verilator
BENCH  ?=
PRESET ?=
MODE   ?=
FULL   ?=

PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python
RUN     = $(PY) -m

SIM_ARGS = --simulator $(SIM) $(if $(MODE),--mode $(MODE)) $(if $(PRESET),--preset $(PRESET)) $(if $(FULL),--full)

# Each command starts many short processes, which would all compile the same modules.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help setup sim waves trace verilog bench models paper report synth docs site lint types test campaign check clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo '  SIM=verilator|icarus   the simulator (sim, waves, trace, bench)'
	@echo '  MODE=dense|sparf|fetched|centroid|codes   which tokens are attended (sim, waves, trace)'
	@echo '  FULL=1                 every position of the text, and the drive of the paper; half an hour (sim, waves)'
	@echo '  PRESET=name            the hardware configuration (sim and waves with FULL=1, trace, verilog, synth)'
	@echo '  BENCH=prefix           only the benchmarks whose names begin so; house. takes an hour (bench)'

setup: $(VENV)/.stamp-dev  ## install everything for development into .venv

sim: $(VENV)/.stamp-sim  ## run the drive's RTL against the NumPy reference and report
	@$(RUN) kvattic_sim.reports.drive $(SIM_ARGS)

waves: $(VENV)/.stamp-sim  ## the same, with waveforms under build/
	@$(RUN) kvattic_sim.reports.drive $(SIM_ARGS) --waves

trace: $(VENV)/.stamp-figures  ## a timeline of every channel and die, as a Perfetto trace and a picture under build/
	@$(RUN) kvattic trace --simulator $(SIM) $(if $(MODE),--mode $(MODE)) $(if $(PRESET),--preset $(PRESET))

verilog: $(VENV)/.stamp-sim  ## write the Verilog to build/
	@$(RUN) kvattic_hdl $(if $(PRESET),--preset $(PRESET))

bench: $(VENV)/.stamp-figures  ## run the benchmarks
	@$(RUN) kvattic_sim.reports.bench --simulator $(SIM) $(BENCH)

models: $(VENV)/.stamp-dev  ## examine every architecture of transformers and write docs/models.md
	@$(RUN) kvattic_sim.reports.model_page

paper: $(VENV)/.stamp-sim  ## the paper's evaluation, modelled: each of its figures beside ours
	@$(RUN) kvattic_sim.reports.paper

report: $(VENV)/.stamp-figures  ## one page of all figures, plots and tables: build/report.html
	@$(RUN) kvattic_sim.reports.report

synth: $(VENV)/.stamp-synth  ## area and clock, block by block, and placed and routed for ECP5
	@$(RUN) kvattic_sim.reports.synth $(if $(PRESET),--preset $(PRESET))

docs: $(VENV)/.stamp-sim  ## regenerate docs/commands.md and include/kvattic.h
	@$(RUN) kvattic_sim.reports.reference

site: $(VENV)/.stamp-docs  ## build the documentation as a web site in build/site
	@NO_MKDOCS_2_WARNING=1 $(RUN) mkdocs build --strict --quiet
	@echo "open build/site/index.html"

lint: $(VENV)/.stamp-dev  ## check the style
	@$(RUN) ruff check

types: $(VENV)/.stamp-dev  ## check the types
	@$(RUN) mypy

test: lint types  ## lint, types and all tests
	@$(RUN) pytest -n 2 --dist loadfile --no-loadscope-reorder tests

campaign: $(VENV)/.stamp-dev  ## run the long random campaigns whole; make test runs a slice of each
	@$(RUN) pytest -n 2 --dist loadfile --no-loadscope-reorder --campaign -m campaign tests

check: test  ## what continuous integration runs

clean:  ## remove what was built, also in KVATTIC_CACHE, but not .venv
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	@if [ -n "$$KVATTIC_CACHE" ] && [ -f "$$KVATTIC_CACHE/sim/CACHEDIR.TAG" ]; then rm -rf "$$KVATTIC_CACHE/sim"; fi

# A stamp stands for an installed extra. dev contains sim, figures and docs, so a development set-up serves them as it is.
$(VENV)/.stamp-%: pyproject.toml
	@case '$*' in sim|figures|docs) if [ $(VENV)/.stamp-dev -nt pyproject.toml ]; then exit 0; fi;; esac; \
	echo "installing kvattic[$*] into $(VENV)"; \
	test -x $(PY) || $(PYTHON) -m venv $(VENV) || exit 1; \
	$(RUN) pip install -qq --no-compile --disable-pip-version-check -e '.[$*]' || exit 1; \
	touch $@
