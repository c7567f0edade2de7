"""How good the generated text is: exact answers, ROUGE, BLEU, all in per cent.

The libraries do the counting; they are imported where they are used, so that whoever needs
no metric does not wait for them.
"""

from collections.abc import Callable, Sequence
import decimal
import functools
import re

Metric = Callable[[Sequence[str], Sequence[str]], float]

ANSWER_MARK = '####'
_NUMBER = re.compile(r'-?\$?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?')
# What a chain of thought ends in.
_STATED = re.compile(r'answer is:?', re.IGNORECASE)
# An option, with or without its brackets and its text.
_OPTION = re.compile(r'\(([a-z])\)')
# The sign belongs to the number unless it stands between two operands.
_LAST_NUMBER = re.compile(r'(?<![\d.,])(?:(?<!\w)-)?\$?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?')


def metric(name: str) -> Metric:
  """`metric(name)(references, predictions)`: one figure in per cent over the whole set.

  Raises:
    ValueError: on an unknown name; when called, on lists that are empty or differ in length.
  """
  if name not in METRICS:
    raise ValueError(f"There is no quality metric '{name}'; there are {', '.join(METRICS)}.")

  def checked(references: Sequence[str], predictions: Sequence[str]) -> float:
    if not references or len(references) != len(predictions):
      raise ValueError(f'{name} needs as many predictions as references, at least one; got '
                       f'{len(references)} references and {len(predictions)} predictions.')
    return METRICS[name](references, predictions)

  return checked


def accuracy(references: Sequence[str], predictions: Sequence[str]) -> float:
  """Share of predictions whose answer is the reference's."""
  hits = sum(answer(r) == answer(p) for r, p in zip(references, predictions))
  return 100.0 * hits / len(references)


def answer(text: str) -> str | decimal.Decimal:
  """The answer that `text` ends in.

  What follows the last `####` on its line, where there is one (GSM8K's form); else the last
  number; else the whole text, stripped. Numbers compare by value: `1,200` is `1200.0`.
  """
  if ANSWER_MARK in text:
    found = text.rsplit(ANSWER_MARK, 1)[1].strip().split('\n')[0].strip().rstrip('.')
    return _value(found) if _NUMBER.fullmatch(found) else found
  numbers = _LAST_NUMBER.findall(text)
  return _value(numbers[-1]) if numbers else text.strip()


def exact_answer(references: Sequence[str], predictions: Sequence[str]) -> float:
  """Share of predictions whose last stated answer is the reference, as BIG-bench-hard scores.

  Stated is what follows the last `answer is` on its line, else the last line; case, a closing
  full stop, quotation marks and the brackets of an option, `(B)`, make no difference.
  """
  hits = sum(_plain(r) == _plain(_stated(p)) for r, p in zip(references, predictions))
  return 100.0 * hits / len(references)


def _stated(text: str) -> str:
  *before, last = _STATED.split(text.strip())
  return last.strip().split('\n')[0] if before else last.split('\n')[-1]


def _plain(text: str) -> str:
  text = text.strip().rstrip('.').strip(' *"\'`').casefold()
  if option := _OPTION.match(text):
    return option[1]
  return ' '.join(text.split())


def rouge(kind: str, references: Sequence[str], predictions: Sequence[str]) -> float:
  """Mean F-measure of a ROUGE, stemmed as is usual for summaries (rouge-score)."""
  from rouge_score import rouge_scorer  # pylint: disable=g-import-not-at-top
  scorer = rouge_scorer.RougeScorer([kind], use_stemmer=True)
  scores = [scorer.score(r, p)[kind].fmeasure for r, p in zip(references, predictions)]
  return 100.0 * sum(scores) / len(scores)


def bleu(references: Sequence[str], predictions: Sequence[str]) -> float:
  """Corpus BLEU (sacrebleu, its default 13a tokenisation)."""
  import sacrebleu  # pylint: disable=g-import-not-at-top
  return float(sacrebleu.corpus_bleu(list(predictions), [list(references)]).score)


def _value(number: str) -> decimal.Decimal:
  return decimal.Decimal(number.replace(',', '').replace('$', ''))


METRICS: dict[str, Metric] = {
    'accuracy': accuracy, 'exact_answer': exact_answer,
    'rouge1': functools.partial(rouge, 'rouge1'), 'rouge2': functools.partial(rouge, 'rouge2'),
    'rougeL': functools.partial(rouge, 'rougeL'), 'bleu': bleu}
