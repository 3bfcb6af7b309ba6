"""The client: a Python API and the command `magent2 client`. Imports next to nothing until it is used."""
