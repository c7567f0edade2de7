"""The embedded tasks: what they hold, and that their splits share nothing."""

import re

import pytest

from specdistill_jax.data import arithmetic
from specdistill_jax.data import embedded
from specdistill_jax.data import splits

MODULE = '''"""The module's own long docstring, well over forty characters."""

class Shape:
  """A shape, described at a length of well over forty characters."""

  def area(self, scale=1):
    """Returns the area of the shape.

    In square units, for what it is worth.
    """
    inner = 2  # kept
    return scale * inner

if True:
  async def fetch(url):
    """Fetches a page from somewhere."""
    return url

def one_line(): """Shares its line with the definition."""; return 1
def no_body():
  """A function that has nothing but a docstring."""
def signature(a):
  """signature(a) -> the same"""
  return a
'''


@pytest.fixture
def library(tmp_path):
  def put(name, text):
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
  put('shapes.py', MODULE)
  put('package/copy_of_shapes.py', MODULE)
  for hidden in ('test/a.py', 'package/tests/a.py', 'site-packages/a.py', 'test_top.py'):
    put(hidden, MODULE.replace('shape', 'hidden'))
  put('broken.py', '"""Unparsable."""\ndef (')
  return tmp_path


def test_docstring_pairs(library):
  found = embedded.stdlib_docstrings(library)
  assert {e.targets for e in found} == {
      'Returns the area of the shape.', 'Fetches a page from somewhere.'}
  area = next(e for e in found if 'area' in e.inputs)
  assert area.inputs == ('def area(self, scale=1):\n  inner = 2  # kept\n'
                         '  return scale * inner')


def test_copied_functions_are_kept_once(library):
  """The two files are identical: one of them held out would be known from the other."""
  found = embedded.stdlib_docstrings(library)
  assert len({e.inputs for e in found}) == len(found)
  assert {e.document for e in found} == {'library/package/copy_of_shapes.py'}


def test_docs_hold_topics_and_docstrings_but_no_tests(library):
  found = embedded.stdlib_docs(library)
  names = [e.document for e in found]
  assert len(set(names)) == len(names)
  assert {'topics/while', 'library/package/copy_of_shapes.py'} <= set(names)
  text = '\n'.join(e.targets for e in found)
  assert 'A shape, described' in text and 'A hidden, described' not in text
  assert all(e.inputs is None for e in found)


def test_no_long_paragraph_stands_in_two_documents(library):
  """Python's topic on compound statements repeats those on if, while, for and try."""
  owners = {}
  for example in embedded.stdlib_docs(library):
    for paragraph in re.split(r'\n[ \t]*\n', example.targets):
      words = ' '.join(paragraph.split())
      if len(words) >= 40:
        assert owners.setdefault(words, example.document) == example.document
  assert len(owners) > 500


def test_a_python_without_sources_is_refused(tmp_path):
  with pytest.raises(ValueError, match='holds no Python sources'):
    embedded.stdlib_docs(tmp_path)
  with pytest.raises(ValueError, match="no embedded task 'gsm8k'; there are stdlib_docs"):
    embedded.examples('gsm8k', 0)


def test_arithmetic_solutions_are_right():
  """Each line's sum holds, uses what is known by then, and the last result is the answer."""
  for example in arithmetic.problems(seed=1, num_problems=2000):
    *lines, last = example.targets.split('\n')
    known = {int(n) for n in re.findall(r'\d+', example.inputs)}
    assert lines
    for line in lines:
      a, operator, b, result = re.fullmatch(r'(\d+) ([-+*/]) (\d+) = (\d+)', line).groups()
      a, b, result = int(a), int(b), int(result)
      value = {'+': a + b, '-': a - b, '*': a * b, '/': a / b}[operator]
      assert value == result and {a, b} <= known, (example, line)
      known.add(result)
    assert last == f'#### {result}'


def test_arithmetic_is_deterministic_varied_and_without_doubles():
  first = arithmetic.problems(seed=0, num_problems=3000)
  assert first == arithmetic.problems(seed=0, num_problems=3000)
  assert first != arithmetic.problems(seed=1, num_problems=3000)
  assert len({e.inputs for e in first}) == 3000
  assert len({re.sub(r'\d+|[A-Z]\w+', '_', e.inputs) for e in first}) > 500


def test_splits_share_no_document_and_lose_none():
  examples = [splits.Example(None, f'{d} {i}', f'd{d}') for d in range(40) for i in range(3)]
  train, validation = splits.split(examples, 0.1, seed=0)
  assert sorted(train + validation) == sorted(examples)
  held_out = {e.document for e in validation}
  assert len(held_out) == 4 and not held_out & {e.document for e in train}
  assert splits.split(examples, 0.1, seed=0) == (train, validation)
  assert splits.split(examples, 0.1, seed=1) != (train, validation)


def test_a_split_that_leaves_nothing_is_refused():
  one = [splits.Example(None, 'text', 'd')] * 5
  with pytest.raises(ValueError, match='training split is empty: 1 document'):
    splits.split(one, 0.5, seed=0)
  for fraction in (0.0, 1.0, -1.0):
    with pytest.raises(ValueError, match=f'validation_fraction is {fraction}'):
      splits.split(one, fraction, seed=0)


def test_repeated_prompts_leave_the_training_split():
  pair = lambda inputs, targets: splits.Example(inputs, targets, f'{inputs}{targets}')
  train = [pair('a  b', 'x'), pair('c', 'y'), splits.Example(None, 'e f', 'd')]
  validation = [pair('a b', 'z'), splits.Example(None, 'e\nf', 'd2')]
  assert splits.without_leaks(train, validation) == [pair('c', 'y')]
