"""Tools an agent may be given: the promise in `interface`, what is there and allowed in `registry`."""
