"""``python -m scalelong_fast.cli``."""

from scalelong_fast.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
