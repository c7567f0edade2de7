"""The vocabulary loses no text, is the same each time, and refuses sizes that do not fit."""

import random

import pytest

from specdistill_jax.data import vocabulary

TEXTS = ['def add(a, b):\n    return a + b\n',
         'The quick brown fox jumps over the lazy dog. ' * 3,
         'Numbers 0 1 2 3 4 5 6 7 8 9, and (brackets)! ' + '135 ' * 50]
HARD = ['', ' ', '   ', '\n', 'a\n\n\n  b   \n', '\tx\r\ny', ' leading', 'trailing ', 'naïve 日本語 😀',
        '<unk> </s> <pad> <0x41> <s>', '\x00\x7f', 'x\u00a0y\u2028z\ufeff', 'e\u0301 é ﬁ ½']


@pytest.fixture(scope='module')
def vocab(tmp_path_factory):
  return vocabulary.train(TEXTS, tmp_path_factory.mktemp('vocabulary') / 'v.model', 320)


@pytest.mark.parametrize('text', HARD + TEXTS)
def test_any_text_round_trips(vocab, text):
  tokens = vocab.encode(text)
  assert vocab.decode(tokens) == text
  assert all(2 < token < vocab.size for token in tokens)   # never padding, end or unknown


def test_the_one_exception_becomes_a_space(vocab):
  assert vocab.decode(vocab.encode(f'a{vocabulary.SPACE_SYMBOL}b')) == 'a b'


def test_random_unicode_round_trips(vocab):
  rng = random.Random(0)
  for _ in range(300):
    points = (rng.choice([rng.randrange(128), rng.randrange(0xd800),
                          rng.randrange(0xe000, 0x110000)])
              for _ in range(rng.randrange(12)))
    text = ''.join(map(chr, points)).replace(vocabulary.SPACE_SYMBOL, '')
    assert vocab.decode(vocab.encode(text)) == text


def test_prompt_and_completion_tokens_join(vocab):
  """Decoding is per piece, so a completion on its own is the reference, first space included."""
  prompt, completion = 'The fox\n', ' jumps over'
  assert vocab.decode(vocab.encode(prompt) + vocab.encode(completion)) == prompt + completion
  assert vocab.decode(vocab.encode(completion) + [vocab.eos_id, vocab.pad_id]) == completion


def test_training_is_deterministic_and_learns_pieces(vocab, tmp_path):
  again = vocabulary.train(TEXTS, tmp_path / 'again.model', 320)
  other = vocabulary.train(TEXTS + ['zebra zebra zebra'], tmp_path / 'other.model', 320)
  assert again.digest == vocab.digest != other.digest
  assert again.size == 320
  assert len(vocab.encode('quick brown')) < len('quick brown') - 2
  assert len(vocab.encode('135')) == 3   # digits stay single


def test_a_newline_is_a_token_of_its_own(vocab):
  """A newline is a token of its own, whatever stands around it."""
  assert vocab.encode('a\n\nb').count(vocab.encode('\n')[0]) == 2


def test_unfit_sizes_are_refused_with_the_bound(tmp_path):
  with pytest.raises(ValueError, match=r'5000 is too large .* set it to (\d+) or less') as e:
    vocabulary.train(TEXTS, tmp_path / 'v.model', 5000)
  bound = int(str(e.value).split('set it to ')[1].split()[0])
  assert vocabulary.train(TEXTS, tmp_path / 'v.model', bound).size == bound
  with pytest.raises(ValueError, match=r'vocab_size 100 is too small.* set it to more than \d+'):
    vocabulary.train(TEXTS, tmp_path / 'v.model', 100)
  with pytest.raises(ValueError, match='no text to train'):
    vocabulary.train(['', ' \n'], tmp_path / 'v.model', 300)


def test_bad_files_and_ids_are_refused(vocab, tmp_path):
  with pytest.raises(ValueError, match="Cannot read the vocabulary '.*absent.model'"):
    vocabulary.Vocabulary(tmp_path / 'absent.model')
  (tmp_path / 'text.model').write_text('not a model')
  with pytest.raises(ValueError, match='is not a SentencePiece model'):
    vocabulary.Vocabulary(tmp_path / 'text.model')
  for token in (-1, vocab.size):
    with pytest.raises(ValueError, match=f'Token id {token} is outside the vocabulary of 320'):
      vocab.decode([5, token])
