"""`python -m lacfast`."""

import sys

from lacfast.cli import main

sys.exit(main())
