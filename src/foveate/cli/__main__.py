"""`python -m foveate.cli`, the same as `foveate`."""

import sys

from foveate.cli import main

sys.exit(main())
