"""Reads the text of an optimised HLO module: computations, instructions, shapes, loops.

The compiler's own cost analysis counts the body of a loop once, so everything here exists to put
trip counts back. Only what counting needs is read.
"""

from collections.abc import Iterator
import dataclasses
import math
import re

_BITS = dict(pred=8, s4=4, u4=4, s8=8, u8=8, bf16=16, f16=16, s16=16, u16=16, f32=32, s32=32,
             u32=32, f64=64, s64=64, u64=64, c64=64, f8e4m3fn=8, f8e5m2=8)
_ARRAY = re.compile(r'([a-z]\w*)\[([\d,<=]*)\](\{[^{}]*\})?')
_HEADER = re.compile(r'^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$')
_INSTRUCTION = re.compile(r'^\s+(ROOT )?%?([\w.\-]+) = (.*)$')
_NAME = re.compile(r'%([\w.\-]+)')


@dataclasses.dataclass(frozen=True)
class Array:
  """One array of a type. `in_hbm` is False for what the compiler keeps in on-chip memory."""
  dtype: str
  dims: tuple[int, ...]
  in_hbm: bool = True

  @property
  def size(self) -> int:
    return math.prod(self.dims)

  @property
  def bytes(self) -> int:
    return self.size * _BITS.get(self.dtype, 0) // 8

  @property
  def hbm_bytes(self) -> int:
    return self.bytes if self.in_hbm else 0

  @property
  def chip_bytes(self) -> int:
    return 0 if self.in_hbm else self.bytes


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line. `arrays` are those of its type, a tuple's flattened."""
  name: str
  opcode: str
  arrays: tuple[Array, ...]
  operands: tuple[str, ...]
  literal: str
  attributes: str

  @property
  def bytes(self) -> int:
    return sum(array.bytes for array in self.arrays)

  def attribute(self, name: str) -> str | None:
    """The value of `name=...`: in braces, or up to the next comma."""
    found = re.search(rf'\b{name}=(\{{[^{{}}]*\}}|[^,\s]+)', self.attributes)
    return found and found.group(1)

  def called(self, name: str) -> list[str]:
    """Computations named by attribute `name`, without their percent signs."""
    return _NAME.findall(self.attribute(name) or '')

  @property
  def op_name(self) -> str:
    """Where it comes from in the JAX program; '' where the compiler does not say."""
    found = re.search(r'op_name="([^"]*)"', self.attributes)
    return found.group(1) if found else ''


@dataclasses.dataclass
class Computation:
  """Instructions by name, in their order; the last one is the root."""
  name: str
  instructions: dict[str, Instruction]

  @property
  def root(self) -> Instruction:
    return next(reversed(self.instructions.values()))

  def operand(self, instruction: Instruction, index: int) -> Instruction:
    return self.instructions[instruction.operands[index]]

  def users(self, name: str) -> Iterator[Instruction]:
    return (i for i in self.instructions.values() if name in i.operands)

  def parameter(self, index: int) -> Instruction | None:
    return next((i for i in self.instructions.values()
                 if i.opcode == 'parameter' and i.literal == str(index)), None)


@dataclasses.dataclass
class Module:
  """Computations by name, and the name of the one that runs."""
  computations: dict[str, Computation]
  entry: str


def parse(text: str) -> Module:
  """The module that `compiled.as_text()` shows.

  Raises:
    ValueError: no entry computation was found.
  """
  computations, entry, current = {}, None, None
  for line in text.splitlines():
    if header := _HEADER.match(line):
      current = computations[header.group(2)] = Computation(header.group(2), {})
      entry = header.group(2) if header.group(1) else entry
    elif current is not None and (found := _INSTRUCTION.match(line)):
      instruction = _instruction(found.group(2), found.group(3))
      current.instructions[instruction.name] = instruction
  if entry is None:
    raise ValueError('the text has no ENTRY computation; it must be an HLO module')
  return Module(computations, entry)


def _instruction(name: str, rest: str) -> Instruction:
  end = _closing(rest, 0) + 1 if rest.startswith('(') else rest.index(' ')
  opening = rest.index('(', end)
  closing = _closing(rest, opening)
  inside = rest[opening + 1:closing]
  return Instruction(
      name=name, opcode=rest[end:opening].strip(), arrays=_arrays(rest[:end]),
      operands=tuple(_NAME.findall(inside)), literal=inside.strip(),
      attributes=rest[closing + 1:])


def _closing(text: str, opening: int) -> int:
  depth = 0
  for index in range(opening, len(text)):
    depth += (text[index] == '(') - (text[index] == ')')
    if depth == 0:
      return index
  raise ValueError(f'unbalanced parentheses in {text[:80]!r}')


def _arrays(text: str) -> tuple[Array, ...]:
  def array(found):
    dtype, dims, layout = found.groups()
    space = re.search(r'S\((\d+)\)', layout or '')
    sizes = tuple(int(re.sub(r'\D', '', size)) for size in dims.split(',') if size)
    return Array(dtype, sizes, in_hbm=space is None or space.group(1) == '0')
  return tuple(map(array, _ARRAY.finditer(text)))


def trip_count(module: Module, computation: Computation, loop: Instruction) -> int | None:
  """How often a `while` runs; None where that depends on its data.

  The compiler says so itself, or the condition is `counter < constant`, as of every scan; the
  counter starts at a constant too, and goes up by another.
  """
  if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes):
    return int(known.group(1))
  condition = module.computations[loop.called('condition')[0]]
  root = condition.root
  inside = condition
  if root.opcode == 'fusion':
    inside = module.computations[root.called('calls')[0]]
    root = inside.root
  if root.opcode != 'compare' or root.attribute('direction') not in ('LT', 'GT'):
    return None
  constants = [int(i.literal) for i in (*condition.instructions.values(),
                                        *inside.instructions.values())
               if i.opcode == 'constant' and re.fullmatch(r'-?\d+', i.literal)]
  read = next((i for i in condition.instructions.values()
               if i.opcode == 'get-tuple-element'), None)
  if len(set(constants)) != 1 or read is None:
    return None
  index = int(read.attribute('index'))
  body = module.computations[loop.called('body')[0]]
  distance = constants[0] - _first_value(computation, loop, index)
  return max(math.ceil(distance / _stride(module, body, index)), 0)


def _first_value(computation: Computation, loop: Instruction, index: int) -> int:
  """What the counter, element `index` of the loop's tuple, starts at; 0 where it is not said."""
  start = computation.instructions[loop.operands[0]]
  if start.opcode != 'tuple':
    return 0
  return _constant(computation, computation.operand(start, index)) or 0


def _stride(module: Module, body: Computation, index: int) -> int:
  """What a turn adds to the counter: 2 where the compiler has put two turns into one."""
  value = body.root
  if value.opcode == 'tuple':
    value = _through_copies(body, body.operand(value, index))
  inside = body
  if value.opcode == 'fusion':
    inside = module.computations[value.called('calls')[0]]
    value = inside.root
  if value.opcode != 'add':
    return 1
  added = []
  for name in value.operands:
    operand = inside.instructions[name]
    if operand.opcode == 'parameter' and inside is not body:
      fusion = _through_copies(body, body.operand(body.root, index))
      operand = body.operand(fusion, int(operand.literal))
    added.append(_constant(inside, operand))
  return next((number for number in added if number), 1)


def _through_copies(computation: Computation, value: Instruction) -> Instruction:
  while value.opcode in ('copy', 'bitcast'):
    value = computation.operand(value, 0)
  return value


def _constant(computation: Computation, value: Instruction) -> int | None:
  if value.opcode in ('copy', 'bitcast') and value.operands[0] in computation.instructions:
    value = _through_copies(computation, value)
  is_number = value.opcode == 'constant' and re.fullmatch(r'-?\d+', value.literal)
  return int(value.literal) if is_number else None
