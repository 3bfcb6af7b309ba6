"""The Compose stack as a user starts it: images built, three services up, a message answered over HTTP.

Where no Docker engine runs, or where the images cannot be had, these tests are skipped with that reason; asked for with
`-m docker`, images that cannot be had are a failure.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from pytest_docker.plugin import Services

pytestmark = pytest.mark.docker

ROOT = Path(__file__).parents[2]
PROJECT = "magent2_test"
GATEWAY_PORT, REDIS_PORT = 18000, 16379
ENVIRONMENT = {
    "GATEWAY_PORT": str(GATEWAY_PORT),
    "REDIS_PORT": str(REDIS_PORT),
    "ENV_FILE": os.devnull,  # a developer's key and model stay out: the Echo runner answers
    "COMPOSE_ENV_FILES": os.devnull,
}
# read at import, before the environment is cleaned: other images than Docker Hub's
ENVIRONMENT |= {name: os.environ[name] for name in ("BASE_IMAGE", "REDIS_IMAGE") if name in os.environ}


def run(*command: str, timeout_s: float) -> tuple[int, str]:
    """Exit code and all that was printed; a command that does not end in time counts as failed."""
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            timeout=timeout_s,
        )
    except subprocess.TimeoutExpired:
        return 1, f"`{' '.join(command)}` did not end within {timeout_s:.0f} s"
    return done.returncode, done.stdout


def last_line(text: str) -> str:
    """The last line that says something."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "no output")


@pytest.fixture(scope="session")
def docker_engine() -> None:
    """Skip where nothing can run containers, and say why."""
    if shutil.which("docker") is None:
        pytest.skip("Docker is not installed")
    code, said = run("docker", "info", "--format", "{{.ServerVersion}}", timeout_s=15)
    if code != 0:
        pytest.skip(f"no Docker engine is running: {last_line(said)}")
    code, said = run("docker", "compose", "version", timeout_s=15)
    if code != 0:
        pytest.skip("Docker is running, but without the `docker compose` plugin")


@pytest.fixture(scope="session")
def docker_compose_command(docker_engine: None, clean_environment: None, pytestconfig: pytest.Config) -> Iterator[str]:
    """Images built and an environment of our own; at the end, nothing of the project is left."""
    compose = ("docker", "compose", "--project-name", PROJECT)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        try:
            for step in (("build", "gateway", "worker"), ("pull", "--quiet", "--policy", "missing", "redis")):
                code, said = run(*compose, *step, timeout_s=600)
                if code != 0:
                    blame = pytest.fail if "docker" in pytestconfig.option.markexpr else pytest.skip
                    blame(f"`docker compose {step[0]}` failed: {last_line(said)}")
            yield "docker compose"
        finally:
            run(*compose, "down", "--volumes", "--rmi", "local", "--remove-orphans", timeout_s=120)


@pytest.fixture(scope="session")
def docker_compose_file() -> str:
    """The file users start."""
    return str(ROOT / "docker-compose.yml")


@pytest.fixture(scope="session")
def docker_compose_project_name() -> str:
    """A name of its own, apart from a stack that may be up."""
    return PROJECT


@pytest.fixture(scope="session")
def docker_setup() -> list[str]:
    """Nothing left of an interrupted run, then everything up and healthy."""
    return ["down --volumes --remove-orphans", "up --detach --wait --wait-timeout 180"]


@pytest.fixture(scope="session")
def docker_cleanup() -> list[str]:
    """`docker_compose_command` tears down, also when `up` failed."""
    return []


@pytest.fixture
def gateway(docker_services: Services) -> Iterator[httpx.Client]:
    """A client of the published gateway."""
    with httpx.Client(base_url=f"http://127.0.0.1:{GATEWAY_PORT}", timeout=60, trust_env=False) as client:
        yield client


def compose(services: Services, subcommand: str) -> str:
    """Run `docker compose <subcommand>` on the stack under test."""
    output: bytes = services._docker_compose.execute(subcommand)
    return output.decode()


def send(gateway: httpx.Client, conversation_id: str, text: str) -> dict[str, Any]:
    """What the gateway answers to a message for the worker's agent."""
    message = {
        "id": str(uuid.uuid4()),
        "conversation_id": conversation_id,
        "sender": "user:local",
        "recipient": "agent:DevAgent",
        "type": "message",
        "content": text,
    }
    response = gateway.post("/send", json=message)
    assert response.status_code == 200, response.text
    accepted: dict[str, Any] = response.json()
    return accepted


def follow(gateway: httpx.Client, accepted: dict[str, Any]) -> list[dict[str, Any]]:
    """The events from just before the message up to its terminal event."""
    query = {"after": accepted["cursor"], "until": accepted["message_id"]}
    with gateway.stream("GET", f"/stream/{accepted['conversation_id']}", params=query) as response:
        assert response.status_code == 200
        return [json.loads(line[len("data:") :]) for line in response.iter_lines() if line.startswith("data:")]


def test_all_services_are_up_and_ready(docker_services: Services, gateway: httpx.Client) -> None:
    running = compose(docker_services, "ps --services --status running").split()

    assert sorted(running) == ["gateway", "redis", "worker"]
    assert gateway.get("/health").json() == {"status": "ok"}
    assert gateway.get("/ready").status_code == 200


def test_a_message_is_streamed_and_answered(gateway: httpx.Client) -> None:
    events = follow(gateway, send(gateway, f"c-{uuid.uuid4()}", "hello from outside"))

    assert events[0]["event"] == "user_message"
    assert events[0]["text"] == "hello from outside"
    assert events[-1]["event"] == "output"
    assert "hello from outside" in events[-1]["text"]
    assert "".join(event["text"] for event in events if event["event"] == "token") == events[-1]["text"]


def test_a_message_sent_while_the_worker_is_down_is_answered_when_it_is_back(
    docker_services: Services, gateway: httpx.Client
) -> None:
    conversation_id = f"c-{uuid.uuid4()}"
    follow(gateway, send(gateway, conversation_id, "before"))

    compose(docker_services, "stop worker")
    accepted = send(gateway, conversation_id, "meanwhile")
    compose(docker_services, "start worker")
    events = follow(gateway, accepted)

    assert "meanwhile" in events[-1]["text"]
    assert [event["event"] for event in events].count("output") == 1


def test_what_was_said_survives_a_restart_of_everything(docker_services: Services, gateway: httpx.Client) -> None:
    first = send(gateway, f"c-{uuid.uuid4()}", "remember me")
    before = follow(gateway, first)

    compose(docker_services, "restart redis gateway worker")
    compose(docker_services, "up --detach --wait --wait-timeout 120")

    assert follow(gateway, first) == before


def test_the_model_key_reaches_the_worker_alone(docker_services: Services) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPENAI_API_KEY", "sk-not-a-real-key")
        services = json.loads(compose(docker_services, "config --format json"))["services"]

    holders = [name for name, service in services.items() if "sk-not-a-real-key" in json.dumps(service)]
    assert holders == ["worker"]
