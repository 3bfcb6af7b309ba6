"""Small durable records beside the bus: the promise in `interface`, one file per keeper."""
