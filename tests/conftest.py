from __future__ import annotations

import os

from hypothesis import settings

pytest_plugins = ["backbeat_trio.testing"]

# Deadlines of hypothesis are seconds of a real clock, which a loaded machine makes meaningless.
settings.register_profile("default", deadline=None)
settings.register_profile("thorough", deadline=None, max_examples=2000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))
