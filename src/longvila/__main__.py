"""``python -m longvila`` is ``longvila``."""

from longvila.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
