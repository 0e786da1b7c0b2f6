# `make demo`, `make test` and `make tutorials` do all the set-up: each makes .venv and installs what it needs, once.
# `make test-all LOWEST=1` tests in .venv-lowest, with the oldest versions that pyproject.toml allows (gigabytes: that
# torch comes with CUDA).
PYTHON ?= python3
VENV := .venv$(if $(LOWEST),-lowest)
READY := $(VENV)/.installed
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
PYTEST := $(BIN)/python -m pytest --numprocesses 2 --dist loadfile  # the tests of a file share what it has set up

.PHONY: demo test test-slow test-all tutorials options torture lint clean bench-gpu

# make demo SHORT=1 runs the same path in seconds; make demo SEED=3 draws other pictures.
demo: $(READY)
	@$(BIN)/tinyspeed demo $(if $(SHORT),--short) $(if $(SEED),--set run.seed=$(SEED) --set run.name=demo-$(SEED))

# What to run before a change is handed in: at most four minutes on two cores.
test: lint
	@$(PYTEST) --ignore tests/slow

# What starts processes, trains for long or attacks a run, the notebooks in their short form, and the wheel.
test-slow: $(READY)
	@$(PYTEST) tests/slow

test-all: test test-slow

# make tutorials ONLY=3 executes one chapter; SHORT=1 every cell with fewer repeats; KEEP=1 keeps the new outputs.
tutorials: $(READY)
	@$(BIN)/python tutorials/run.py $(ONLY) $(if $(SHORT),--short) $(if $(KEEP),--keep)

# The page of every key of a recipe, from the comments behind the keys.
options: $(READY)
	@$(BIN)/python tutorials/options.py

# The attacks of tests/slow/attacks in their long form, three hours or more; `make test-slow` has the short ones.
# make torture ONLY="killed_runs full_disk" COUNT=50 SEED=1 runs some of them, so many cases each, with other draws.
attacks := killed_runs full_disk not_finite damaged_input foreign_code hosts long_run repeatability surroundings
TORTURE ?= runs/torture

torture: $(READY)
	@failed=0; $(foreach attack,$(or $(ONLY),$(attacks)),echo "== $(attack)"; \
	    PYTHONPATH=tests $(BIN)/python -m slow.attacks.$(attack) $(if $(COUNT),--count $(COUNT)) \
	    $(if $(SEED),--seed $(SEED)) --out $(TORTURE)/$(attack).json || failed=1;) exit $$failed

lint: $(READY)
	@$(BIN)/ruff check --quiet . && $(BIN)/ruff format --quiet --check .
	@$(if $(LOWEST),,$(BIN)/mypy --no-error-summary)  # the oldest torch has other annotations

# Everything that is to be measured on a GPU: half an hour to an hour on a large one, step-7b-full needs more than 100 GB.
# At the end it stands beside what replays on a pretend GPU have predicted.
# Where torch is there already: make bench-gpu PY=python OUT=results ONLY="step-7b loss"
PY ?= $(BIN)/python
OUT ?= runs/bench-gpu
step-7b := step --size 7b --batch 16 --micro 8 --budget 8192
step-7b-full := step --size 7b --tune full --batch 16 --micro 8 --budget 8192 --text mix
step-7b-qlora := step --size 7b --tune qlora --batch 16 --micro 8 --budget 8192 --text mix
step-next-7b := step --size 7b --family next --batch 8 --micro 4 --budget 8192
step-7b-memory := step --size 7b --batch 16 --micro 4 --budget 2816 --text 128 --checkpointing on
step-13b := step --size 13b --batch 16 --micro 8 --budget 8192 --text mix
levers := levers --size 7b --batch 16 --budget 8192 --compiled
loss := loss
scaling := scaling --size 1b
pruning := pruning --width 4096
memory := memory llava-1.5-7b-qlora-8gb llava-1.5-7b-lora-24gb llava-next-7b-qlora-24gb --gpu 24
gpu := step-7b step-7b-full step-7b-qlora step-7b-memory step-next-7b step-13b levers loss scaling pruning memory

bench-gpu: $(if $(findstring $(BIN),$(PY)),$(READY))
	@mkdir -p $(OUT)
	@failed=0; $(foreach what,$(or $(ONLY),$(gpu)),echo "== $(what)"; $(PY) -m tinyspeed bench $($(what)) --out $(OUT)/$(what).json \
	    $(if $(filter memory,$(what)),,--device cuda --png $(OUT)/$(what).png) > $(OUT)/$(what).txt || failed=1; \
	    tail -n 40 $(OUT)/$(what).txt;) $(PY) tutorials/replays.py beside $(OUT); exit $$failed

BOUND := torch|transformers|peft|bitsandbytes

$(READY): pyproject.toml constraints.txt
	@echo "installing into $(VENV) (about a minute, once)"
	@$(PYTHON) -m venv $(VENV)
	@$(if $(LOWEST),grep -vE '^($(BOUND))==' constraints.txt > $(VENV)/constraints.txt; \
	    sed -nE 's/^ *"($(BOUND))>=([0-9.]+).*/\1==\2/p' pyproject.toml >> $(VENV)/constraints.txt)
	@$(PIP) --constraint $(if $(LOWEST),$(VENV)/)constraints.txt --editable '.[demo,test,tutorials]'
	@touch $@

clean:
	rm -rf .venv .venv-lowest *.egg-info build
