# Targets for a fresh clone on Linux and macOS; POSIX make, so that old GNU make and BSD make read it alike.
# Only uv is needed; where it is absent, one is put into .uv/ with the system's Python.

BIN = .venv/bin
READY = .venv/.ready

.PHONY: demo test check static clean

# Train the bundled tiny model on the bundled pictures, on a CPU.
demo: $(READY)
	$(BIN)/flux2-lora train

test: $(READY)
	$(BIN)/python -m pytest

check: static
	$(BIN)/python -m pytest -m "not slow"

# Format, lint, types and import floors.
static: $(READY)
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:
	rm -rf .venv .uv .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache build dist
	find . -type d -name __pycache__ -prune -exec rm -rf {} +

# Asking for the version, and not for the path, also sees through a launcher that stands for no uv.
# --inexact keeps what a developer has installed besides. pip reads its own option, not SSL_CERT_FILE.
$(READY): pyproject.toml
	@set -e; \
	uv=uv; \
	if ! uv --version >/dev/null 2>&1; then \
		uv=.uv/bin/uv; \
		if ! $$uv --version >/dev/null 2>&1; then \
			python3 -m venv .uv; \
			.uv/bin/pip install --quiet $${SSL_CERT_FILE:+--cert "$$SSL_CERT_FILE"} uv; \
		fi; \
	fi; \
	UV_PROJECT_ENVIRONMENT=.venv $$uv sync --inexact
	@touch $(READY)
