"""A keyed work queue and a replayable topic: the promise in `interface`, one file per keeper."""
