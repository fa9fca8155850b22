"""``python -m latentwire`` is ``latentwire``."""

from latentwire.cli.main import main

if __name__ == "__main__":
    main()
