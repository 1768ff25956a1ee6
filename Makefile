# `make run` starts it, `make test` runs all tests, `make check` the fast ones, `make soak` the long fault tests, `make docs`
# builds the documentation.
SYSTEM_PACKAGES = slurm-wlm slurm-wlm-basic-plugins munge slurmdbd mariadb-server-core zsh fish

.PHONY: run test test-slurm soak check docs format setup
.DEFAULT_GOAL := check

run: setup
	.venv/bin/launch $(ARGS)

# Real SLURM, real Ray and real shells. Where the packages cannot be had, the tests say what is missing.
test: setup
	scripts/apt-install $(SYSTEM_PACKAGES) || true
	scripts/test $(ARGS)

# The tests on SLURM with another version of it, of a newer Debian in a chroot: make test-slurm VERSION=24.11 or 26.05.
test-slurm: setup
	scripts/slurm-chroot $(VERSION) .venv/bin/python -m pytest -m 'slurm and not soak and not ray' $(ARGS)

# Minutes of faults, for which the time of `make test` does not last.
soak: setup
	scripts/apt-install $(SYSTEM_PACKAGES) || true
	.venv/bin/python -m pytest -m soak $(ARGS)

check: setup
	scripts/check

docs: setup
	scripts/docs

format: setup
	.venv/bin/ruff format
	.venv/bin/ruff check --fix

setup: .venv/up-to-date

.venv/up-to-date: pyproject.toml constraints.txt scripts/setup
	scripts/setup
