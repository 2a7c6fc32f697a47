# Two commands do all the set-up: `make demo` runs the main job, `make test` the tests. Both fill .venv when needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH := 2.13.0
# Models and texts that are not ours to ship; what needs them is skipped when the folder is not there.
SHARED ?= ../shared
# Processes that share the tests; those that start Ray stay in one (tests/sharing_out.py).
WORKERS ?= 2
# One thread per process: oversubscribed OpenMP threads that spin slow calls by up to 100 times.
export OMP_NUM_THREADS ?= 1
export OMP_WAIT_POLICY ?= PASSIVE
export TOKENIZERS_PARALLELISM ?= false

.PHONY: install install-dev demo demo-convert test chaos check format docs bench proto clean

install: $(VENV)/.installed
install-dev: $(VENV)/.installed-dev

# Without a CUDA device the CPU build of torch comes first, so that nothing pulls in several GB of CUDA packages:
# from a configured index or folder when one has it, else from PyTorch's own index.
$(VENV)/.installed: pyproject.toml
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1 \
	  || $(BIN)/python -c "import torch" 2>/dev/null \
	  || $(BIN)/pip install --quiet "torch==$(TORCH)+cpu" \
	  || $(BIN)/pip install --quiet "torch==$(TORCH)+cpu" --extra-index-url https://download.pytorch.org/whl/cpu
	$(BIN)/pip install --quiet --editable .
	touch $@

# What the tests need beside: Triton alone, whose interpreter and compiler need no GPU, is 1 GB.
$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/pip install --quiet --editable ".[dev]"
	touch $@

demo: install
	$(BIN)/pip install --quiet --editable ".[gguf]" || echo "no network: the demo serves quartet"
	$(BIN)/python examples/demo.py

demo-convert: install
	$(BIN)/python examples/demo.py --convert

test: check
	$(BIN)/python -m pytest -n $(WORKERS)

# Kills hosts 50 times of each kind, and writes how long nobody was served meanwhile; `ray up` on machines of its own;
# and the starts of deployments that `make test` has no time for.
chaos: install-dev
	PREGATE_CHAOS_KILLS=50 PREGATE_CHAOS_RESULTS=benchmarks/results/chaos.json $(BIN)/python -m pytest -s tests/chaos tests/deploy/test_ray_up.py \
	  tests/cluster/test_serve_app.py tests/docs/test_commands_run.py

check: install-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: install-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Into build/site; a broken link is an error.
docs: install-dev
	$(BIN)/mkdocs build --strict

bench: install-dev
	$(BIN)/python -m benchmarks.dispatch
	$(BIN)/python -m benchmarks.kernels --out benchmarks/results/kernels.json
	@if [ -d "$(SHARED)/models/stories3M" ]; then \
	  $(BIN)/python -m benchmarks.stories --shared-folder "$(SHARED)" && \
	  $(BIN)/python -m benchmarks.quantised --shared-folder "$(SHARED)" && \
	  $(BIN)/python -m benchmarks.served_equality --shared-folder "$(SHARED)"; \
	else echo "skipped stories and served_equality: no models/stories3M in SHARED=$(SHARED)"; fi

# Generated with protobuf 6.33's compiler, so that the code runs on 6.33 and on 7; in a folder of its own, because
# those tools and the newest health-checking package want different versions of protobuf.
proto:
	@tools=$$(mktemp -d) && $(PYTHON) -m venv $$tools \
	  && $$tools/bin/pip install --quiet "grpcio-tools>=1.76,<1.77" \
	  && $$tools/bin/python -m grpc_tools.protoc -I. --python_out=. --pyi_out=. --grpc_python_out=. \
	       pregate/client/proto/pregate.proto; \
	status=$$?; rm -rf $$tools; exit $$status

clean:
	rm -rf $(VENV) runs build *.egg-info
