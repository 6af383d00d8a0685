# make demo   draws a contact sheet with the mini weights (SEED=1 draws another)
# make gallery   draws a sheet for each way to steer them
# make test   runs ruff, mypy and all tests
# make ablation   writes RESULTS.md: does what is missing of its files, and adds seeds until the difference is known well enough
# make weights   trains the mini world from nothing (hours; a stopped run goes on)
PYTHON ?= python3
SEED ?= 0
BIN := .venv/bin

.PHONY: demo gallery test weights ablation world clean

demo: .venv/ready
	$(BIN)/python -m sampling.demo --seed $(SEED)

gallery: .venv/ready
	$(BIN)/python -m sampling.gallery --seed $(SEED)

test: .venv/tests
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q

weights: .venv/tests
	$(BIN)/python -m train all
	$(BIN)/python -m train adapter --fine
	$(BIN)/python -m eval judge
	$(BIN)/python -m eval clip

ablation: .venv/tests
	$(BIN)/python -m eval ablation

world: .venv/tests
	$(BIN)/python -m eval world

.venv/ready: setup.cfg pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -e .
	touch $@

.venv/tests: .venv/ready
	$(BIN)/python -m pip install -q -e '.[world,test]'
	touch $@

clean:
	rm -rf .venv runs out
