"""Tests run on the CPU, with eight host devices, and with jaxtyping's shapes checked."""

import os

os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ.setdefault('XLA_FLAGS', '--xla_force_host_platform_device_count=8')
