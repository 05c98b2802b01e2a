PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin

.PHONY: demo test test-long test-slow docs lint sanitize gpu gpu-splits

demo: $(VENV)/ready  ## compress two real models, print what it cost, generate text without slimfx
	$(RUN)/python examples/demo.py

test: $(VENV)/ready  ## the suite, but for what compiles
	$(RUN)/pytest -q -n 2 -m "not long and not slow"

test-long: $(VENV)/ready  ## kernels and deployment targets, which compile
	$(RUN)/pytest -q -n 2 -m "long and not slow"

test-slow: $(VENV)/ready  ## examples that take minutes each
	$(RUN)/pytest -q -n 2 -m slow

docs: $(VENV)/ready  ## the documentation as a site, in site/; first what is written by programs
	$(RUN)/python docs/write.py
	$(RUN)/mkdocs build --strict

sanitize: $(VENV)/ready  ## the C++ kernels under the address and undefined-behaviour sanitizers
	SLIMFX_SANITIZE=1 ASAN_OPTIONS=detect_leaks=0 \
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" \
	$(RUN)/pytest -q tests/runtime/test_linear_h.py

gpu:  ## tests and benches of the GPU kernels, nothing installed; results/gpu_*.json
	.ci/gpu

gpu-splits:  ## how programs of the decode kernels had best share a weight: mma.split_for
	.ci/gpu --links python3 $(CURDIR)/tests/gpu/splits.py llama-2-7b 1,16 $(CURDIR)/results/splits.json

lint: $(VENV)/ready  ## ruff; mypy runs on the installed wheel, in .ci/run
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .

$(VENV)/ready: pyproject.toml constraints.txt
	test -x $(RUN)/python || $(PYTHON) -m venv $(VENV)
	$(RUN)/python -m pip install --quiet -c constraints.txt -e '.[test]'
	touch $@
