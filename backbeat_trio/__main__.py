"""``python -m backbeat_trio``, and the ``backbeat`` program."""

from __future__ import annotations

import sys

_INTERRUPTED = 130


def main() -> int:
    """Run the command line, and return its exit status."""
    # Ctrl-C while the rest is imported is no error, either.
    try:
        from ._cli.main import run

        return run(sys.argv[1:])
    except KeyboardInterrupt:
        return _INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
