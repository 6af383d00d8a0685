# make demo   draws a contact sheet with the mini weights (SEED=1 draws another)
# make gallery   draws a sheet for each way to steer them
# make test   runs ruff, mypy and all tests
# make ablation   writes RESULTS.md: does what is missing of its files, and adds seeds until the difference is known well enough
# make docs   inserts what the results say into README.md and docs/
# make notebooks   runs the notebooks and stores what they show
# make constraints   upgrades every package and writes the versions to constraints.txt
# make weights   trains the mini world from nothing (hours; a stopped run goes on)
PYTHON ?= python3
SEED ?= 0
BIN := .venv/bin

.PHONY: demo gallery test weights ablation world docs notebooks constraints clean

demo: .venv/ready
	$(BIN)/python -m sampling.sheets demo --seed $(SEED)

gallery: .venv/ready
	$(BIN)/python -m sampling.sheets gallery --seed $(SEED)

test: .venv/tests
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q

weights: .venv/tests
	$(BIN)/python -m train all

ablation: .venv/tests
	$(BIN)/python -m eval ablation

world: .venv/tests
	$(BIN)/python -m eval world

docs: .venv/tests
	$(BIN)/python -m eval docs

notebooks: .venv/tests
	$(BIN)/jupyter execute --inplace notebooks/*.ipynb

.venv/ready: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -c constraints.txt -e .
	touch $@

.venv/tests: .venv/ready
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[world,eval,test]'
	touch $@

constraints:
	rm -rf .venv
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -e '.[world,eval,test]'
	(echo '# The versions that the tests ran on. `make constraints` refreshes them. (CUDA libraries follow torch.)'; \
	  $(BIN)/python -m pip freeze --exclude-editable | grep '==' | grep -viE '^(nvidia|cuda|triton)') > constraints.txt

clean:
	rm -rf .venv out
