"""Hypothesis profiles, and which tests a machine can run.

The profile is `dev` unless HYPOTHESIS_PROFILE names another or CI=true asks for `ci`; `mutation` is what
mutate_kernels.py asks for.
"""

import os

import pytest
from hypothesis import HealthCheck, Phase, settings

# A shared machine may be slow: neither a deadline nor the time that drawing takes says anything about the code.
PATIENT = dict(deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("dev", max_examples=25, **PATIENT)
settings.register_profile("ci", max_examples=100, derandomize=True, **PATIENT)
AS_IN_DEV = dict(max_examples=25, phases=[Phase.explicit, Phase.generate])  # and a failure needs no smaller example
settings.register_profile("mutation", derandomize=True, **AS_IN_DEV, **PATIENT)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") == "true" else "dev"))


def pytest_collection_modifyitems(config, items):
    from tinymoe.cuda.device import gpu_is_there

    if not gpu_is_there():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no GPU"))
