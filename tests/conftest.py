"""What holds for every test."""

from __future__ import annotations

import os

# scikit-learn leaves one of its checks out unless this is set before it is imported.
os.environ.setdefault("SCIPY_ARRAY_API", "1")
