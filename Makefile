# make demo          draw a contact sheet with the mini weights (SEED=1 draws another)
# make gallery       draw a sheet for each feature
# make test          run ruff, mypy and all tests, one process for each of up to four cores
# make weights       train the mini world from scratch (hours; with DEVICE=cuda minutes); run it again to resume
# make world         score the mini weights
# make ablation      run the missing parts of the ablation and write RESULTS.md (with DEVICE=cuda on a GPU)
# make docs          insert the tables of results into README.md and docs/
# make notebooks     run the notebooks and store their output
# make constraints   upgrade all packages and write their versions to constraints.txt
# make clean         remove .venv and out
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
	$(BIN)/python -m pytest -q -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

weights: .venv/tests
	$(BIN)/python -m train all $(if $(DEVICE),--device $(DEVICE) --scale 4)

ablation: .venv/tests
	$(BIN)/python -m eval ablation $(if $(DEVICE),--device $(DEVICE))

world: .venv/tests
	$(BIN)/python -m eval world

docs: .venv/tests
	$(BIN)/python -m eval docs

notebooks: .venv/tests
	PYTHONWARNINGS='ignore:IProgress not found' $(BIN)/jupyter execute --inplace notebooks/*.ipynb

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
	(echo '# The versions that the tests ran on; `make constraints` updates them. CUDA libraries follow torch.'; \
	  $(BIN)/python -m pip freeze --exclude-editable | grep '==' | grep -viE '^(nvidia|cuda|triton)') > constraints.txt

clean:
	rm -rf .venv out
