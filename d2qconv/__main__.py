"""`python -m d2qconv`."""

from __future__ import annotations

import sys

from d2qconv.cli import main

sys.exit(main())
