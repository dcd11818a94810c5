# Every target works on a machine without a GPU; bench is a miniature there.
# Safe path: ./kernels must never shadow the PyPI package of that name.
export PYTHONSAFEPATH = 1
export OMP_NUM_THREADS ?= 1

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
NEXT_TESTS ?= tests/integration tests/engine

.PHONY: demo test statistics soak test-next check types format bench docs try-install clean FORCE

demo: $(VENV)/installed  ## a chat model without speculation, then with trees
	$(BIN)/python examples/demo.py

test: $(VENV)/installed  ## kernels compiled for this machine, GPU or not
	$(BIN)/python -m pytest -n auto --dist worksteal

statistics: $(VENV)/installed  ## sampled output against the target's distribution
	$(BIN)/python -m pytest -n auto -rP -m statistics tests/engine/test_statistics.py

soak: $(VENV)/installed  ## ten minutes of a server with trees under every kind of request
	$(BIN)/python tools/soak.py

test-next: $(VENV)/installed  ## the engine tests on vLLM 0.33
	$(BIN)/python tools/vllm_next.py build/vllm-next
	$(BIN)/pip install -q orjson  # vLLM 0.33 needs it, 0.32 does not
	PYTHONPATH=build/vllm-next $(BIN)/python -m pytest -n auto --dist worksteal $(NEXT_TESTS)

check: $(VENV)/installed  ## format and lint
	$(BIN)/ruff format --check . && $(BIN)/ruff check .

format: $(VENV)/installed
	$(BIN)/ruff format . && $(BIN)/ruff check --fix .

types: $(VENV)/installed  ## mypy cannot see through the package mapping, so check an installed copy
	rm -rf build/types build/lib build/bdist.*
	$(BIN)/pip install -q --no-deps --target build/types .
	cd build/types && ../../$(BIN)/mypy --config-file ../../pyproject.toml -p vllm_treespec

bench: $(VENV)/installed  ## tables for benchmarks/results, within 9 minutes on a GPU
	$(BIN)/python benchmarks/all.py

docs: $(VENV)/installed build/docs  ## the pages as a site in build/site
	$(BIN)/mkdocs build --strict

# In the repository's own layout, so that links between pages work in both places.
build/docs: FORCE
	rm -rf $@ && mkdir -p $@/benchmarks $@/models
	cp -r README.md CONTRIBUTING.md CHANGELOG.md LICENSE docs $@
	cp -r benchmarks/results $@/benchmarks
	cp models/README.md $@/models
	{ echo '# JSON schema of the options'; echo '```json'; \
	  $(BIN)/python -c 'import json; from vllm_treespec.config import TreeSpecConfig; print(json.dumps(TreeSpecConfig.model_json_schema(), indent=2))'; \
	  echo '```'; } > $@/docs/schema.md

try-install:  ## every form of docs/install.md in fresh environments, and a server from a wheel
	bash tools/try_install.sh

clean:
	rm -rf $(VENV) build *.egg-info

$(VENV)/installed: pyproject.toml tools/install.sh tools/*/pyproject.toml
	PYTHON=$(PYTHON) bash tools/install.sh $(VENV)
	touch $@
