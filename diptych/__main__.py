"""``python -m diptych`` and ``torchrun -m diptych``: the console script."""

from diptych.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
