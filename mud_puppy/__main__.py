"""`python -m mud_puppy` is `mud-puppy`."""

import sys

from mud_puppy.cli import main

if __name__ == "__main__":
    sys.exit(main())
