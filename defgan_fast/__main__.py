"""``python -m defgan_fast``: the command line where the script is not on the path."""

from defgan_fast.commands import main

if __name__ == "__main__":
    raise SystemExit(main())
