"""What crosses a process border: the message envelope, the stream events, and the facts of a run."""
