# All set-up happens by itself: a machine needs Python 3.11 or newer, gcc, git, and a package index that pip can reach.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-builtin-rules

PYTHON ?= python3
WORKERS ?= 2
# The cluster's tests mostly wait.
CLUSTER_WORKERS ?= 3
VENV := .venv
BIN := $(VENV)/bin
CRDS := qlorajobs qlorasweeps
STEP := .ci/step

.PHONY: help
help:  ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# ------------------------------------------------------------------------------------------------------------- set-up
# The stamps know what is installed; only a change of what is asked for installs again.

$(VENV)/.run-installed: pyproject.toml constraints.txt
	@.ci/install "$(PYTHON)" "$(VENV)" --extra trainer --extra sweep
	@touch $@

$(VENV)/.all-installed: pyproject.toml constraints.txt
	@.ci/install "$(PYTHON)" "$(VENV)" --extra trainer --extra sweep --extra tracking --extra evaluate --group dev --group docs --group operator
	@touch $@ $(VENV)/.run-installed

.PHONY: venv
venv: $(VENV)/.all-installed  ## Create .venv with everything, as 'run' and 'test' do by themselves

.PHONY: constraints
constraints: $(VENV)/.all-installed  ## Pin the newest versions of all dependencies anew, with their hashes
	$(BIN)/uv pip compile pyproject.toml --all-extras --group build --group dev --group docs --group operator \
	  --universal --python-version 3.11 --upgrade --quiet --generate-hashes --no-emit-index-url \
	  --no-annotate --custom-compile-command 'make constraints' -o constraints.txt

# ---------------------------------------------------------------------------------------------------------------- use

.PHONY: run
run: $(VENV)/.run-installed  ## Quickstart: make a small base and real rows here, then QLoRA on this machine
	@$(BIN)/python examples/quickstart/prepare.py --out runs/quickstart-data; made=$$SECONDS; \
	  $(BIN)/qlora run examples/quickstart.yaml; \
	  echo "Base and rows took $$made s, all together $$SECONDS s."

.PHONY: images
images:  ## Both images, with docker, podman or buildah: make images PREFIX=registry/ TAG=1.0
	@.ci/images '$(PREFIX)' '$(or $(TAG),dev)' $(IMAGE_OPTIONS)

.PHONY: fidelity
fidelity: $(VENV)/.all-installed  ## Compare QLoRA here with the published method, number by number
	@$(BIN)/python benchmarks/fidelity/fidelity.py

.PHONY: models
models: $(VENV)/.all-installed  ## Try every model type of transformers at toy size, and write docs/reference/models.md
	@$(BIN)/python tools/models $(MODELS_ARGS)

.PHONY: bench-trainer
bench-trainer: $(VENV)/.all-installed  ## Measure the trainer's speed and memory beside the stock stack
	@$(BIN)/python benchmarks/bench_trainer.py

.PHONY: bench-cli
bench-cli: $(VENV)/.all-installed  ## Measure the command line's processor time beside a bare interpreter's
	@$(BIN)/python benchmarks/bench_cli.py

.PHONY: bench-operator
bench-operator: $(VENV)/.all-installed  ## Measure the operator with thousands of jobs on a real control plane
	@$(BIN)/python benchmarks/operator/bench_operator.py

.PHONY: pictures
pictures: $(VENV)/.all-installed  ## Draw the documents' pictures anew, from real runs on this machine; needs root
	@mkdir -p build && .ci/system-packages > build/system-packages.log
	@$(BIN)/python tools/docs_pictures/pictures.py

.PHONY: cluster
cluster: $(VENV)/.all-installed  ## A Kubernetes cluster on this machine to play with, until Ctrl-C; needs root
	@mkdir -p build && .ci/system-packages > build/system-packages.log
	@$(BIN)/python tools/cluster/interactive_cluster.py $(CLUSTER_ARGS)

.PHONY: demo
demo: $(VENV)/.all-installed  ## The quickstart as a QLoRAJob on such a cluster: images, helm install, apply; needs root
	@mkdir -p build && .ci/system-packages > build/system-packages.log
	@$(BIN)/python examples/quickstart/prepare.py --out runs/quickstart-data
	@$(BIN)/python tools/demo/demo.py runs/quickstart-data

# -------------------------------------------------------------------------------------------------------------- check

PYTEST := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/pytest --durations 10
CLUSTER_TESTS := tests/charts tests/cluster tests/images tests/observability/live
E2E_TESTS := tests/e2e
# From apply to adapter; what may happen on the way (pods, nodes, S3 and the operator taken away) is test-e2e's.
E2E_MAIN := two_workers or halved or missing or bad_rows or no_gpu_holds
CLOSING := build/pytest-unit.log build/pytest-cluster.log build/pytest-e2e.log

# What has to be built for the cluster (Kubernetes, images) is built while the unit tests run, and waited for after them.
.PHONY: test
test: check  ## Everything that must hold: check, then all tests, on a real cluster too (root needed)
	@rm -f $(CLOSING); $(STEP) system-packages .ci/system-packages
	@$(STEP) tools $(BIN)/python tools/services/tools.py & tools=$$!; trap 'kill $$tools 2> /dev/null || true' EXIT; \
	  $(STEP) pytest-unit env $(PYTEST) -n $(WORKERS) --dist worksteal $(addprefix --ignore=,$(CLUSTER_TESTS) $(E2E_TESTS)) \
	    $(PYTEST_ARGS); \
	  wait $$tools
	@$(STEP) images $(BIN)/python tools/services/images.py
	@$(STEP) pytest-cluster env $(PYTEST) -n $(CLUSTER_WORKERS) --dist loadscope $(CLUSTER_TESTS) --ignore=tests/cluster/kueue $(PYTEST_ARGS)
	@$(STEP) pytest-e2e env $(PYTEST) $(E2E_TESTS) -k '$(E2E_MAIN)' $(PYTEST_ARGS)
	@.ci/sum $(CLOSING)

.PHONY: test-kueue
test-kueue: $(VENV)/.all-installed  ## Queues: the operator beside the real Kueue, which is built the first time; needs root
	@$(STEP) system-packages .ci/system-packages
	@$(STEP) tools $(BIN)/python tools/services/tools.py
	@$(STEP) pytest-kueue env $(PYTEST) tests/cluster/kueue $(PYTEST_ARGS)

.PHONY: test-unit
test-unit: check  ## Only what needs no cluster and no root
	@$(STEP) pytest-unit env $(PYTEST) -n $(WORKERS) --dist worksteal \
	  $(addprefix --ignore=,$(CLUSTER_TESTS) $(E2E_TESTS)) $(PYTEST_ARGS)

.PHONY: test-e2e
test-e2e: $(VENV)/.all-installed  ## From helm install to a verified adapter, on real nodes; and what may happen on the way
	@$(STEP) system-packages .ci/system-packages
	@$(STEP) tools $(BIN)/python tools/services/tools.py
	@$(STEP) images $(BIN)/python tools/services/images.py
	@$(STEP) pytest-e2e env $(PYTEST) $(E2E_TESTS) $(PYTEST_ARGS)
	@tail -n 1 build/pytest-e2e.log

.PHONY: soak-storage
soak-storage: $(VENV)/.all-installed  ## Whole runs over object storage that fails in every way, a run for each fault
	@SOAK_STORAGE=1 $(PYTEST) tests/trainer/attempts/faults/test_storage_faults.py $(PYTEST_ARGS)

.PHONY: soak-sweep
soak-sweep: $(VENV)/.all-installed  ## A sweep of the quickstart, 12 trials in real pods, halved, and on this machine; needs root
	@$(STEP) system-packages .ci/system-packages
	@$(STEP) tools $(BIN)/python tools/services/tools.py
	@$(STEP) images $(BIN)/python tools/services/images.py
	@SOAK_SWEEP=1 $(PYTEST) tests/e2e/test_sweep.py $(PYTEST_ARGS)

.PHONY: check
check: $(VENV)/.all-installed  ## Lint, format, imports, generated CRD, dashboards and reference, types
	@$(STEP) lint $(BIN)/ruff check
	@$(STEP) format $(BIN)/ruff format --check
	@$(STEP) imports $(BIN)/lint-imports
	@$(STEP) crds bash -c 'for kind in $(CRDS); do $(BIN)/qlora crds $$kind | diff -u crds/qlora.dev_$$kind.yaml - \
	  || { echo "crds/qlora.dev_$$kind.yaml is stale: make crds"; exit 1; }; done'
	@$(STEP) chart $(BIN)/python charts/generate.py --check
	@$(STEP) dashboards $(BIN)/python -m observability.generate --check
	@$(STEP) reference $(BIN)/python docs/generate.py --check
	@$(STEP) types $(BIN)/mypy

.PHONY: crds
crds: $(VENV)/.all-installed  ## Generate the CustomResourceDefinitions from the types
	for kind in $(CRDS); do \
	  $(BIN)/qlora crds $$kind > crds/$$kind.new && mv crds/$$kind.new crds/qlora.dev_$$kind.yaml || exit 1; \
	done

.PHONY: chart
chart: crds  ## The chart's copy of the CRD, and the table of values in its README
	$(BIN)/python charts/generate.py

.PHONY: dashboards
dashboards: $(VENV)/.all-installed  ## Generate dashboards and alert rules into the chart, and the reference of metrics
	$(BIN)/python -m observability.generate

.PHONY: reference
reference: $(VENV)/.all-installed  ## Generate the reference of QLoRAJobs from the types
	$(BIN)/python docs/generate.py

.PHONY: docs
docs: $(VENV)/.all-installed  ## Build the documents' site into build/site, without a warning
	@$(STEP) docs $(BIN)/sphinx-build --fail-on-warning --nitpicky --fresh-env --write-all --quiet \
	  -d build/doctrees docs build/site
	@echo "build/site/index.html"

.PHONY: clean
clean:  ## Remove what is generated; .venv and runs stay
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
