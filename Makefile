# Every target makes the Python environment it needs; see .ci/bootstrap.py for how it is chosen.
PYTHON ?= python3
OUT ?= runs/demo
ARGS ?=
PART ?=
# Each worker begins with files of its own, so that what a file sets up and compiles is there once.
PYTEST_ARGS ?= -n auto --maxprocesses=4 --dist=worksteal --durations=15

METHODS = softmax epanechnikov biweight triweight norm_relu relumax
PY = .venv/bin/python
BOOTSTRAP = $(PYTHON) .ci/bootstrap.py
AOT = tests/test_aot_gpu.py tests/test_aot_tpu.py
# Bytecode is kept, whatever the machine says: without it every process compiles JAX and Flax anew.
export PYTHONDONTWRITEBYTECODE :=
# Arrays in huge pages, where Linux gives them on demand: fewer page faults in every step on CPU.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

.DEFAULT_GOAL := help
.PHONY: help demo reproduce test slow nightly bench core aot oldest schedules lint format figures hardware pins clean

help:
	@echo "kreg: attention as kernel regression. No set-up is needed: each command installs what it needs"
	@echo "into .venv the first time and starts at once afterwards."
	@echo
	@echo "  make demo      train small Memory Mosaics with six kernels on unseen automata; a table and a"
	@echo "                 figure in runs/demo (3 minutes on 2 cores; stop it and it goes on next time)"
	@echo "  make reproduce ARGS=\"icl --preset small\"   an experiment of the paper: what is missing is"
	@echo "                 trained, then a table and a figure; --dry-run says what it would cost"
	@echo "  make figures   the kernels, their attention maps and bandwidths, drawn into runs/figures"
	@echo "  make test      the tests; one file: make test ARGS=tests/test_package.py; make slow: more of them"
	@echo "  make lint      ruff and pyrefly; make format rewrites the files"
	@echo "  make bench     kreg's speed beside jax.nn, PyTorch and entmax (the latter where installed)"
	@echo "  make aot       the kernels compiled for GPUs and TPUs; needs their compilers, none of them"
	@echo "  make hardware  on a machine with a GPU or TPU: tests, timings, the next slice of the long runs"
	@echo "                 PART=contract|kernels|timing|queue: one part; ARGS=\"--results experiments/results\""
	@echo "                 keeps the small files, and goes on from what they hold"
	@echo "  make clean     remove the environments and caches; results in runs/ stay"
	@echo
	@echo "  then           source .venv/bin/activate && python -m experiments.in_context --help"
	@echo "  variables      PYTHON=/path/to/python3       runs the set-up"
	@echo "                 KREG_PYTHON=/path/to/python   the interpreter (>= 3.12) of the environment"
	@echo "                 KREG_UV=0                     install with venv and pip, not with uv"

demo:
	@$(BOOTSTRAP)
	@$(PY) -m experiments.in_context --preset smoke --methods $(METHODS) --out $(OUT) $(ARGS)

reproduce:
	@$(BOOTSTRAP)
	@$(PY) -m experiments reproduce $(ARGS)

figures:
	@$(BOOTSTRAP)
	@$(PY) -m experiments.kernel_figures --out runs/figures $(ARGS)

# Every value of every test's parameters, not all products of them: those with ARGS="--cases all".
test:
	@$(BOOTSTRAP)
	@$(PY) -m pytest -m "not slow" --cases few $(PYTEST_ARGS) $(ARGS)

# All products, and what takes minutes: the hardware command on CPU, the longest derivative checks.
slow:
	@$(BOOTSTRAP)
	@$(PY) -m pytest -m "not nightly" $(PYTEST_ARGS) $(ARGS)

# kreg beside jax.nn, and beside PyTorch and entmax where they are installed.
bench:
	@$(BOOTSTRAP)
	@$(PY) -m experiments.bench $(ARGS)

# Many drawn cases of the contract and all tests in all cases, compiled as users compile, and all of
# the kernels', interpreted and compiled; the log is kept.
nightly:
	@$(BOOTSTRAP) user oldest aot
	@(XLA_FLAGS= KREG_CASES=2000 $(PY) -m pytest tests/test_contract.py -v $(ARGS) && \
		XLA_FLAGS= $(PY) -m pytest --ignore tests/test_mosaic_gpu.py --ignore tests/test_mosaic_gpu_short.py \
			--ignore tests/test_aot_gpu.py --ignore tests/test_aot_tpu.py $(PYTEST_ARGS) $(ARGS) && \
		$(PY) -m pytest tests/test_mosaic_gpu.py tests/test_mosaic_gpu_short.py -v $(PYTEST_ARGS) $(ARGS) && \
		KREG_AOT=1 .venv-aot/bin/python -m pytest $(AOT) -v $(PYTEST_ARGS) $(ARGS) && \
		.venv-oldest/bin/python -m pytest -m "core and not slow" $(PYTEST_ARGS) $(ARGS)) \
		> tests/nightly.log; \
		status=$$?; git rev-parse HEAD >> tests/nightly.log; tail -n 4 tests/nightly.log; exit $$status

# Of the part of the tests that must also pass on the oldest jax, a case of each; nightly: all.
core:
	@$(BOOTSTRAP) oldest
	@.venv-oldest/bin/python -m pytest -m "core and not slow" --cases one $(PYTEST_ARGS) $(ARGS)

# Kernels compiled for GPUs and TPUs that are not there; ARGS="-m aot" for all of them.
aot:
	@$(BOOTSTRAP) aot
	@KREG_AOT=1 .venv-aot/bin/python -m pytest $(AOT) -m "aot and not slow" $(PYTEST_ARGS) $(ARGS)

# `make core` but for what is arithmetic alone, and a few of the kernels compiled by the oldest jax, at once.
oldest:
	@$(BOOTSTRAP) aot-oldest
	@KREG_AOT=1 .venv-aot-oldest/bin/python -m pytest -m "core and not slow" --cases one \
		--ignore tests/test_propositions.py --ignore tests/test_constrained.py $(PYTEST_ARGS) $(ARGS)

# Instructions and spills of the TPU kernels, for every generation: a table in tests/.
schedules:
	@$(BOOTSTRAP) aot
	@KREG_AOT=1 .venv-aot/bin/python tests/tpu_schedules.py $(ARGS)

lint:
	@$(BOOTSTRAP) user lint
	@.venv-lint/bin/ruff check .
	@.venv-lint/bin/ruff format --check .
	@.venv-lint/bin/pyrefly check --python-interpreter-path $(PY)

format:
	@$(BOOTSTRAP) lint
	@.venv-lint/bin/ruff check --fix .
	@.venv-lint/bin/ruff format .

hardware:
	@python=$$($(PYTHON) .ci/accelerator.py) && $$python -m experiments.hardware $(PART) $(ARGS)

# Renew the pinned versions (needs uv). Neither addresses nor comments go into these files.
COMPILE = uv pip compile --quiet --universal --python-version 3.12 --upgrade --generate-hashes \
	--no-header --no-annotate --no-emit-index-url --no-emit-find-links
pins:
	$(COMPILE) pyproject.toml --extra experiments --group test -o .ci/requirements.txt
	echo 'jax==0.11.2' | $(COMPILE) pyproject.toml --extra experiments --group test -c - \
		-o .ci/requirements-oldest.txt
	$(COMPILE) pyproject.toml --extra experiments --group test --group aot \
		-o .ci/requirements-aot.txt
	printf '%s\n' jax==0.11.2 jax-cuda13-plugin==0.11.2 | \
		$(COMPILE) pyproject.toml --extra experiments --group test --group aot \
		-c - -o .ci/requirements-aot-oldest.txt
	$(COMPILE) --group lint --no-deps -o .ci/requirements-lint.txt
	echo uv | $(COMPILE) - -o .ci/requirements-uv.txt
	! grep -n http .ci/requirements*.txt

clean:
	rm -rf .venv .venv-oldest .venv-aot .venv-aot-oldest .venv-lint .cache .pytest_cache .ruff_cache build dist
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
