# Each target makes what it needs. `make demo ONCE=1` leaves after the first story. Options of a command go behind ARGS:
# `make train ARGS='--config rope-4x64 --max-steps 200'`; DATA=FOLDER, MODEL=MODEL and PORT=8001 name what it works on.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
IS_NEW := import sys; sys.exit(sys.version_info < (3, 11))
PORT ?= 8000

DATA_SET := data/tinystories

.NOTPARALLEL:  # two commands at once would want one folder and both cores

.PHONY: setup demo data train sweep serve evaluate docs notebooks doctor champion test test-gpu lint format bench bench-prepare bench-train bench-serve bench-learn bench-learn-hour bench-teachers bench-export bench-gpu bench-growth bench-scale sbom clean help

help:            ## what there is to make
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 20

setup: $(READY)  ## virtual environment with everything in it

$(READY): pyproject.toml constraints.txt
	@{ $(BIN)/python -c '$(IS_NEW)' && { $(BIN)/python -m pip --version || $(BIN)/python -m ensurepip; }; } >/dev/null 2>&1 || { \
		$(PYTHON) -c '$(IS_NEW)' 2>/dev/null || { \
			echo "error: $(PYTHON) is not Python 3.11 or newer: name one, as in make PYTHON=python3.12" >&2; exit 2; }; \
		$(PYTHON) -m venv --clear $(VENV); }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[all]'
	@touch $@

demo: $(READY)   ## stories to a served model, offline, in minutes
	@$(BIN)/python infra/demo.py --port $(PORT) $(if $(ONCE),--once)

data: $(READY)   ## 20,000 stories of TinyStories, or ARGS='--source ...', as a data set
	$(BIN)/python pipelines/prepare.py --runner DirectRunner $(if $(DATA),--output $(DATA)) $(ARGS)

# Only where there is none: what is there may have been made with options.
$(DATA_SET)/manifest.json: | $(READY)
	$(BIN)/python pipelines/prepare.py --runner DirectRunner

train: $(READY) $(if $(DATA),,$(DATA_SET)/manifest.json)  ## a model, on the data set or DATA=FOLDER
	$(BIN)/python slm_ray/train.py $(if $(DATA),--data $(DATA)) $(ARGS)

sweep: $(READY) $(if $(DATA),,$(DATA_SET)/manifest.json)  ## learning rate x FF width; the best becomes the champion
	$(BIN)/python tune/sweep.py $(if $(DATA),--data $(DATA)) $(ARGS)

# A sweep with its defaults, where the store on this disk has no model to serve.
champion: $(READY)
	@$(BIN)/python infra/doctor.py --champion || $(MAKE) sweep ARGS=

serve: $(READY) $(if $(MODEL),,champion)  ## the champion over HTTP, or MODEL=MODEL, on PORT
	$(BIN)/python serve/app.py --port $(PORT) $(if $(MODEL),--model $(MODEL)) $(ARGS)

evaluate: $(READY) $(if $(MODEL),,champion) $(if $(DATA),,$(DATA_SET)/manifest.json)  ## the champion, or MODEL, on held-out stories
	$(BIN)/python slm_ray/evaluate.py $(if $(MODEL),--model $(MODEL)) $(if $(DATA),--data $(DATA)) $(ARGS)

docs: $(READY)   ## the documentation as a site, in site/index.html
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict -f infra/docs/mkdocs.yml

notebooks: $(READY)  ## infra/notebooks as .ipynb, beside the scripts
	$(BIN)/python -m jupytext --quiet --to ipynb infra/notebooks/data_report.py infra/notebooks/model.py

doctor:          ## what this machine has, and what follows for the commands
	@python=$(BIN)/python; [ -x $$python ] || python=$(PYTHON); $$python infra/doctor.py $(ARGS)

test: $(READY)   ## all tests, two processes at once
	$(BIN)/python -m pytest -n 2 --dist loadscope --no-loadscope-reorder

# Text files of the checkout, but not those that an earlier version wrote; the programs of the package pre-commit-hooks.
TEXT := git grep -Iz --name-only '' -- ':!tests/runs/checkpoint_v1'
CHECKS := end-of-file-fixer trailing-whitespace-fixer mixed-line-ending check-merge-conflict detect-private-key

lint: $(READY)   ## format, lint, types, YAML, spelling, whitespace
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/yamllint --strict infra .pre-commit-config.yaml .github slm_ray/presets
	$(BIN)/check-toml pyproject.toml
	@for check in $(CHECKS); do $(TEXT) | xargs -0 $(BIN)/$$check || exit 1; done
	@git ls-files -z | xargs -0 $(BIN)/check-added-large-files --enforce-all
	$(TEXT) | xargs -0 $(BIN)/codespell

format: $(READY) ## put the code into shape
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench-prepare: $(READY)  ## preparation against datasets.map and datatrove, on SOURCE=stories.parquet
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench-prepare]'
	$(BIN)/python tests/bench/preparation/prepare.py $(if $(SOURCE),--source $(SOURCE)) $(ARGS)
	$(BIN)/python tests/bench/preparation/prepare_memory.py $(if $(SOURCE),--source $(SOURCE))

test-gpu: $(READY)  ## tests that need a GPU
	$(BIN)/python -m pytest -m gpu $(ARGS)

bench-gpu: $(READY)  ## training speed on one GPU against nanoGPT's recipe, into gpu.json
	$(BIN)/python tests/bench/training/gpu.py $(ARGS)

bench-train: $(READY)    ## training speed against a bare loop, nanoGPT's recipe and transformers, on DATA=FOLDER
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench-train]'
	$(BIN)/python tests/bench/training/train.py $(if $(DATA),--data $(DATA)) $(ARGS)

bench-serve: $(READY)    ## serving speed against OpenVINO GenAI, llama.cpp and transformers, and over HTTP
	$(BIN)/python tests/bench/serving/serve.py $(if $(MODEL),--model $(MODEL)) $(ARGS)

bench-scale: $(READY)    ## on paper: sizes that no machine here can measure, from what was measured
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench-scale]'
	$(BIN)/python tests/bench/scale.py $(ARGS)

bench-growth: $(READY)   ## preparation of 17 MB to 1.9 GB on SOURCE=stories.parquet, sweeps of 1 to 16 trials on DATA=FOLDER
	$(BIN)/python tests/bench/preparation/prepare_growth.py $(if $(SOURCE),--source $(SOURCE))
	$(BIN)/python tests/bench/tuning/sweep_growth.py $(if $(DATA),--data $(DATA))

bench-learn: $(READY)    ## learning per token, one factor at a time, on DATA=FOLDER (hours)
	$(BIN)/python tests/bench/learning/learn.py $(if $(DATA),--data $(DATA)) $(ARGS)

bench-learn-hour: $(READY)  ## what is learned in an hour from DATA=FOLDER, passes repeated (an hour for each arithmetic)
	$(BIN)/python tests/bench/learning/hour.py $(if $(DATA),--data $(DATA)) $(ARGS)

bench-teachers: $(READY)  ## what two teachers give a student of the default size, on DATA=FOLDER (four runs)
	$(BIN)/python tests/bench/learning/teachers.py $(if $(DATA),--data $(DATA)) $(ARGS)

bench-export: $(READY)   ## exports in the programs that they are for, llama.cpp among them, of MODEL=FOLDER
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench-export]'
	$(BIN)/python tests/bench/export.py $(if $(MODEL),--model $(MODEL))

bench: bench-prepare bench-train bench-serve bench-scale  ## measure against named peers (see tests/bench)

sbom: $(READY)   ## lists of packages of the images (CycloneDX), in sbom/
	@for target in prepare train serve; do \
		$(BIN)/python infra/container_packages.py $$target --output sbom/$$target.json || exit 1; done

clean:           ## remove what was made here: environment, caches, site; not data, runs and models
	rm -rf $(VENV) site .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +
