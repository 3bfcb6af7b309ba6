"""Runners: what answers a message. The promise in `interface`; `echo` and `openai` keep it."""
