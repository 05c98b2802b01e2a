PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin

.PHONY: demo test lint

demo: $(VENV)/ready  ## compress two real models, print what it cost, generate text without slimfx
	$(RUN)/python examples/demo.py

test: $(VENV)/ready  ## the whole suite
	$(RUN)/pytest -q -n 2

lint: $(VENV)/ready  ## ruff; mypy runs on the installed wheel, in .ci/run
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .

$(VENV)/ready: pyproject.toml constraints.txt
	test -x $(RUN)/python || $(PYTHON) -m venv $(VENV)
	$(RUN)/python -m pip install --quiet -c constraints.txt -e '.[test]'
	touch $@
