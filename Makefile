# `make demo` runs the main job on a real model, `make explore` opens a page to play with its vectors,
# `make test` the tests, `make check` the linters,
# `make interop` the tests against other tools, `make newest` those of bridges with the newest model libraries,
# `make gpu-wheels` what a machine with a card needs, `make gpu` everything that is to be done there,
# `make docs` the documentation site, `make graph` the imports.
# Each builds .venv from the pinned versions by itself, once.
PYTHON ?= python3
WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# The other tools lie in a folder of their own: asked, they would choose older versions of what .venv has.
INTEROP := $(VENV)/interop
# TransformerLens 4 beside the 3.9 of .venv, which still has HookedTransformer: the same torch and transformers serve both.
TL4 := $(VENV)/tl4
NEWEST := $(VENV)/newest
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check
WHEELS := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/caa_lens/wheels

DEVICE ?= cuda

.PHONY: demo explore test newest mutants bench interop gpu-wheels gpu wheel notebooks docs graph check format clean

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("caa_lens needs Python 3.11 or newer, this is " + sys.version.split()[0] + ": try make PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	@echo "building .venv: some minutes, once"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $(READY)

demo: $(READY)
	$(BIN)/caa-lens demo $(ARGS)

# A page of this machine to play with the vectors that `make demo` kept.
explore: $(READY)
	@test -f runs/demo/vectors.safetensors || { echo "no vectors in runs/demo: run make demo first, or caa-lens explore with a file of your own" >&2; exit 2; }
	$(BIN)/caa-lens explore runs/demo/vectors.safetensors $(ARGS)

# All tests with TransformerLens 3.9, then with 4 what runs on a bridge. ARGS are for both; 5 says that none was chosen.
test: $(READY) $(TL4)/.ready
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(ARGS)
	PYTHONPATH=$(abspath $(TL4)) $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m bridge $(ARGS) || [ $$? -eq 5 ]

$(TL4)/.ready: $(READY) requirements-tl4.txt
	rm -rf $(TL4)
	$(PIP_INSTALL) --no-deps --target $(TL4) -r requirements-tl4.txt
	touch $@

# With whatever a user would be given today: a new transformers can change a bridge's numbers without a word.
newest: $(READY)
	rm -rf $(NEWEST)
	$(PIP_INSTALL) --no-deps --target $(NEWEST) transformers transformer-lens
	PYTHONPATH=$(abspath $(NEWEST)) $(BIN)/python .ci/newest.py asks > $(NEWEST)/asks.txt
	$(PIP_INSTALL) --no-deps --upgrade --target $(NEWEST) -r $(NEWEST)/asks.txt
	PYTHONPATH=$(abspath $(NEWEST)) $(BIN)/python .ci/newest.py versions
	CAA_LENS_ALL_FAMILIES=1 PYTHONPATH=$(abspath $(NEWEST)) $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m bridge $(ARGS)

# Small faults planted in the sources, one at a time, which the tests must notice: 12 a module, unless ARGS say otherwise.
mutants: $(READY)
	$(BIN)/python tests/mutation.py $(ARGS)

# What the engine saves against naive ways, in a few minutes, kept in benchmarks/history.jsonl; compared with an earlier
# run by ARGS="--against benchmarks/history.jsonl".
bench: $(READY)
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/bench.py $(ARGS)

# Other steering tools' own code against ours. llama.cpp is compiled once (4 minutes on 2 idle cores), into a wheel in the
# user's cache that is not tuned to this one processor.
interop: $(INTEROP)/.ready
	CAA_LENS_INTEROP=1 PYTHONPATH=$(abspath $(INTEROP)) $(BIN)/python -m pytest tests/interop $(ARGS)

$(INTEROP)/.ready: $(READY) requirements-interop.txt
	rm -rf $(INTEROP)
	mkdir -p $(WHEELS)
	CMAKE_ARGS="-DGGML_NATIVE=OFF -DGGML_OPENMP=OFF -DLLAMA_OPENSSL=OFF -DLLAVA_BUILD=OFF" CMAKE_BUILD_PARALLEL_LEVEL=2 nice $(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps -c requirements-interop.txt --find-links $(WHEELS) -w $(WHEELS) llama-cpp-python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --ignore-requires-python --find-links $(WHEELS) --target $(INTEROP) -r requirements-interop.txt
	touch $@

# Under 60 MB without torch, for the Python of the machine with the card: make gpu-wheels GPU_PYTHON=3.12
gpu-wheels: $(READY)
	$(BIN)/python -m benchmarks.gpu.wheels build/gpu-wheels $(if $(GPU_PYTHON),--python $(GPU_PYTHON)) $(ARGS)

# Tests and benchmarks on a card, and the table for docs/performance.md, in under ten minutes: needs a PYTHON with torch and
# what gpu-wheels gathered, and no network. Cut short, it goes on where it was. Without a card, a rehearsal:
# make gpu DEVICE=cpu ARGS="--shapes tiny --dtype float32 --tests tests/steering/test_placing.py"
gpu:
	$(PYTHON) -m benchmarks.gpu.day --device $(DEVICE) $(ARGS)

# Runs all notebooks in full and writes their outputs into them; needs a Chrome or Chromium for the pictures.
notebooks: $(READY)
	$(BIN)/python notebooks/run.py $(ARGS)

# The wheel in an empty environment, away from the source: what a user of `pip install` gets.
wheel: $(READY)
	rm -rf build
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps -w build/wheel .
	$(PYTHON) -m venv build/env
	build/env/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	PIP_CONSTRAINT=constraints.txt build/env/bin/python -m pip install --quiet --disable-pip-version-check build/wheel/*.whl
	cd build/wheel && CAA_LENS_CACHE=empty ../env/bin/python -c "import caa_lens as cl; cl.load_model('demo')" 2>&1 | grep "pip install 'caa-lens.demo.'"
	PIP_CONSTRAINT=constraints.txt build/env/bin/python -m pip install --quiet --disable-pip-version-check "$$(echo build/wheel/*.whl)[demo]"
	cd build/wheel && ../env/bin/python -m caa_lens extract sentiment v.safetensors --layers 15 --test 100
	cd build/wheel && ../env/bin/caa-lens vectors show v.safetensors
	PIP_CONSTRAINT=constraints.txt build/env/bin/python -m pip install --quiet --disable-pip-version-check "$$(echo build/wheel/*.whl)[judge,finetune]"
	build/env/bin/python -c "import openai, peft"

# The site of docs/, in build/site; a warning is an error. The variable silences an announcement of another site builder.
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# What imports what, from the sources.
graph: $(READY)
	$(BIN)/python docs/import_graph.py $(ARGS)

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo --no-cache
	$(BIN)/python -m pytest tests/project/test_architecture.py

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache
