"""Tests run on the CPU, with eight host devices, and with public shapes checked."""

import os

import compiler

os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ.setdefault('XLA_FLAGS', f'--xla_force_host_platform_device_count=8 {compiler.QUICK}')

import beartype  # noqa: E402  (the flags above must be set before jax is imported)
import jax  # noqa: E402
import jaxtyping  # noqa: E402
import pytest  # noqa: E402

# An int is a float to the type checker, as it is to Python's own (PEP 484).
typechecker = beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))
jaxtyping.install_import_hook(
    ['specdistill_jax.api', 'specdistill_jax.losses'], 'conftest.typechecker')


MANY_MAPPINGS = 20_000


@pytest.fixture(scope='module', autouse=True)
def forget_programs():
  """Each compiled program maps some memory, and Linux grants a process 65,530 mappings.

  Past them the compiler dies of a segmentation fault.
  """
  yield
  with open('/proc/self/maps', 'rb') as mappings:
    if sum(1 for _ in mappings) > MANY_MAPPINGS:
      jax.clear_caches()
