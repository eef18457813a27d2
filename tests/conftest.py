"""Hypothesis profiles: `dev` unless HYPOTHESIS_PROFILE names another or CI=true asks for `ci`."""

import os

from hypothesis import HealthCheck, settings

# A shared machine may be slow: neither a deadline nor the time that drawing takes says anything about the code.
PATIENT = dict(deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("dev", max_examples=25, **PATIENT)
settings.register_profile("ci", max_examples=100, derandomize=True, **PATIENT)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") == "true" else "dev"))
