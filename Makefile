PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin

.PHONY: demo test test-long test-slow docs trust fuzz coverage mutants sbom hashes lint sanitize gpu gpu-splits

FUZZ_RUNS ?= 1000000
MUTANTS ?= runtime/pack.py $(wildcard slimfx/methods/*.py)

demo: $(VENV)/ready  ## compress two real models, print what it cost, generate text without slimfx
	$(RUN)/python examples/demo.py

test: $(VENV)/ready  ## the suite, but for what compiles
	$(RUN)/pytest -q -n 2 -m "not long and not slow and not trust"

test-long: $(VENV)/ready  ## kernels and deployment targets, which compile
	$(RUN)/pytest -q -n 2 -m "long and not slow and not trust"

test-slow: $(VENV)/ready  ## examples that take minutes each
	$(RUN)/pytest -q -n 2 -m slow

docs: $(VENV)/ready  ## the documentation as a site, in site/; first what is written by programs
	$(RUN)/python docs/write.py
	$(RUN)/mkdocs build --strict

trust: $(VENV)/ready  ## hostile files, faults, random programs, numbers, a short fuzz; a table of counts
	$(RUN)/pytest -q -n 2 tests/attacks tests/promises tests/faults tests/fuzz \
	tests/test_random_programs.py tests/test_numerics.py

fuzz: $(VENV)/ready  ## FUZZ_RUNS executions on loader, recipe and manifest, guided by coverage
	$(RUN)/python -m pip install --quiet -e '.[fuzz]'
	$(RUN)/python tests/fuzz/fuzz.py $(FUZZ_RUNS)

coverage: $(VENV)/ready  ## lines and branches of slimfx, passes and runtime that the tests reach
	$(RUN)/python -m pip install --quiet 'coverage>=7.10'
	$(RUN)/coverage run -m pytest -q -n 2 -m "not slow and not trust" && $(RUN)/coverage combine
	$(RUN)/coverage report

mutants: $(VENV)/ready  ## MUTANTS, files: how many small changes of each, of 40, the tests of its name find
	$(RUN)/python tests/mutants.py $(MUTANTS) 40

sbom: $(VENV)/ready  ## sbom.json: every package of the environment (CycloneDX)
	$(RUN)/python -m pip install --quiet cyclonedx-bom
	$(RUN)/cyclonedx-py environment $(RUN)/python --pyproject pyproject.toml --of JSON -o sbom.json

hashes: $(VENV)/ready  ## constraints-hashed.txt: what constraints.txt names, by its bytes
	$(RUN)/python .ci/hashes

sanitize: $(VENV)/ready  ## the C++ kernels under the address and undefined-behaviour sanitizers
	SLIMFX_SANITIZE=1 ASAN_OPTIONS=detect_leaks=0 \
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" \
	$(RUN)/pytest -q tests/runtime/test_linear_h.py

gpu:  ## tests and benches of the GPU kernels, nothing installed; results/gpu_*.json
	.ci/gpu

gpu-splits:  ## how programs of the GPU kernels had best share a weight
	.ci/gpu --links python3 $(CURDIR)/tests/gpu/splits.py llama-2-7b 1,16,32,64 $(CURDIR)/results/splits.json

gpu-package:  ## a package of AOTInductor for the GPU of this machine, and its answers
	.ci/gpu --links python3 -m pytest -q -p no:cacheprovider --rootdir $(CURDIR) \
	    $(CURDIR)/tests/e2e/test_gpu_package.py

lint: $(VENV)/ready  ## ruff; mypy runs on the installed wheel, in .ci/run
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .

$(VENV)/ready: pyproject.toml constraints.txt
	test -x $(RUN)/python || $(PYTHON) -m venv $(VENV)
	$(RUN)/python -m pip install --quiet -c constraints.txt -e '.[test]'
	touch $@
