# Every target makes what it needs, a virtual environment in .venv included, and is quick when it is
# there. PYTHON names the interpreter that makes it; the pinned TensorFlow Text has wheels for these.
IS_SUPPORTED = -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	"$$p" $(IS_SUPPORTED) && echo "$$p" && break; done)
PIP_INSTALL = .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

# Large arrays in huge pages: a step on CPU spends a fifth of its time on page faults otherwise.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

.PHONY: train test lint

# Pre-trains a tiny T5 1.1 on Python's own documentation, then fine-tunes it on a task made from the
# same. The same command again resumes.
train: .venv/.train
	.venv/bin/python -m t5x_lite train \
		--gin_file=gin_configs/models/t5_1_1/tiny.gin \
		--gin_file=gin_configs/runs/python_docs.gin
	.venv/bin/python -m t5x_lite train \
		--gin_file=gin_configs/models/t5_1_1/tiny.gin \
		--gin_file=gin_configs/runs/python_docs_finetune.gin

# A file of tests stays in one process: its fixtures and compiled functions are made once. Many tests
# wait for processes that they start, so three keep two cores busy. Files in their order: pytest-xdist
# would put those of few tests last, and they are the long ones.
test: .venv/.dev
	.venv/bin/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

lint: .venv/.dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

# The stamps are touched last, so an interrupted installation is taken up again.
.venv/.train: pyproject.toml constraints.txt
	@$(make_venv)
	@echo "Installing t5x_lite into .venv (once: 3.4 GB, about a minute on a fast connection)"
	@$(PIP_INSTALL) -e .
	@touch $@

.venv/.dev: pyproject.toml constraints.txt
	@$(make_venv)
	@echo "Installing t5x_lite and what its tests need into .venv (once: 3.4 GB, about a minute on a fast connection)"
	@$(PIP_INSTALL) -e '.[dev]'
	@touch .venv/.train $@

# Makes the virtual environment, or completes one whose making was interrupted.
define make_venv
if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then \
	if ! "$(PYTHON)" $(IS_SUPPORTED); then \
		echo "make: t5x_lite needs Python 3.11, 3.12 or 3.13; name one that is here: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)" >&2; \
		exit 1; \
	fi; \
	"$(PYTHON)" -m venv .venv; \
fi
endef
