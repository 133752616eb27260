"""Settings of all tests."""

import jax
from hypothesis import settings

# Meshes are tried on simulated devices, which have to be there before JAX begins.
jax.config.update("jax_num_cpu_devices", 8)

# Examples take as long as the machine is busy, so time says nothing about them.
settings.register_profile("tests", max_examples=60, deadline=None)
settings.load_profile("tests")
