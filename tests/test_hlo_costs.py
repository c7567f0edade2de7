"""Counting compiled programs: trip counts put back, against counts by hand and the JAX trace."""

import re

import jax
import jax.numpy as jnp
import pytest

from specdistill_jax import sharding
from specdistill_jax.costs import ahead
from specdistill_jax.costs import chips
from specdistill_jax.costs import count
from specdistill_jax.costs import hlo
from specdistill_jax.costs import needed
from specdistill_jax.costs import roofline

SIZE = 16
PRODUCT = 2 * SIZE ** 3


def counted(function, *arguments, unknown_trips=1):
  """Operations of the compiled function, and the FLOPs of its trace."""
  shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in arguments]
  module = hlo.parse(jax.jit(function).lower(*shapes).compile().as_text())
  trace = jax.make_jaxpr(function)(*shapes)
  return count.operations(module, unknown_trips), needed.flops(trace, unknown_trips)


def flops(operations):
  return sum(o.flops * o.times for o in operations)


def scanned(weights, x):
  return jax.lax.scan(lambda x, weight: (x @ weight, None), x, weights)[0]


def nested(weights, x):
  return jax.lax.scan(lambda x, _: (scanned(weights, x), None), x, None, length=3)[0]


@pytest.mark.parametrize('function, products', [(scanned, 7), (nested, 21)])
def test_a_loop_counts_as_often_as_it_runs(function, products):
  operations, traced = counted(function, (7, SIZE, SIZE), (SIZE, SIZE))
  assert flops(operations) == traced == products * PRODUCT


def test_a_loop_that_depends_on_data_counts_as_often_as_told():
  def loop(weight, x):
    return jax.lax.while_loop(lambda x: jnp.sum(x) < 10, lambda x: x @ weight, x)
  for trips in (1, 5):
    operations, traced = counted(loop, (SIZE, SIZE), (SIZE, SIZE), unknown_trips=trips)
    assert flops(operations) == traced == trips * PRODUCT


def test_a_loop_inside_one_that_depends_on_data_counts_once():
  """As the judging of a tree in the decoding loop: how far it goes is another matter."""
  def loop(weight, x):
    grow = lambda x: jax.lax.while_loop(lambda x: jnp.sum(x) < 3, lambda x: x @ weight, x)
    return jax.lax.while_loop(lambda x: jnp.sum(x) < 10, lambda x: grow(x @ weight), x)
  for trips in (0, 5):
    operations, traced = counted(loop, (SIZE, SIZE), (SIZE, SIZE), unknown_trips=trips)
    assert flops(operations) == traced == 2 * trips * PRODUCT


def test_a_condition_counts_as_its_dearest_branch():
  def either(weight, x):
    return jax.lax.cond(jnp.sum(x) > 0, lambda: x @ weight @ weight, lambda: x @ weight)
  operations, traced = counted(either, (SIZE, SIZE), (SIZE, SIZE))
  assert flops(operations) == traced == 2 * PRODUCT


def test_what_only_a_cpu_runs_is_not_needed():
  """Layers of few rows are padded there: a TPU's steps seemed to need more than they do."""
  def padded(weight, x):
    return jax.lax.platform_dependent(weight, x, cpu=lambda w, x: x @ w @ w,
                                      default=lambda w, x: x @ w)
  assert counted(padded, (SIZE, SIZE), (SIZE, SIZE))[1] == PRODUCT


def test_what_nothing_reads_is_not_needed():
  def wasteful(weight, x):
    del weight
    unused = x @ x
    del unused
    return x @ x.T
  assert counted(wasteful, (SIZE, SIZE), (SIZE, SIZE))[1] == PRODUCT


def test_a_scan_reads_each_layer_once():
  """The stack of layers is an operand of every turn, but a turn reads its own slice."""
  layers, width = 64, 32
  operations, _ = counted(scanned, (layers, width, width), (1, width))
  stack = layers * width * width * 4
  assert stack <= sum(o.hbm_bytes * o.times for o in operations) < 4 * stack


def test_collectives_are_counted_with_their_chips():
  mesh = sharding.make_mesh(data=2, tensor=4)
  spec = lambda *axes: jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))
  x = jax.ShapeDtypeStruct((SIZE, 64), jnp.float32, sharding=spec(None, 'tensor'))
  weight = jax.ShapeDtypeStruct((64, 32), jnp.float32, sharding=spec('tensor', None))
  compiled = jax.jit(lambda x, w: x @ w, out_shardings=spec()).lower(x, weight).compile()
  joined = [o for o in count.operations(hlo.parse(compiled.as_text()), 1) if o.kind]
  assert [(o.kind, o.group) for o in joined] == [('all-reduce', 4)]
  assert joined[0].wire_bytes == 2 * 3 / 4 * SIZE * 32 * 4


@pytest.mark.parametrize('attributes, size', [
    ('replica_groups=[2,8]<=[16]', 8), ('replica_groups={{0,1,2},{3,4,5}}', 3),
    ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}", 4),
    ("replica_groups=mesh['axis_0'=2,'axis_1'=4], device_ids=([4,2]T(1,0)) {'axis_1'}", 4),
    ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1','axis_0'}", 8)])
def test_chips_of_a_collective(attributes, size):
  instruction = hlo.Instruction('x', 'all-reduce', (), (), '', f', channel_id=1, {attributes}')
  assert count.group_size(instruction) == size


# As a TPU's compiler writes a batched product of [4, 128, 64] and [4, 128, 64] over 64.
TPU_PRODUCT = """HloModule tpu

ENTRY %main (a: f32[4,128,64], b: f32[4,128,64]) -> f32[4,128,128] {
  %a = f32[4,128,64]{2,1,0:T(8,128)S(1)} parameter(0)
  %b = f32[4,128,64]{2,1,0:T(8,128)} parameter(1)
  ROOT %convolution = f32[4,128,128]{2,1,0:T(8,128)} convolution(%a, %b), window={size=4 stride=3 \
lhs_dilate=4}, dim_labels=0bf_0oi->0bf
}
"""


def test_a_product_written_as_a_convolution():
  """Batch rows stand on a dilated axis: only the pairs that meet count."""
  operation, = count.operations(hlo.parse(TPU_PRODUCT), 1)
  assert operation.flops == 2 * 4 * 128 * 128 * 64
  assert operation.hbm_bytes == 4 * (4 * 128 * 64 + 4 * 128 * 128)
  assert operation.chip_bytes == 4 * 4 * 128 * 64, 'space 1 is memory of the chip'


PREFETCHED = """HloModule prefetched

ENTRY %main (a: f32[64,128]) -> f32[16,128] {
  %a = f32[64,128]{1,0:T(8,128)} parameter(0)
  %start = ((f32[64,128]{1,0:T(8,128)}), f32[16,128]{1,0:T(8,128)S(1)}, s32[]{:S(2)}) \
slice-start(%a), slice={[0:16], [0:128]}
  ROOT %done = f32[16,128]{1,0:T(8,128)S(1)} slice-done(%start)
}
"""


def test_a_prefetched_part_of_a_weight_costs_the_part():
  """It cost the whole weight, for each of its parts: a decoding step was four times as dear."""
  operation, = count.operations(hlo.parse(PREFETCHED), 1)
  assert operation.hbm_bytes == operation.chip_bytes == 4 * 16 * 128


RESHAPED = """HloModule reshaped

%reshaped (p: f32[64,4,32]) -> f32[64,128] {
  %p = f32[64,4,32]{2,1,0} parameter(0)
  ROOT %bitcast = f32[64,128]{1,0} bitcast(%p)
}

%product (x: f32[8,64], w: f32[64,4,32]) -> f32[8,128] {
  %x = f32[8,64]{1,0:S(1)} parameter(0)
  %w = f32[64,4,32]{2,1,0} parameter(1)
  %flat = f32[64,128]{1,0} fusion(%w), kind=kLoop, calls=%reshaped
  ROOT %out = f32[8,128]{1,0:S(1)} convolution(%x, %flat), dim_labels=bf_io->bf
}

ENTRY %main (a: f32[8,64], b: f32[64,4,32]) -> f32[8,128] {
  %a = f32[8,64]{1,0:S(1)} parameter(0)
  %b = f32[64,4,32]{2,1,0} parameter(1)
  ROOT %fusion = f32[8,128]{1,0:S(1)} fusion(%a, %b), kind=kOutput, calls=%product
}
"""


def test_a_weight_that_a_fusion_reshapes_inside_is_read():
  """It was overlooked, and half of a verification step's weights with it."""
  operation, = count.operations(hlo.parse(RESHAPED), 1)
  assert operation.hbm_bytes == 4 * 64 * 128
  assert operation.flops == 2 * 8 * 64 * 128


OVERLAPPED = """HloModule overlapped

%overlapped (share: f32[8,128], whole: f32[64,128], x: f32[16,16]) -> (f32[16,16], f32[8,128], \
f32[64,128]) {
  %x = f32[16,16]{1,0} parameter(2)
  %negative = f32[16,16]{1,0} negate(%x)
  %share = f32[8,128]{1,0} parameter(0)
  %whole = f32[64,128]{1,0} parameter(1)
  %gather = f32[64,128]{1,0} all-gather(%share), channel_id=7, replica_groups=[1,8]<=[8], \
dimensions={0}
  ROOT %all = (f32[16,16]{1,0}, f32[8,128]{1,0}, f32[64,128]{1,0}) tuple(%negative, %share, %gather)
}

ENTRY %main (a: f32[8,128], b: f32[64,128], c: f32[16,16]) -> (f32[16,16], f32[8,128], \
f32[64,128]) {
  %a = f32[8,128]{1,0} parameter(0)
  %b = f32[64,128]{1,0} parameter(1)
  %c = f32[16,16]{1,0} parameter(2)
  %one = (f32[16,16]{1,0}, f32[8,128]{1,0}, f32[64,128]{1,0}) fusion(%a, %b, %c), kind=kOutput, \
calls=%overlapped
  %d = f32[16,16]{1,0} get-tuple-element(%one), index=0
  ROOT %two = (f32[16,16]{1,0}, f32[8,128]{1,0}, f32[64,128]{1,0}) fusion(%a, %b, %d), \
kind=kOutput, calls=%overlapped
}
"""


def test_a_collective_on_its_way_through_kernels_is_counted_once_and_not_as_theirs():
  """Each kernel that a gathered layer passed seemed to write all of it: three times too much."""
  operations = count.operations(hlo.parse(OVERLAPPED), 1)
  assert [o.wire_bytes for o in operations if o.kind] == [7 * 4 * 8 * 128]
  assert [o.hbm_bytes for o in operations if not o.kind] == [2 * 4 * 16 * 16] * 2


def test_a_collective_that_passes_a_loop_is_counted_once():
  """Its parts in the turns of another product's loop made a gathered layer four times as dear."""
  start, rest = OVERLAPPED.split('ENTRY')
  state = '(s32[], f32[8,128], f32[64,128], f32[16,16])'
  loop = f"""%body (p: {state}) -> {state} {{
  %p = {state} parameter(0)
  %counter = s32[] get-tuple-element(%p), index=0
  %step = s32[] constant(1)
  %next = s32[] add(%counter, %step)
  %a = f32[8,128]{{1,0}} get-tuple-element(%p), index=1
  %b = f32[64,128]{{1,0}} get-tuple-element(%p), index=2
  %c = f32[16,16]{{1,0}} get-tuple-element(%p), index=3
  %one = (f32[16,16]{{1,0}}, f32[8,128]{{1,0}}, f32[64,128]{{1,0}}) fusion(%a, %b, %c), \
kind=kOutput, calls=%overlapped
  %d = f32[16,16]{{1,0}} get-tuple-element(%one), index=0
  ROOT %q = {state} tuple(%next, %a, %b, %d)
}}

%condition (p: {state}) -> pred[] {{
  %p = {state} parameter(0)
  %now = s32[] get-tuple-element(%p), index=0
  %end = s32[] constant(4)
  ROOT %below = pred[] compare(%now, %end), direction=LT
}}

ENTRY"""
  rest = rest.replace('  ROOT %two', f"""  %zero = s32[] constant(0)
  %begin = {state} tuple(%zero, %a, %b, %d)
  %while = {state} while(%begin), condition=%condition, body=%body
  ROOT %two""")
  operations = count.operations(hlo.parse(start + loop + rest), 1)
  assert [o.wire_bytes * o.times for o in operations if o.kind] == [7 * 4 * 8 * 128]
  assert sum(o.times for o in operations if o.hbm_bytes == 2 * 4 * 16 * 16) == 6


def test_a_loop_of_a_tpu_states_no_trip_count_but_its_condition_does():
  """Written as the TPU compiler leaves it: a counter from a constant, below a constant."""
  text = jax.jit(scanned).lower(*[jax.ShapeDtypeStruct(s, jnp.float32) for s in (
      (7, SIZE, SIZE), (SIZE, SIZE))]).compile().as_text()
  bare = re.sub(r'"known_trip_count":\{"n":"\d+"\},?', '', text)
  assert bare != text
  assert flops(count.operations(hlo.parse(bare), 1)) == 7 * PRODUCT


TWO_TURNS_IN_ONE = """HloModule unrolled

%body (p: (s32[], f32[16,16])) -> (s32[], f32[16,16]) {
  %p = (s32[], f32[16,16]{1,0}) parameter(0)
  %counter = s32[] get-tuple-element(%p), index=0
  %two = s32[] constant(2)
  %next = s32[] add(%counter, %two)
  %x = f32[16,16]{1,0} get-tuple-element(%p), index=1
  %once = f32[16,16]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %both = (s32[], f32[16,16]{1,0}) tuple(%next, %once)
}

%condition (q: (s32[], f32[16,16])) -> pred[] {
  %q = (s32[], f32[16,16]{1,0}) parameter(0)
  %now = s32[] get-tuple-element(%q), index=0
  %end = s32[] constant(8)
  ROOT %below = pred[] compare(%now, %end), direction=LT
}

ENTRY %main (x0: f32[16,16]) -> f32[16,16] {
  %x0 = f32[16,16]{1,0} parameter(0)
  %one = s32[] constant(1)
  %start = (s32[], f32[16,16]{1,0}) tuple(%one, %x0)
  %loop = (s32[], f32[16,16]{1,0}) while(%start), condition=%condition, body=%body
  ROOT %result = f32[16,16]{1,0} get-tuple-element(%loop), index=1
}
"""


def test_a_counter_may_start_later_and_go_up_by_two():
  """A collective matrix product is such a loop; counted by ones it was twice as dear."""
  assert flops(count.operations(hlo.parse(TWO_TURNS_IN_ONE), 1)) == 4 * PRODUCT  # 1, 3, 5, 7


def test_roofline_takes_the_longer_of_products_and_bytes():
  chip = chips.Chip(flops=100.0, hbm_gib=1, hbm_bandwidth=10.0, link_bandwidth=1.0)
  operations = [count.Operation('', 200.0, 10.0, 0.0, 0.0, 1, 3, ''),   # 2 s of products
                count.Operation('', 0.0, 40.0, 0.0, 0.0, 1, 1, ''),     # 4 s of bytes
                count.Operation('', 0.0, 0.0, 220.0, 0.0, 1, 1, ''),    # 1 s on the chip
                count.Operation('all-gather', 0.0, 0.0, 0.0, 8.0, 4, 2, '')]
  cost = roofline.cost(operations, chip)
  assert (cost.kernel_seconds, cost.network_seconds) == (11.0, 8.0)
  assert (cost.seconds, cost.bound) == (11.0, 'kernels')
  assert cost.collectives == (dict(kind='all-gather', chips=4, times=2.0, wire_bytes=16.0,
                                   seconds=8.0),)


def test_block_efficiency_is_the_sum_of_powers():
  assert roofline.block_efficiency(0.5, 3) == 1 + 0.5 + 0.25 + 0.125
  assert roofline.block_efficiency(1, 3) == 4


@pytest.mark.parametrize('message, needs', [
    ('RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 28.50G of 15.75G hbm. '
     'Exceeded hbm capacity by 12.75G.', 28.5),
    ('RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO '
     'temporaries (48.00G) exceeds available HBM (15.75G).', 48)])
def test_a_refusal_says_what_is_needed_and_what_is_there(message, needs):
  assert ahead.out_of_memory(message) == (needs * 2 ** 30, 15.75 * 2 ** 30)
  with pytest.raises(RuntimeError, match='another reason'):
    ahead.out_of_memory('INTERNAL: another reason')
