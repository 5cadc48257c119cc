"""The platforms. A bot is a class with serve, send and typing (see base); console is the one to copy."""

from __future__ import annotations


def main() -> None:
    """The command `palaver`. Ctrl-C ends it without a word also while its imports go on, half a second."""
    try:
        from bots.__main__ import main
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    main()
