"""What the head and each loss cost, over chunks and whole, on this machine: a JSON line each.

  PYTHONPATH=. python tests/chunked_costs.py [vocab_size] [chunk]

The gradient of the loss alone on features and head, 4 rows of 256 tokens, both models 128 wide, in
float32: temporary bytes and FLOPs by the compiler and by the trace, seconds a call (median of
three, compiled before).
"""

import json
import sys
import time

import jax
import jax.numpy as jnp

from specdistill_jax.costs import needed
from specdistill_jax.losses import chunked
from specdistill_jax.losses import objectives

ROWS, LENGTH, WIDTH = 4, 256, 128


SPECS = (*(name for name in objectives.DIVERGENCES if name != 'end_to_end_tvd'),
         'lk_hybrid,alpha_over=previous', 'lk_hybrid,alpha_over=token', 'end_to_end_tvd,block=8',
         'forward_kl,position_weights=adaptive,block=8')


def measure(spec: str, vocab_size: int, chunk: int | None) -> dict[str, float]:
  objective = (objectives.Objective() if spec == objectives.CROSS_ENTROPY
               else objectives.from_spec(spec))
  alpha = jnp.full(objective.block, 0.5) if objective.alpha_over == 'previous' else None
  keys = jax.random.split(jax.random.key(0), 4)
  weights = [jax.random.normal(key, (vocab_size, WIDTH)) / WIDTH ** 0.5 for key in keys[:2]]
  features = [jax.random.normal(key, (ROWS, LENGTH, WIDTH)) for key in keys[2:]]
  mask_bt = jnp.ones((ROWS, LENGTH))
  labels_bt = jnp.zeros((ROWS, LENGTH), int)

  def loss(student_vd, student_btd, teacher_vd, teacher_btd):
    head = lambda x_btd: x_btd @ student_vd.T
    if not objective.needs_teacher:
      return chunked.supervised(objective, head, student_btd, labels_bt, mask_bt,
                                chunk=chunk).loss
    return chunked.distillation(objective, head, student_btd, lambda x_btd: x_btd @ teacher_vd.T,
                                teacher_btd, mask_bt, chunk=chunk, alpha=alpha).loss

  arguments = weights[0], features[0], weights[1], features[1]
  gradient = jax.value_and_grad(loss, argnums=(0, 1))
  compiled = jax.jit(gradient).lower(*arguments).compile()
  seconds = []
  for _ in range(4):
    started = time.perf_counter()
    jax.block_until_ready(compiled(*arguments))
    seconds.append(time.perf_counter() - started)
  return dict(objective=spec, vocab_size=vocab_size, chunk=chunk, seconds=sorted(seconds[1:])[1],
              temporary_bytes=compiled.memory_analysis().temp_size_in_bytes,
              compiler_flops=compiled.cost_analysis()['flops'],
              needed_flops=needed.flops(jax.make_jaxpr(gradient)(*arguments), 1))


def main(vocab_size: int = 32_768, chunk: int = 16) -> None:
  for spec in (objectives.CROSS_ENTROPY, *SPECS):
    for size in (None, chunk):
      print(json.dumps(measure(spec, vocab_size, size)), flush=True)


if __name__ == '__main__':
  main(*map(int, sys.argv[1:]))
