"""The gateway: messages in over HTTP, events out over SSE."""
