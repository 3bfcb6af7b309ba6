# The developer's commands. `uv run just --list` shows them; `uv run just <name>` needs nothing but uv.

[private]
default:
    @just --list

# Gateway and worker in one process: no Redis, no Docker, no key
local *arguments:
    uv run magent2 local {{ arguments }}

# Redis, gateway and worker in Docker, or one of them: `just up redis`
up *service:
    docker compose up --detach --build --wait {{ service }}

# Stop what `up` started; the data stays
down:
    docker compose down

# Follow the logs of what `up` started
log *service:
    docker compose logs --follow {{ service }}

# Run the tests, or some of them: `just test tests/bus`
test *arguments:
    uv run pytest {{ arguments }}

# The tests to run on save: in one process, without Redis and without importing the SDK
quick:
    uv run pytest --hypothesis-profile quick -m "not redis" tests/contracts tests/store tests/gateway tests/worker tests/models tests/tools tests/story

# What CI checks, the fastest first; reads only
check: lint test

# Everything of `check` but the tests
lint:
    uv run ruff check
    uv run ruff format --check
    uv run lint-imports --no-logo
    uv run mypy

# Sort the imports and format the code; writes
fmt:
    uv run ruff check --fix
    uv run ruff format

# Resolve the dependencies anew and pin them in pyproject.toml; writes
lock:
    uv run python scripts/lock.py
