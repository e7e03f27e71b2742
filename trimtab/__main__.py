"""`python -m trimtab`, for where the command is not on the path."""

import sys

from trimtab.cli import main

sys.exit(main())
