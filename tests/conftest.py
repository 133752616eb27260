"""Settings of all tests."""

from hypothesis import settings

# Examples take as long as the machine is busy, so time says nothing about them.
settings.register_profile("tests", max_examples=60, deadline=None)
settings.load_profile("tests")
