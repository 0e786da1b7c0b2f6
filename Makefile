# Two commands do all the set-up: `make demo` and `make test`. Each makes .venv and installs what it needs, once.
PYTHON ?= python3
VENV := .venv
READY := $(VENV)/.installed
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: demo test lint clean

# make demo SHORT=1 runs the same path in seconds; make demo SEED=3 draws other pictures.
demo: $(READY)
	@$(BIN)/tinyspeed demo $(if $(SHORT),--short) $(if $(SEED),--set run.seed=$(SEED) --set run.name=demo-$(SEED))

test: lint
	@$(BIN)/python -m pytest --numprocesses 2 --dist loadfile  # a file's tests share what it has set up

lint: $(READY)
	@$(BIN)/ruff check --quiet . && $(BIN)/ruff format --quiet --check .

$(READY): pyproject.toml constraints.txt
	@echo "installing into $(VENV) (about a minute, once)"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) --constraint constraints.txt --editable '.[demo,test]'
	@touch $@

clean:
	rm -rf $(VENV) *.egg-info build
