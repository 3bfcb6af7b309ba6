"""Rules around a verb: a middleware is one async function that takes the message and the next handler."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from functools import partial, reduce
from typing import TypeVar

In = TypeVar("In")
Out = TypeVar("Out")

Handler = Callable[[In], Awaitable[Out]]
Middleware = Callable[[In, Handler[In, Out]], Awaitable[Out]]
"""`async def rule(message, call_next): return await call_next(message)`; raise `Rejected` to refuse."""


def compose(middlewares: Sequence[Middleware[In, Out]], handler: Handler[In, Out]) -> Handler[In, Out]:
    """The handler wrapped in the middlewares; the first of the list is the outermost."""

    def wrap(inner: Handler[In, Out], rule: Middleware[In, Out]) -> Handler[In, Out]:
        return partial(_call, rule, inner)

    return reduce(wrap, reversed(middlewares), handler)


async def _call(rule: Middleware[In, Out], call_next: Handler[In, Out], message: In) -> Out:
    return await rule(message, call_next)
