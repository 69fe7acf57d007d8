# `make bench` and `make test` are all that a newcomer needs; both create .venv first, the first with
# what the benchmark needs alone.

PYTHON ?= python3
BIN := .venv/bin
BENCH := .venv/.bench
READY := .venv/.ready
JOBS ?= 2
# One thread a test process: the processes already fill the cores.
TESTS := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal
PYTEST := $(TESTS) -m 'not network and not browser and not isolated and not wheels'
ISOLATED := tests/integrations/test_ultralytics.py tests/export/test_openvino.py tests/docs
INTERPRETED := tests/attention/triton/test_triton.py tests/attention/test_poisoned_memory.py

.PHONY: bench test quick networks coverage wheels versions deep camvid docs browser tables lint \
    format clean

# An editable installation carries no compiled kernel, and so needs no compiler for it.
PIP := FULLATTN_WHEEL=any $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt

$(BENCH): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) -e '.[bench]'
	touch $@

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) -e '.[bench,test,lint]'
	touch $(BENCH) $@

bench: $(BENCH)  ## compare the layers and their backends: a table, out/bench/bench.json, bench.png
	$(BIN)/fullattn bench --output out/bench

# Without a GPU the Triton kernels run in Triton's interpreter, which must be chosen from the start.
test: $(READY)  ## every test but those of `make networks`, `wheels` and `browser`
	$(PYTEST)
	$(TESTS) -m 'isolated and not network' $(ISOLATED)
	TRITON_INTERPRET=1 $(PYTEST) $(INTERPRETED)

quick: $(READY)  ## every test but those that compile or time something
	$(TESTS) -m 'not slow and not network and not browser and not isolated and not wheels'

networks: $(READY)  ## other people's networks compiled and exported too: the table in docs
	$(TESTS) tests/integrations/test_networks.py tests/export/test_exported_networks.py \
	    tests/export/test_aot_inductor.py tests/export/test_openvino.py \
	    tests/export/test_compile.py::test_every_backend_compiles_with_dynamic_sizes \
	    'tests/docs/test_documentation.py::test_python_runs[docs/guides/export.md]' \
	    --networks-table docs/networks.md

coverage: $(READY)  ## the tests of `make test` once more, with what of src they run: out/coverage
	$(PYTEST) --cov --cov-report=
	$(TESTS) -m 'isolated and not network' $(ISOLATED) --cov --cov-append --cov-report=
	$(BIN)/coverage html --quiet -d out/coverage
	$(BIN)/coverage report --skip-covered

wheels: $(READY)  ## the source distribution and the wheels, into dist, and what they do where nothing else is
	$(PIP) -e '.[wheels]'
	$(TESTS) -m wheels tests/wheels
	rm -rf dist
	$(BIN)/python -m build --no-isolation --sdist
	for machine in any aarch64 x86_64; do \
	    FULLATTN_WHEEL=$$machine $(BIN)/python -m build --no-isolation --wheel || exit 1; done

versions:  ## the core suite on old and new PyTorch and Python: docs/versions.md (several GB)
	$(PYTHON) benchmarks/versions.py

deep: $(READY)  ## the same tests as `make test`, with many more hypothesis examples
	HYPOTHESIS_PROFILE=deep $(PYTEST) --timeout 3600
	HYPOTHESIS_PROFILE=deep TRITON_INTERPRET=1 $(PYTEST) --timeout 3600 $(INTERPRETED)

camvid: $(READY)  ## train a small FLANet on CamVid: make camvid DATA=folder [WEIGHTS=mobilenetv2.npz]
	$(if $(WEIGHTS),$(BIN)/python benchmarks/mobilenetv2.py $(WEIGHTS) out/mobilenetv2.pt --camvid $(DATA))
	$(BIN)/fullattn train camvid_small --data $(DATA) --output out/camvid-small \
	    $(if $(WEIGHTS),--set model.backbone_weights=out/mobilenetv2.pt)
	$(BIN)/fullattn evaluate out/camvid-small/last.ckpt --data camvid $(DATA)

docs: $(READY)  ## the site, into out/site; a broken link or reference fails
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "out/site/index.html (to serve it: $(BIN)/mkdocs serve)"

browser: $(READY)  ## the site in Chromium, at the width of a desk and of a phone, light and dark
	$(TESTS) -m browser tests/docs/test_site.py

tables: $(READY)  ## the tables of README and documentation
	$(BIN)/python benchmarks/tables.py
	PYTHONPATH=tests $(BIN)/python tests/helpers/tools.py docs/tools.md

lint: $(READY)  ## formatting, lint, spelling and strict types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/codespell -D- -D spelling.txt src tests benchmarks docs *.md
	$(BIN)/mypy
	types=$$(PATH=$(abspath $(BIN)):$$PATH basedpyright --verifytypes fullattn --ignoreexternal) \
	    || { echo "$$types"; exit 1; }  # a public name without a written type

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv out dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis
