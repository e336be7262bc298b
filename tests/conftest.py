"""What holds for every test."""

from __future__ import annotations

import os

from hypothesis import settings

# scikit-learn leaves one of its checks out unless this is set before it is imported.
os.environ.setdefault("SCIPY_ARRAY_API", "1")

# A change is judged on the same examples each time; a run by hand looks for others.
settings.register_profile("ci", derandomize=True, deadline=None)
settings.register_profile("default", deadline=None)
settings.load_profile("ci" if os.environ.get("CI") else "default")
