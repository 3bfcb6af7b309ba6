# One image for gateway and worker; `docker compose` says which. Any base with Python 3.11 or later and pip will do.
ARG BASE_IMAGE=python:3.11-slim

FROM ${BASE_IMAGE} AS build
# For builds behind a mirror; given on the command line, they reach this stage only
ARG PIP_INDEX_URL
ARG UV_DEFAULT_INDEX
ENV UV_COMPILE_BYTECODE=1 \
    UV_LINK_MODE=copy \
    UV_PROJECT_ENVIRONMENT=/opt/magent2 \
    UV_PYTHON_DOWNLOADS=never
RUN pip install --no-cache-dir --root-user-action=ignore uv
WORKDIR /src
# The dependencies first: they change less often than the code
COPY pyproject.toml README.md LICENSE ./
COPY magent2/__init__.py magent2/
RUN uv sync --no-cache --no-dev --no-install-project
COPY magent2 magent2
RUN uv sync --no-cache --no-dev --no-editable

FROM ${BASE_IMAGE}
RUN useradd --uid 1000 --create-home magent2 \
    && install --directory --owner=magent2 --group=magent2 /app /app/workspace
COPY --from=build /opt/magent2 /opt/magent2
ENV PATH=/opt/magent2/bin:$PATH \
    PYTHONUNBUFFERED=1
WORKDIR /app
USER magent2
CMD ["magent2", "gateway"]
