"""Where `docker compose` published the gateway, for `--base-url auto`."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

COMPOSE_FILES = ("compose.yaml", "compose.yml", "docker-compose.yaml", "docker-compose.yml")
TIMEOUT_S = 3.0


def find_gateway() -> str | None:
    """The URL of the gateway of the stack in the current folder; None without one that runs."""
    docker = shutil.which("docker")
    try:
        if docker is None or not any(Path(name).exists() for name in COMPOSE_FILES):
            return None
        asked = subprocess.run(  # noqa: S603
            [docker, "compose", "port", "gateway", "8000"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):  # the current folder is gone, docker hangs
        return None
    published = re.fullmatch(rb"(.+):([1-9][0-9]{0,4})", asked.stdout.strip())
    if asked.returncode != 0 or published is None:
        return None
    return f"http://localhost:{int(published[2])}"
