"""``python -m hoanalysis`` is the command ``hoanalysis``."""

from hoanalysis.cli import main

if __name__ == "__main__":
    main()
