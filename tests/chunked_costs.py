"""What the head and each loss cost, over chunks and whole: a JSON line each.

  PYTHONPATH=. python tests/chunked_costs.py [vocab_size] [chunk]              on this machine
  PYTHONPATH=. python tests/chunked_costs.py [vocab_size] [chunk] [topology]   by the TPU compiler

The gradient of the loss alone on features and head. On this machine 4 rows of 256 tokens, both
models 128 wide, in float32: temporary bytes and FLOPs by the compiler and by the trace, seconds a
call (median of three, compiled before). On a slice 8 rows of 1,024 tokens a chip, the teacher
4,096 and the student 2,048 wide, in bfloat16, heads spread over all chips: bytes and FLOPs of a
chip by the compiler, loops as often as they run, and a roofline time.
"""

import json
import sys
import time

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from specdistill_jax import row_sharding
from specdistill_jax import sharding
from specdistill_jax.costs import chips
from specdistill_jax.costs import count
from specdistill_jax.costs import hlo
from specdistill_jax.costs import needed
from specdistill_jax.costs import roofline
from specdistill_jax.losses import chunked
from specdistill_jax.losses import objectives
from specdistill_jax.models import layers

ROWS, LENGTH, WIDTH = 4, 256, 128


SPECS = (*(name for name in objectives.DIVERGENCES if name != 'end_to_end_tvd'),
         'lk_hybrid,alpha_over=previous', 'lk_hybrid,alpha_over=token', 'forward_kl,block=8',
         'end_to_end_tvd,block=8', 'forward_kl,position_weights=adaptive,block=8')


def gradient_of(spec, chunk, mask_bt, labels_bt):
  """Function of the student's head and features, and the teacher's."""
  objective = (objectives.Objective() if spec == objectives.CROSS_ENTROPY
               else objectives.from_spec(spec))
  alpha = jnp.full(objective.block, 0.5) if objective.alpha_over == 'previous' else None
  how = dict(chunk=chunk, over_rows=row_sharding.over_rows)

  def head(weight_vd):
    def logits(x_btd):
      return sharding.constrain(layers.linear(
          row_sharding.for_head(x_btd), weight_vd, result_dtype=jnp.float32), 'btv')
    return logits

  def loss(student_vd, student_btd, teacher_vd, teacher_btd):
    if not objective.needs_teacher:
      return chunked.supervised(objective, head(student_vd), student_btd, labels_bt, mask_bt,
                                **how).loss
    return chunked.distillation(objective, head(student_vd), student_btd, head(teacher_vd),
                                teacher_btd, mask_bt, alpha=alpha, **how).loss

  return jax.value_and_grad(loss, argnums=(0, 1))


def here(spec: str, vocab_size: int, chunk: int | None) -> dict[str, float]:
  keys = jax.random.split(jax.random.key(0), 4)
  weights = [jax.random.normal(key, (vocab_size, WIDTH)) / WIDTH ** 0.5 for key in keys[:2]]
  features = [jax.random.normal(key, (ROWS, LENGTH, WIDTH)) for key in keys[2:]]
  gradient = gradient_of(spec, chunk, jnp.ones((ROWS, LENGTH)), jnp.zeros((ROWS, LENGTH), int))
  arguments = weights[0], features[0], weights[1], features[1]
  compiled = jax.jit(gradient).lower(*arguments).compile()
  seconds = []
  for _ in range(4):
    started = time.perf_counter()
    jax.block_until_ready(compiled(*arguments))
    seconds.append(time.perf_counter() - started)
  return dict(seconds=sorted(seconds[1:])[1],
              temporary_bytes=compiled.memory_analysis().temp_size_in_bytes,
              compiler_flops=compiled.cost_analysis()['flops'],
              needed_flops=needed.flops(jax.make_jaxpr(gradient)(*arguments), 1))


def on_slice(spec: str, vocab_size: int, chunk: int | None, topology: str) -> dict[str, float]:
  mesh = sharding.make_mesh(data=1, fsdp=-1, devices=chips.devices(topology))
  rows = 8 * mesh.size
  def argument(shape, axes, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*axes)))
  arguments = [found for width in (2048, 4096) for found in (
      argument((vocab_size, width), (None, 'fsdp')), argument((rows, 1024, width), ('fsdp',)))]
  given = (argument((rows, 1024), ('fsdp',), jnp.float32),
           argument((rows, 1024), ('fsdp',), jnp.int32))

  def gradient(mask_bt, labels_bt, *arguments):
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
      return gradient_of(spec, chunk, mask_bt, labels_bt)(*arguments)

  compiled = jax.jit(gradient).lower(*given, *arguments).compile()
  cost = roofline.cost(count.operations(hlo.parse(compiled.as_text()), 1),
                       chips.CHIPS[chips.split(topology)[0]])
  return dict(topology=topology, flops=cost.flops, hbm_bytes=cost.hbm_bytes,
              wire_bytes=cost.wire_bytes, kernel_seconds=cost.kernel_seconds,
              network_seconds=cost.network_seconds,
              temporary_bytes=compiled.memory_analysis().temp_size_in_bytes)


def main(vocab_size: int = 32_768, chunk: int = 16, *topology: str) -> None:
  measure = on_slice if topology else here
  for spec in (objectives.CROSS_ENTROPY, *SPECS):
    for size in (None, int(chunk)):
      found = measure(spec, int(vocab_size), size, *topology)
      print(json.dumps(dict(objective=spec, vocab_size=int(vocab_size), chunk=size) | found),
            flush=True)


if __name__ == '__main__':
  main(*sys.argv[1:])
