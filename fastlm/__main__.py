"""`python -m fastlm` is `fastlm`."""

from fastlm.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
