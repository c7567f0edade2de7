"""Tokenizers of Hugging Face directories, with the interface of `vocabulary.Vocabulary`.

`tokenizer.json` goes through the `tokenizers` library, `tokenizer.model` and `spiece.model`
through SentencePiece. Special tokens are those of tokenizer_config.json, else of config.json.
"""

from collections.abc import Sequence
import functools
import hashlib
import json
import os
import pathlib
import re
import shutil
from typing import Any

import sentencepiece

from specdistill_jax import storage
from specdistill_jax.data import vocabulary as vocabulary_lib

JSON_FILE = 'tokenizer.json'
OWN_FILE = 'vocabulary.model'
T5_FILE = 'spiece.model'
SENTENCEPIECE_FILES = ('tokenizer.model', T5_FILE)
SETTINGS_FILE = 'tokenizer_config.json'
CONFIG_FILE = 'config.json'
SIDE_FILES = (SETTINGS_FILE, 'special_tokens_map.json', 'added_tokens.json',
              'chat_template.jinja')
T5_EXTRA_IDS = 100


def find(directory: str | os.PathLike) -> Any:
  """The tokenizer of a directory, or None where it has none."""
  directory = storage.path(directory)
  names = (JSON_FILE, OWN_FILE, *SENTENCEPIECE_FILES)
  return load(directory) if any((directory / name).is_file() for name in names) else None


def load(path: str | os.PathLike) -> Any:
  """The tokenizer in a directory, or a vocabulary file of this project.

  Raises:
    ValueError: there is none, it is damaged, or nothing says which token ends a text.
  """
  path = storage.local(path, (JSON_FILE, OWN_FILE, *SENTENCEPIECE_FILES, *SIDE_FILES,
                              CONFIG_FILE))
  if path.is_file():
    return vocabulary_lib.Vocabulary(path)
  if (path / JSON_FILE).is_file():
    return JsonTokenizer(path)
  if (path / OWN_FILE).is_file():
    return vocabulary_lib.Vocabulary(path / OWN_FILE)
  for name in SENTENCEPIECE_FILES:
    if (path / name).is_file():
      return SentencePieceTokenizer(path, name)
  raise ValueError(f'{path} has no tokenizer: neither {JSON_FILE} nor '
                   f'{" nor ".join((*SENTENCEPIECE_FILES, OWN_FILE))}')


def copy(vocabulary: Any, directory: pathlib.Path) -> None:
  """Writes a vocabulary's files to `directory`, from where `load` makes it again."""
  directory.mkdir(parents=True, exist_ok=True)
  if isinstance(vocabulary, vocabulary_lib.Vocabulary):
    shutil.copyfile(vocabulary.path, directory / OWN_FILE)
    return
  for path in vocabulary.files:
    shutil.copyfile(path, directory / path.name)
  # What config.json said of special tokens, since that stays behind.
  (directory / SETTINGS_FILE).write_text(
      json.dumps(vocabulary.settings, indent=2, ensure_ascii=False), encoding='utf-8')


class _Tokenizer:
  """What both kinds share.

  Attributes:
    path: its directory.
    files: what to copy along with a model.
    size: number of ids, added tokens included; at most the rows of the model's embedding.
    pad_id: of the config; the end token where that names none. Rows go by lengths and masks,
      never by it.
    eos_id: ends a text.
    bos_id: begins one, or None.
    prefix_ids: what every row begins with: the start token where the tokenizer adds one.
    suffix_ids: what closes a prompt: the end token where the tokenizer adds it and no start
      token, as T5's do. (Of a tokenizer that adds both, a decoder's, the end token is for
      complete texts: a prompt goes on.)
    digest: SHA-256 over ids and their tokens: equal digests mean equal vocabularies.
  """

  def __init__(self, directory: pathlib.Path, name: str, tokens: dict[str, int]):
    self.path = directory
    self.files = tuple(directory / file for file in (name, *SIDE_FILES)
                       if (directory / file).is_file())
    self._settings = _read_json(directory / SETTINGS_FILE)
    self._model_config = _read_json(directory / CONFIG_FILE)
    self._tokens = tokens
    self.size = max(tokens.values()) + 1
    listing = json.dumps(sorted((index, token) for token, index in tokens.items()))
    self.digest = hashlib.sha256(listing.encode()).hexdigest()

  def _set_special(self, **defaults: int | None) -> None:
    find_id = lambda kind: self._special(kind, defaults.get(kind))
    self.eos_id, self.bos_id = find_id('eos'), find_id('bos')
    if self.eos_id is None:
      raise ValueError(f'nothing in {self.path} says which token ends a text: name eos_token in '
                       'tokenizer_config.json')
    pad_id = find_id('pad')
    self.pad_id = self.eos_id if pad_id is None else pad_id

  @property
  def settings(self) -> dict[str, Any]:
    """tokenizer_config.json with its special tokens named, whichever file they are from."""
    names = {index: token for token, index in self._tokens.items()}
    found = dict(eos_token=self.eos_id, bos_token=self.bos_id, pad_token=self.pad_id)
    named = {name: names[index] for name, index in found.items() if index in names}
    return {**named, **{name: value for name, value in self._settings.items()
                        if value is not None or name not in named}}

  def _special(self, kind: str, default: int | None) -> int | None:
    token = self._settings.get(f'{kind}_token')
    token = token['content'] if isinstance(token, dict) else token
    if token is not None:
      if token not in self._tokens:
        raise ValueError(f'{self.path}: tokenizer_config.json names the {kind}_token {token!r}, '
                         'which the tokenizer does not have')
      return self._tokens[token]
    found = self._model_config.get(f'{kind}_token_id', default)
    found = found[0] if isinstance(found, list) else default if found is None else found
    return None if found is None or found < 0 else found  # the first llamas pad with -1

  def _checked(self, tokens: Sequence[int]) -> list[int]:
    ids = [int(token) for token in tokens]
    for token in ids:
      if not 0 <= token < self.size:
        raise ValueError(f'Token id {token} is outside the vocabulary of {self.size} ids.')
    return [token for token in ids if token not in (self.pad_id, self.eos_id)]


class JsonTokenizer(_Tokenizer):
  """A tokenizer.json."""

  def __init__(self, directory: str | os.PathLike):
    import tokenizers  # pylint: disable=g-import-not-at-top  (only those who have one need it)
    directory = pathlib.Path(directory)
    try:
      self._tokenizer = tokenizers.Tokenizer.from_file(str(directory / JSON_FILE))
    except Exception as error:  # the library raises bare Exceptions
      raise ValueError(f'{directory / JSON_FILE} is no tokenizer ({error})') from error
    self._tokenizer.no_padding()
    self._tokenizer.no_truncation()
    super().__init__(directory, JSON_FILE, self._tokenizer.get_vocab(with_added_tokens=True))
    self._set_special()
    self.prefix_ids, self.suffix_ids = self._surroundings()

  def _surroundings(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What the tokenizer puts before a text, and behind one with nothing before it."""
    wanted = self._settings.get('add_bos_token')
    whole, plain = (self._tokenizer.encode('a', add_special_tokens=added).ids
                    for added in (True, False))
    begins = bool(whole) and whole[:len(plain)] != plain
    adds = begins and whole[0] == self.bos_id if wanted is None else wanted
    if adds and self.bos_id is not None:
      return (self.bos_id,), ()
    return (), (self.eos_id,) if whole == [*plain, self.eos_id] else ()

  def encode(self, text: str) -> list[int]:
    """Token ids of `text`, without start and end tokens."""
    return self._tokenizer.encode(text, add_special_tokens=False).ids

  def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text, as `encode` gives them; uses all cores."""
    found = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
    return [encoding.ids for encoding in found]

  def decode(self, tokens: Sequence[int]) -> str:
    """Text of `tokens`; special ones have none. Raises on ids outside the size."""
    return self._tokenizer.decode(self._checked(tokens), skip_special_tokens=True)


class SentencePieceTokenizer(_Tokenizer):
  """A SentencePiece model, with the tokens that the directory adds behind it."""

  def __init__(self, directory: str | os.PathLike, name: str):
    directory = pathlib.Path(directory)
    try:
      self._processor = sentencepiece.SentencePieceProcessor(
          model_proto=(directory / name).read_bytes())
    except RuntimeError as error:
      raise ValueError(f'{directory / name} is not a SentencePiece model') from error
    pieces = {self._processor.id_to_piece(index): index
              for index in range(self._processor.get_piece_size())}
    added = _added_tokens(directory, len(pieces), is_t5=name == T5_FILE)
    super().__init__(directory, name, pieces | added)
    longest_first = sorted(added, key=len, reverse=True)
    self._added = re.compile(f"({'|'.join(map(re.escape, longest_first))})") if added else None
    own = lambda index: None if index < 0 else index
    self._set_special(eos=own(self._processor.eos_id()), bos=own(self._processor.bos_id()),
                      pad=own(self._processor.pad_id()))
    adds = self._settings.get('add_bos_token', self._processor.bos_id() >= 0)
    self.prefix_ids = (self.bos_id,) if adds and self.bos_id is not None else ()
    self.suffix_ids = (self.eos_id,) if name == T5_FILE else ()

  def encode(self, text: str) -> list[int]:
    """Token ids of `text`, without start and end tokens."""
    if self._added is None:
      return self._processor.encode(text)
    ids = []
    for index, piece in enumerate(self._added.split(text)):
      ids += [self._tokens[piece]] if index % 2 else self._processor.encode(piece)
    return ids

  def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text, as `encode` gives them."""
    if self._added is None or not any(map(self._added.search, texts)):
      return self._processor.encode(list(texts))
    return [self.encode(text) for text in texts]

  def decode(self, tokens: Sequence[int]) -> str:
    """Text of `tokens`; special and added ones have none. Raises on ids outside the size."""
    count = self._processor.get_piece_size()
    return self._processor.decode([token for token in self._checked(tokens) if token < count])


def _added_tokens(directory: pathlib.Path, count: int, is_t5: bool) -> dict[str, int]:
  """Tokens that a directory's JSON files add to a SentencePiece model, by content."""
  settings = _read_json(directory / SETTINGS_FILE)
  added = {token: index for token, index in _read_json(directory / 'added_tokens.json').items()}
  for index, token in settings.get('added_tokens_decoder', {}).items():
    added[token['content']] = int(index)
  extra = settings.get('extra_ids', T5_EXTRA_IDS if is_t5 else 0)
  for index in range(extra):  # T5 counts its sentinels down
    added.setdefault(f'<extra_id_{index}>', count + extra - 1 - index)
  return added


@functools.lru_cache(maxsize=64)
def _parse(text: str) -> Any:
  return json.loads(text)


def _read_json(path: pathlib.Path) -> dict[str, Any]:
  try:
    return _parse(path.read_text(encoding='utf-8'))
  except FileNotFoundError:
    return {}
  except ValueError as error:
    raise ValueError(f'{path} is not JSON ({error})') from error
