# make demo    the indexer on real keys, on whatever this machine has
# make test    pytest parity/
# make lint    ruff and pyright
PYTHON ?= python3
PYTEST_FLAGS ?=

# With an NVIDIA GPU, JAX's CUDA wheels; without one, the CPU wheels that pip takes by default.
comma := ,
CUDA := $(if $(shell nvidia-smi -L 2>/dev/null),cuda13$(comma))
INSTALL = .venv/bin/python -m pip install --quiet --constraint parity/constraints.txt --editable

.PHONY: demo test lint clean

demo: .venv/installed-demo
	.venv/bin/python -m jax_indexer

test: .venv/installed-parity
	.venv/bin/python -m pytest parity/ $(PYTEST_FLAGS)

lint: .venv/installed-parity .venv/installed-lint
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/pyright

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed; name one: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv .venv || { rm -rf .venv; \
	  echo "'$(PYTHON) -m venv' failed; on Debian and Ubuntu: apt-get install python3-venv"; exit 1; }

.venv/installed-%: .venv/bin/python pyproject.toml parity/constraints.txt
	$(INSTALL) '.[$(CUDA)$*]'
	@touch $@

# The tests cover the demo and the benchmarks too.
.venv/installed-parity: .venv/bin/python pyproject.toml parity/constraints.txt
	$(INSTALL) '.[$(CUDA)parity,demo,bench]'
	@touch $@

clean:
	rm -rf .venv
