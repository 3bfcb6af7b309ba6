"""The worker: takes messages for one agent, runs it and writes what happens to the conversation's log."""
