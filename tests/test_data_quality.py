"""The quality metrics against values worked out by hand."""

import pytest

from specdistill_jax.data import quality


@pytest.mark.parametrize('reference, prediction, right', [
    ('2 + 2 = 4\n#### 4', 'so it is\n#### 4', True),
    ('#### 4', '#### 5', False),
    ('#### 1,200', 'She pays $1200.00', True),
    ('#### 3', '#### 7\n#### 3', True),        # the last mark counts
    ('#### 3', '#### 3\nand 9 more words', True),   # and only its line
    ('#### 3', '3 apples, then 9', False),     # no mark: the last number
    ('#### -3', 'it is -3.', True),
    ('#### 3', '5-3', True),                   # a minus between operands is no sign
    ('#### 3', 'x-3', True),
    ('Paris', '  Paris\n', True),              # no number: the whole text
    ('Paris', 'paris', False),
    ('#### 4', '', False),
    ('#### 4', 'the answer is ####', False),
])
def test_accuracy_compares_final_answers(reference, prediction, right):
  assert quality.metric('accuracy')([reference], [prediction]) == 100.0 * right


def test_accuracy_is_a_share_in_per_cent():
  assert quality.metric('accuracy')(['1', '2', '3', '4'], ['1', '2', '0', '0']) == 50.0


def test_rouge2_by_hand():
  """One of two bigrams of the reference, one of three of the prediction: F = 2/5."""
  value = quality.metric('rouge2')(['red green blue'], ['red green old car'])
  assert value == pytest.approx(100 * 2 * (1 / 2) * (1 / 3) / (1 / 2 + 1 / 3))
  assert quality.metric('rouge2')(['a b c', 'd e f'], ['a b c', 'x y z']) == pytest.approx(50.0)


def test_bleu_counts_over_the_corpus():
  """Two of the four n-gram orders' counts pooled: exact match is 100, word salad is not."""
  references = ['the cat sat on the mat', 'a dog ran over the hill']
  assert quality.metric('bleu')(references, references) == pytest.approx(100.0)
  # Pooled precisions 11/12, 9/10, 7/8, 5/6, equal lengths.
  wrong = ['the cat sat on the mat', 'a dog ran over the hall']
  expected = 100 * (11 / 12 * 9 / 10 * 7 / 8 * 5 / 6) ** 0.25
  assert quality.metric('bleu')(references, wrong) == pytest.approx(expected, rel=1e-6)


def test_bad_calls_are_refused():
  with pytest.raises(ValueError, match="metric 'rouge'; there are accuracy, exact_answer"):
    quality.metric('rouge')
  with pytest.raises(ValueError, match='2 references and 1 predictions'):
    quality.metric('accuracy')(['1', '2'], ['1'])
  with pytest.raises(ValueError, match='at least one'):
    quality.metric('bleu')([], [])
