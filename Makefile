# make demo   set up, then train the default recipe; ends with a table and a picture
# make test   the tests that CI runs;  make test-slow  the long tests;  make test-gpu  the tests that need a GPU
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: setup demo test test-slow test-gpu lint aot bench docs rehearse

setup: $(STAMP)

# torch is pinned: an open requirement would download several gigabytes of another build. torchvision exists only as a CUDA
# build and breaks transformers with a CPU-only torch, so the copy that one test needs is kept off the path. mypy does not
# follow editable installs, so a link gives kernels/ its installed name.
$(STAMP): setup.py constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 10) <= v < (3, 13) else \
	    f"error: Python {v[0]}.{v[1]} found; vtfast needs 3.10 to 3.12 (make PYTHON=python3.11 ...)")'
	$(PYTHON) -m venv .venv
	@echo "installing into .venv; this takes minutes, and pip prints nothing meanwhile"
	DS_BUILD_OPS=0 $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps --target .venv/torchvision torchvision
	mkdir -p .venv/types && ln -sfn ../../kernels .venv/types/vtfast_kernels
	@echo "installed; '. .venv/bin/activate' puts python and vtfast of .venv on the path"
	@touch $@

demo: setup
	$(BIN)/python train.py $(ARGS)

test: setup # two processes of one thread each: half the time, and no test waits for the threads of another
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow and not gpu"

test-slow: setup
	$(BIN)/python -m pytest -m "slow and not gpu"

test-gpu: setup
	$(BIN)/python -m pytest -m gpu

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

aot: setup # every Triton kernel compiles for sm_80, sm_90 and sm_100, without spills, with wgmma on Hopper
	$(BIN)/python -m bench aot

docs: setup # builds docs/site; `python -m http.server -d docs/site` serves it
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build -q -f docs/mkdocs.yml

bench: setup
	$(BIN)/python -m bench kernels

rehearse: setup # every step of `bench gpu`, tiny, on the CPU
	$(BIN)/python -m bench gpu --rehearse --minutes 15 --out "$$(mktemp -d)"
