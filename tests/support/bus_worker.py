"""A consumer in a process of its own: `python -m tests.support.bus_worker URL QUEUE LEASE_S N`.

It takes N deliveries and prints a line `key attempt` for each, then waits for a line on its input, acks them all and
prints `acked` or `lost` for each.
"""

from __future__ import annotations

import asyncio
import sys

from magent2.bus.interface import BusConfig, Delivery
from magent2.bus.redis import RedisBus
from magent2.errors import LeaseLost
from magent2.redis_link import RedisLink


def say(line: str) -> None:
    """Print it now."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


async def work(url: str, queue: str, lease_s: float, n: int) -> None:
    """Take `n`, wait to be told, ack."""
    link = RedisLink(url)
    held: list[Delivery] = []
    async with RedisBus(link, BusConfig(lease_s=lease_s)).consume(queue) as consumer:
        while len(held) < n:
            for delivery in await consumer.receive(n - len(held)):
                held.append(delivery)
                say(f"{delivery.key} {delivery.attempt}")
        await asyncio.to_thread(sys.stdin.readline)
        for delivery in held:
            try:
                await delivery.ack()
            except LeaseLost:
                say("lost")
            else:
                say("acked")
    await link.aclose()


if __name__ == "__main__":
    asyncio.run(work(sys.argv[1], sys.argv[2], float(sys.argv[3]), int(sys.argv[4])))
