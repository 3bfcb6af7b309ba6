"""`python -m magent2.worker`."""

from __future__ import annotations

from magent2.worker.service import main

if __name__ == "__main__":
    main()
