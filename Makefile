# Each target makes .venv and installs what it needs; a second run installs nothing. Another interpreter: make test PYTHON=python3.12
PYTHON ?= python3
OUT ?= outputs/gpu_check
GPU_CHECK_FLAGS ?=
FIGURES ?=
BENCH_FLAGS ?= --size=demo --device=auto --seed=0 --out=outputs/bench_policy
BIN := .venv/bin
PINS := setup.cfg pyproject.toml requirements/constraints.txt
# Python 3.12 (lerobot 0.6 needs it) and 3.13: the first of these that runs. A name on PATH may be pyenv's shim of a version that is not chosen.
find_python = $(shell for candidate in python3.$(1) $$HOME/.pyenv/versions/3.$(1)*/bin/python3.$(1); do \
	"$$candidate" -c "import sys; sys.exit(sys.version_info[:2] != (3, $(1)))" 2>/dev/null && echo "$$candidate" && break; done)
PYTHON312 ?= $(call find_python,12)
PYTHON313 ?= $(call find_python,13)
ARM_TESTS := tests/unit/robots/test_so100_follower.py tests/unit/virtual/test_feetech_bus.py tests/realtime/test_faults.py tests/realtime/test_watchdog.py tests/realtime/test_put_down.py tests/unit/cli/test_cli.py \
	tests/realtime/test_end_to_end.py tests/contract/test_lerobot_plugin.py tests/unit/flags
QUICK_TESTS := tests/unit/control/test_modes.py tests/unit/control/test_loop.py tests/unit/control/test_limits.py tests/unit/control/test_threaded.py tests/unit/virtual/test_feetech_bus.py tests/unit/robots/test_so100_follower.py
# By the environment, and not by --constraint alone: only so it reaches the tools that build packages, too.
INSTALL := PIP_CONSTRAINT="$(CURDIR)/requirements/constraints.txt" PIP_BUILD_CONSTRAINT="$(CURDIR)/requirements/constraints.txt" \
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable
INSTALL_LEROBOT_06 = PIP_CONSTRAINT="$(CURDIR)/requirements/constraints-py312.txt" PIP_BUILD_CONSTRAINT="$(CURDIR)/requirements/constraints-py312.txt" \
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --editable
DEMO := outputs/demo

.PHONY: help demo test test-slow test-page test-lerobot-0.6 demo-python3.13 test-python3.13 python312 python313 test-ray soak lint bench docs figures gpu-check clean

help:
	@echo "make demo       a simulated SO-100, reaches for blocks, driven from its camera by a small trained network; leaves a video, a plot and a report"
	@echo "make test       the tests that need no GPU, trained weights or arm"
	@echo "make test-slow  the rest of them: whole programs, exports and studies of five seconds and more"
	@echo "make test-lerobot-0.6   the tests of the arm with lerobot 0.6, which needs Python 3.12, in .venv312"
	@echo "make demo-python3.13, test-python3.13   the demo, and quick tests of control loop and arm, on Python 3.13, in .venv313"
	@echo "make test-page  the page of a run in a real browser, Chromium"
	@echo "make test-ray   the service on a local Ray cluster"
	@echo "make soak       the long forms of some tests, several minutes on a quiet machine"
	@echo "make lint       ruff, mypy, and the import arrow"
	@echo "make bench      inference time, a few minutes"
	@echo "make figures    remake the figures that README and docs quote, as far as this machine can; some of them: FIGURES=\"sync threaded\""
	@echo "make docs       pages of the Python interface from its docstrings, in outputs/docs"
	@echo "make gpu-check  GPU tests and benchmarks; needs no installation where '$(PYTHON)' has torch with CUDA"
	@echo "make clean      remove .venv, .venv312, .venv313 and everything made"

demo: .venv/.demo
	$(BIN)/python -m gr00t_fast demo --out=$(DEMO)

# One thread each: on a busy machine OpenMP's spin barriers make two threads slower than one. Files stay whole: what they set up is shared by their tests.
# A test that hangs says where after five minutes; the longest takes half a minute, and three times as long beside four busy jobs.
# Tests in real time run alone, after the others, and those of the page in a browser have a target of their own. No test is run again.
TEST_JOBS ?= 2
TEST := -m pytest -q -o faulthandler_timeout=300 --ignore=tests/browser
# With COVERAGE=1 those that run together leave .coverage; it would slow down tests in real time, and lengthen slow ones by a third.
COVER := $(if $(COVERAGE),--cov=gr00t_fast --cov-report=)
TOGETHER := $(TEST) --numprocesses=$(TEST_JOBS) --dist=loadfile
test: .venv/.dev
	OMP_NUM_THREADS=1 $(BIN)/python $(TOGETHER) $(COVER) -m "not realtime and not slow"
	OMP_NUM_THREADS=1 $(BIN)/python $(TEST) -m "realtime and not slow"

test-slow: .venv/.dev
	OMP_NUM_THREADS=1 $(BIN)/python $(TOGETHER) -m "slow and not realtime"
	OMP_NUM_THREADS=1 $(BIN)/python $(TEST) -m "slow and realtime"

test-lerobot-0.6: .venv312/.robottest
	OMP_NUM_THREADS=1 .venv312/bin/python $(TOGETHER) -m "not realtime" $(ARM_TESTS)
	OMP_NUM_THREADS=1 .venv312/bin/python $(TEST) -m "realtime and not slow" $(ARM_TESTS)

demo-python3.13: .venv313/.robottest
	.venv313/bin/python -m gr00t_fast demo --out=$(DEMO)-3.13

test-python3.13: .venv313/.robottest
	OMP_NUM_THREADS=1 .venv313/bin/python $(TOGETHER) -m "not realtime" $(QUICK_TESTS)

# Chromium and its driver are installed where that is possible without a question; otherwise the tests are skipped, and say so.
test-page: .venv/.dev
	@command -v chromedriver >/dev/null || { as_root=$$([ "$$(id -u)" = 0 ] || echo sudo -n); $$as_root apt-get install --yes --quiet --no-install-recommends \
		chromium chromium-driver >/dev/null 2>&1; } || echo "SKIPPED: the page in a browser, for want of Chromium and chromedriver."
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -rs tests/browser/test_page_browser.py

test-ray: .venv/.ray
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/realtime/test_ray_serve.py

soak: .venv/.dev
	OMP_NUM_THREADS=1 GR00T_FAST_FUZZ_MESSAGES=100000 GR00T_FAST_VIRTUAL_TICKS=1000000 GR00T_FAST_SOAK_S=60 GR00T_FAST_COMPILE=1 \
		GR00T_FAST_HOSTILE_CHECKPOINTS=1000 GR00T_FAST_ATTACK_S=10 \
		$(BIN)/python -m pytest -s tests/unit/serving/test_serving.py tests/realtime/test_attacks.py tests/unit/checkpoint/test_hostile_checkpoints.py tests/unit/control/test_threaded.py \
		tests/realtime/test_end_to_end.py tests/unit/engine/test_graph_engines.py tests/gpu/test_fakecuda.py \
		-k "mutated or attack or hostile or million or clock or compiled_on or engines_ask_a_gpu"

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/contract/test_architecture.py

bench: .venv/.dev
	$(BIN)/python benchmarks/bench_policy.py $(BENCH_FLAGS)

figures: .venv/.dev
	$(BIN)/python benchmarks/figures.py $(if $(FIGURES),--figures $(FIGURES))

docs: .venv/.dev
	$(BIN)/python docs/api.py outputs/docs

gpu-check:
	@if $(PYTHON) -c "import sys, torch; sys.exit(not torch.cuda.is_available())" 2>/dev/null; then \
		$(PYTHON) -m benchmarks.gpu_check --out="$(OUT)" $(GPU_CHECK_FLAGS); \
	elif ! nvidia-smi -L 2>/dev/null; then \
		echo "error: nvidia-smi finds no GPU here: look at the driver. Without a GPU: python -m benchmarks.gpu_check --device=cpu --size=tiny"; exit 1; \
	else \
		echo "$(PYTHON) has no torch with a CUDA GPU; using .venv" && \
		$(MAKE) .venv/.dev && $(BIN)/python -m benchmarks.gpu_check --out="$(OUT)" $(GPU_CHECK_FLAGS); \
	fi

clean:
	rm -rf .venv .venv312 .venv313 build dist outputs *.egg-info .pytest_cache .ruff_cache

.venv/.created:
	@$(PYTHON) -c "import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))" || { \
		echo "gr00t_fast needs Python 3.11 to 3.13; '$(PYTHON)' is: $$($(PYTHON) --version 2>&1)."; \
		echo "Name another one: make $(MAKECMDGOALS) PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv .venv
	@touch $@

.venv/.demo: $(PINS) | .venv/.created
	@echo "installing what the demo needs into .venv (a few minutes, once)"
	$(INSTALL) '.[demo]'
	@touch $@

.venv/.dev: $(PINS) | .venv/.created
	@echo "installing what tests and benchmarks need into .venv (some minutes and 9 GB, once)"
	$(INSTALL) '.[dev]'
	@# a client that tests drive; it asks for numpy < 2 and works with later ones
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps openpi-client==0.1.2
	@touch $@

.venv/.ray: .venv/.dev
	$(INSTALL) '.[ray]'
	@touch $@

python312 python313: python3%:
	@test -n "$(PYTHON3$*)" || { \
		echo "this needs Python 3.$*, and none was found on PATH or among pyenv's versions."; \
		echo "Install one (pyenv install 3.$*), or name it: make $(MAKECMDGOALS) PYTHON3$*=/path/to/python3.$*"; exit 1; }

.venv312/.created .venv313/.created: .venv3%/.created: | python3%
	$(PYTHON3$*) -m venv $(@D)
	@touch $@

.venv312/.robottest .venv313/.robottest: .venv3%/.robottest: setup.cfg pyproject.toml requirements/constraints-py312.txt | .venv3%/.created
	@echo "installing lerobot 0.6 and what the tests of the arm need into $(@D) (some minutes and 8 GB, once)"
	$(INSTALL_LEROBOT_06) '.[robottest]'
	@touch $@
