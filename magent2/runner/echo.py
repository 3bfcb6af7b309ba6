"""The runner without a model: it streams the message back token by token."""

from __future__ import annotations

import re

from magent2.runner.interface import Parked, Result, Turn
from magent2.store.history import user_item


class EchoRunner:
    """Says what it is told, a word at a time."""

    kind = "echo"
    model = "echo"

    async def run(self, turn: Turn) -> Result | Parked:
        text = turn.envelope.content or ""
        for token in re.findall(r"\s*\S+\s*?|\s+", text):
            turn.sink.token(token, 0)
            await turn.sink.breathe()
        return Result([user_item(text), {"role": "assistant", "content": text}], text)

    async def aclose(self) -> None:
        """Nothing was opened."""
