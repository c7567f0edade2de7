"""Tasks that need no download: the text that every CPython ships, and generated arithmetic.

`stdlib_docs`: language modelling on the language reference (`pydoc_data.topics`) and on the
docstrings of the standard library. `stdlib_docstrings`: the source of a function to the first
line of its docstring. `arithmetic`: word problems, see that module. How much text there is
depends on the Python that runs; what the splits share, nothing, does not.
"""

import ast
from collections.abc import Iterable, Iterator
import os
import pathlib
from pydoc_data import topics
import re
import sysconfig
import textwrap
import warnings

from absl import logging

from specdistill_jax.data import arithmetic
from specdistill_jax.data import splits

# The quality metric of each task; None where there is nothing to compare with.
METRICS = {'stdlib_docs': None, 'stdlib_docstrings': 'rouge2', 'arithmetic': 'accuracy'}

_TEST_FOLDERS = frozenset({'test', 'tests', 'idle_test'})
_SKIPPED_FOLDERS = _TEST_FOLDERS | {'site-packages', 'dist-packages', '__pycache__'}
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
_DOCUMENTED = (ast.Module, ast.ClassDef) + _FUNCTIONS
# A paragraph as long as this, seen twice, is a copy and not a common phrase.
_COPY_CHARACTERS = 40
_SUMMARY_CHARACTERS = range(10, 201)


def examples(name: str, seed: int) -> list[splits.Example]:
  """All examples of an embedded task, before they are split. Raises on an unknown name."""
  if name == 'stdlib_docs':
    return stdlib_docs()
  if name == 'stdlib_docstrings':
    return stdlib_docstrings()
  if name == 'arithmetic':
    return arithmetic.problems(seed)
  raise ValueError(f"There is no embedded task '{name}'; there are {', '.join(METRICS)}.")


def stdlib_docs(library: pathlib.Path | None = None) -> list[splits.Example]:
  """One document for each help topic and for each module's docstrings, copies left out.

  Args:
    library: folder of the standard library's sources; None is the running Python's.
  """
  documents = [(f'topics/{topic}', text) for topic, text in topics.topics.items()]
  for name, _, tree in _modules(library):
    docstrings = [ast.get_docstring(node) for node in _definitions(tree)]
    documents.append((f'library/{name}', '\n\n'.join(filter(None, docstrings))))
  return [splits.Example(None, text, name)
          for name, text in _without_copies(documents) if text]


def stdlib_docstrings(library: pathlib.Path | None = None) -> list[splits.Example]:
  """Source of a function, docstring taken out → first line of the docstring.

  The document is the module's file. A source that occurs twice, in whatever files, is kept
  once: the copy would carry a held-out answer into training.
  """
  found = {}
  for name, source, tree in _modules(library):
    lines = source.splitlines()
    for node in _definitions(tree):
      if isinstance(node, _FUNCTIONS) and (pair := _summarised(node, lines)):
        found.setdefault(pair[0], splits.Example(*pair, f'library/{name}'))
  return list(found.values())


def _summarised(node: ast.FunctionDef | ast.AsyncFunctionDef,
                lines: list[str]) -> tuple[str, str] | None:
  """(source without docstring, first line of the docstring), None where one is no use."""
  docstring = ast.get_docstring(node)
  if not docstring or len(node.body) < 2:
    return None
  summary = docstring.strip().split('\n')[0].strip()
  statement = node.body[0]
  # Skipped: a docstring that shares its lines with code cannot be cut out by line; one that
  # starts with a call shows the signature, not a summary.
  shares_lines = statement.lineno == node.lineno or statement.end_lineno == node.body[1].lineno
  if shares_lines or len(summary) not in _SUMMARY_CHARACTERS or re.match(r'[\w.]+\(', summary):
    return None
  kept = lines[node.lineno - 1:statement.lineno - 1] + lines[statement.end_lineno:node.end_lineno]
  return textwrap.dedent('\n'.join(kept)).strip('\n'), summary


def _modules(library: pathlib.Path | None) -> Iterator[tuple[str, str, ast.Module]]:
  """(path below the library, source, syntax tree) of modules with docstrings, tests excluded."""
  library = pathlib.Path(library or sysconfig.get_path('stdlib'))
  unreadable, num_modules = [], 0
  for path in _sources(library):
    try:
      source = path.read_text(encoding='utf-8')
      # Parsing is most of the work, and tables of constants are a good part of the library.
      if '"""' not in source and "'''" not in source:
        continue
      with warnings.catch_warnings(action='ignore'):
        tree = ast.parse(source)
    except (OSError, UnicodeDecodeError, SyntaxError):
      unreadable.append(path.name)
      continue
    num_modules += 1
    yield path.relative_to(library).as_posix(), source, tree
  if unreadable:
    logging.info('Left out %d modules that cannot be parsed: %s', len(unreadable), unreadable[:5])
  if not num_modules:
    raise ValueError(f"'{library}' holds no Python sources; this Python ships without them, "
                     'so use another, or the arithmetic or local_files task.')


def _sources(library: pathlib.Path) -> list[pathlib.Path]:
  found = []
  for folder, subfolders, names in os.walk(library):
    # Pruned in place: site-packages may be a hundred times the library.
    subfolders[:] = [f for f in subfolders if f not in _SKIPPED_FOLDERS]
    found += [pathlib.Path(folder, n) for n in names
              if n.endswith('.py') and not n.startswith('test_')]
  return sorted(found)


def _definitions(node: ast.AST) -> Iterator[ast.AST]:
  """Everything below `node` that may carry a docstring, in the order of the source."""
  if isinstance(node, _DOCUMENTED):
    yield node
  for field in ('body', 'handlers', 'orelse', 'finalbody', 'cases'):
    for child in getattr(node, field, ()):
      yield from _definitions(child)


def _without_copies(documents: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str]]:
  """The documents, each paragraph kept only where it first occurs.

  The reference repeats itself: the topic on compound statements holds those on `if`, `while`
  and `try`, and one of them held out would have been read in training. Shorter documents come
  first, so that each keeps its own text and the collections lose theirs.
  """
  seen = set()
  for name, text in sorted(documents, key=lambda document: (len(document[1]), document[0])):
    kept = []
    for paragraph in re.split(r'\n[ \t]*\n', text):
      words = ' '.join(paragraph.split())
      if len(words) >= _COPY_CHARACTERS:
        if words in seen:
          continue
        seen.add(words)
      if words:
        kept.append(paragraph.strip('\n').rstrip())
    yield name, '\n\n'.join(kept)
