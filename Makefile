# make demo          draw a contact sheet with the mini weights (SEED=1 draws another)
# make gallery       draw a sheet for each feature
# make figures       draw the paper's figures with the mini weights
# make page          open a page to play with, in the browser
# make test          run ruff, mypy and all tests, one process for each of up to four cores
# make test-page     test the page in Chromium
# make page-pictures write the screenshots of docs/page.md
# make weights       train the mini world from scratch (hours; with DEVICE=cuda minutes); run it again to resume
# make world         score the mini weights
# make ablation      write RESULTS.md again from the stored ablation; run it if there is none (with DEVICE=cuda on a GPU)
# make docs          insert the tables of results into README.md and docs/
# make notebooks     run the notebooks and store their output
# make constraints   upgrade all packages and write their versions to constraints.txt
# make clean         remove .venv and out
PYTHON ?= python3
SEED ?= 0
BIN := .venv/bin

.PHONY: demo gallery figures page test test-page page-pictures weights ablation world docs notebooks constraints clean

demo: .venv/ready
	$(BIN)/python -m sampling.sheets demo --seed $(SEED)

gallery: .venv/ready
	$(BIN)/python -m sampling.sheets gallery --seed $(SEED)

figures: .venv/ready
	$(BIN)/python -m sampling.sheets figures --seed $(SEED)

page: .venv/page
	$(BIN)/python -m eval page

test: .venv/tests
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

test-page: .venv/browser
	@command -v chromium >/dev/null || { echo 'make test-page needs Chromium: install the package chromium' >&2; exit 1; }
	$(BIN)/python -m pytest -q -m browser tests/test_page.py

page-pictures: .venv/browser
	PAGE_PICTURES=docs $(BIN)/python -m pytest -q -m browser tests/test_page.py -k screenshots

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

.venv/page: .venv/ready
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[world,eval,page]'
	touch $@

.venv/browser: .venv/tests .venv/page
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[world,eval,test,page,browser]'
	touch $@

# Gradio holds Pillow back, so the versions are chosen with it.
constraints:
	rm -rf .venv
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -e '.[world,eval,test,page,browser,notebooks,tensorboard]'
	(echo '# The versions that the tests ran on; `make constraints` updates them. CUDA libraries follow torch.'; \
	  $(BIN)/python -m pip freeze --exclude-editable | grep '==' | grep -viE '^(nvidia|cuda|triton)') > constraints.txt

clean:
	rm -rf .venv out
