"""`python -m accelkit.cli`, for where the console script is not on the path."""

from __future__ import annotations

import sys

from accelkit.cli.main import main

sys.exit(main())
