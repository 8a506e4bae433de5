# The same commands for a person and for CI. Tools for `check` come from .venv-check.

CHECK = .venv-check/bin

.PHONY: test check bench demo dist clean

test:
	tests/run

check: $(CHECK)/ruff
	$(CHECK)/ruff format --check .
	$(CHECK)/ruff check .
	$(CHECK)/mypy
	PYTHONPATH=. $(CHECK)/lint-imports --no-logo
	clang-format --dry-run -Werror bpf/*.[ch] $$(git ls-files '*.c')

$(CHECK)/ruff: pyproject.toml
	/usr/bin/python3 -m venv .venv-check
	$(CHECK)/pip install --quiet --disable-pip-version-check PyYAML \
		import-linter==2.16 mypy==2.4.1 ruff==0.17.6 types-PyYAML==6.0.12.20261113
	touch $@

bench:
	bench/run

demo:
	demo/run

dist:
	scripts/dist

clean:
	rm -rf .venv .venv-check build *.egg-info kabpf/*.bpf.o
