"""The questions of a study, answered in sentences from its summaries, favourable or not."""

from collections.abc import Mapping, Sequence

from specdistill_jax.evaluation import advisor
from specdistill_jax.evaluation import frontier
from specdistill_jax.evaluation import intervals
from specdistill_jax.evaluation import summary as summary_lib

Summaries = Sequence[summary_lib.Summary]

_FAR = 0.25  # a mean distance from the clock at which a prediction chooses nothing


def _range(interval: intervals.Interval | None, scale: float = 1.0, sign: str = '') -> str:
  if interval is None:
    return ''
  low, high = (scale * value for value in interval)
  return f' [{low:{sign}.2f}, {high:{sign}.2f}]'


def _told(sentences: Sequence[str], after: str = '') -> str:
  """One or two in a line, more as a list; then what is true of all."""
  if len(sentences) <= 2:
    return ' '.join((*sentences, *([after] if after else ())))
  lines = '\n'.join(f'- {sentence}' for sentence in sentences)
  return '\n\n'.join(('', lines, *([after] if after else ())))


def _at(summary: summary_lib.Summary) -> str:
  return f'temperature {summary.temperature:g}'


def _find(summaries: Summaries, like: summary_lib.Summary,
          method: str) -> summary_lib.Summary | None:
  return next((s for s in summaries if s.method == method and s.gamma == like.gamma
               and s.temperature == like.temperature), None)


def _middle_gamma(summaries: Summaries) -> int:
  """The draft length that sentences speak of: 5 if it was measured, as in the papers."""
  gammas = sorted({s.gamma for s in summaries})
  return 5 if 5 in gammas else gammas[len(gammas) // 2]


def _verdict(value: float, interval: intervals.Interval | None, neutral: float) -> str:
  """Whether an interval lies on one side of what no change would give."""
  if interval is None:
    return ''
  if interval[0] <= neutral <= interval[1]:
    return ', which is not distinguishable from no change'
  return '' if value > neutral else ', a loss'


def _distillation(summaries: Summaries, samples: int) -> str:
  """What distillation bought, against standard SD and against the control."""
  gamma = _middle_gamma(summaries)
  sentences = []
  for one in summaries:
    other = _find(summaries, one, summary_lib.STANDARD)
    if not one.is_distilled or one.gamma != gamma or other is None:
      continue
    alpha, alpha_range = summary_lib.gain_in_alpha(one, other, samples=samples)
    tau, tau_range = summary_lib.gain_in_block_efficiency(one, other, samples=samples)
    speed, speed_range = summary_lib.gain_in_speed(one, other, samples=samples)
    sentence = (
        f'Against standard SD at {_at(one)} and γ = {gamma}, {one.method} moved α from '
        f'{other.alpha:.2f} to {one.alpha:.2f} ({alpha:+.2f}{_range(alpha_range, sign="+")}), '
        'block efficiency from '
        f'{other.block_efficiency:.2f} to {one.block_efficiency:.2f} ({tau:.2f}x'
        f'{_range(tau_range)}{_verdict(tau, tau_range, 1.0)}), and decodes at '
        f'{speed:.2f}x{_range(speed_range)} its speed{_verdict(speed, speed_range, 1.0)}')
    control = _find(summaries, one, summary_lib.CONTROL)
    if control is not None:
      gain, gain_range = summary_lib.gain_in_block_efficiency(one, control, samples=samples)
      sentence += (f'; against the control its block efficiency is {gain:.2f}x'
                   f'{_range(gain_range)}{_verdict(gain, gain_range, 1.0)}')
    sentences.append(sentence + '.')
  if sentences:
    return _told(sentences)
  if any(one.is_distilled for one in summaries):
    return 'The draft was distilled from scratch: there is no earlier one to compare with.'
  return 'Nothing was distilled in this study.'


def _best(summaries: Summaries, temperature: float) -> summary_lib.Summary:
  """The fastest setting of the distilled draft, or of any if none was distilled."""
  chosen = [s for s in summaries if s.temperature == temperature]
  chosen = [s for s in chosen if s.is_distilled] or chosen
  return max(chosen, key=lambda s: s.speedup_measured)


def _faster(summaries: Summaries) -> str:
  """Whether decoding is faster than the target alone, by the clock."""
  sentences = []
  for temperature in sorted({s.temperature for s in summaries}):
    best = _best(summaries, temperature)
    interval = best.speedup_measured_interval  # None of a single batch, which shows no spread
    if best.speedup_measured <= 1.0:
      answer = 'no, it is slower'
    elif interval is None or interval[0] <= 1.0:
      answer = 'not clearly'
    else:
      answer = 'yes'
    several = len({s.gamma for s in summaries if s.method == best.method}) > 1
    sentences.append(
        f'At temperature {temperature:g}: {answer}; {best.method} at {"its best " * several}'
        f'γ = {best.gamma} runs at {best.speedup_measured:.2f}x{_range(interval)} the speed of '
        f'the target alone ({best.tokens_per_second:.0f} against '
        f'{best.autoregressive_tokens_per_second:.0f} tokens/s).')
  return ' '.join(sentences)


def _distance(s: summary_lib.Summary) -> float:
  """How much faster than predicted it was, as a share."""
  return s.speedup_measured / s.speedup_predicted - 1.0


def _mean_distance(summaries: Summaries) -> float:
  return sum(abs(_distance(s)) for s in summaries) / len(summaries)


def _prediction(summaries: Summaries) -> str:
  """How far the clock and the formula are apart, and what the formula was fed."""
  s = max(summaries, key=lambda one: abs(_distance(one)))
  gamma = _middle_gamma(summaries)
  costs = [f'c = {s.cost_ratio:.2f} and v = {s.verify_ratio:.2f} at {_at(s)}'
           for s in summaries if s.gamma == gamma and s.method == summaries[0].method]
  mean = _mean_distance(summaries)
  doubt = (' That is too far to choose by: steps of so small a model, or on so busy a machine, say '
           'little about whole cycles.') if mean > _FAR else ''
  return (f'Measured speed-ups lie on average {100 * mean:.0f} % from the predicted ones, at most '
          f'{100 * _distance(s):+.0f} % ({s.method}, {_at(s)}, γ = {s.gamma}).{doubt} '
          f'For γ = {gamma}, {"; ".join(costs)}.')


def _groups(summaries: Summaries):
  """Summaries by temperature and method, of one way each."""
  groups: dict[tuple[float, str], list[summary_lib.Summary]] = {}
  for s in summaries:
    groups.setdefault((s.temperature, s.method), []).append(s)
  return groups.values()


def _advice(points: Sequence[advisor.Point], clock: Mapping[int, float], is_far: bool) -> str:
  """The best draft length: by the clock of those that were run, and as predicted of all."""
  fastest = max(clock, key=clock.get)
  if len(clock) == 1:
    ran = f'only γ = {fastest} was run'
  elif clock[fastest] <= 1.0:
    ran = 'by the clock the target alone is fastest'
  else:
    ran = f'by the clock γ = {fastest} is best'
  if is_far:
    return ran
  best = advisor.best(points)
  told = 'the target alone is' if best is None else f'γ = {best.gamma} is'
  return f'{ran}, {told} predicted to be best'


def _draft_length(summaries: Summaries) -> str:
  """The best draft length of every method, and the curve that is predicted over them."""
  is_far = _mean_distance(summaries) > _FAR
  summaries = [s for s in summaries if not s.min_confidence]
  if not summaries:
    return 'Drafts that stop by their confidence have no curve over lengths.'
  sentences = []
  for group in _groups(summaries):
    longest = max(group, key=lambda s: s.gamma)
    points = advisor.curve(longest.acceptance_by_position, longest.cost_ratio,
                           {s.gamma: s.verify_ratio for s in group})
    clock = {s.gamma: s.speedup_measured for s in group}
    curve = '; '.join(
        f'{point.speedup:.2f}x at {point.gamma}'
        + (f', {clock[point.gamma]:.2f}x by the clock' if point.verify_measured else '*')
        for point in points)
    sentences.append(
        f'{longest.method} at {_at(longest)}: {_advice(points, clock, is_far)} ({curve}).')
  doubt = ' Predictions are too far from the clock here to choose a length by.' if is_far else ''
  return _told(sentences, 'Speed-ups predicted from the acceptance by position of the longest '
               'draft, beside what was measured; a star marks lengths that were not run, where v '
               'is interpolated between those that were. They differ a little from the '
               'predictions in the table, which are made from the block efficiency of each '
               f'length, whose last block the end of a row cuts.{doubt}')


def _other_ways(summaries: Summaries, headline: Summaries, samples: int) -> list[str]:
  """The other lossless ways against the headline's: τ and speed; nothing if there are none."""
  gamma = _middle_gamma(headline)
  sentences = []
  for s in summaries:
    plain = _find(headline, s, s.method)
    if s.is_tree or not s.lossless or s.gamma != gamma or s.way == plain.way:
      continue
    tau, tau_range = summary_lib.gain_in_block_efficiency(s, plain, samples=samples)
    speed, speed_range = summary_lib.gain_in_speed(s, plain, samples=samples)
    sentences.append(
        f'{s.method}, {s.way}, at {_at(s)} and γ = {gamma}: block efficiency {tau:.2f}x'
        f'{_range(tau_range)} and speed {speed:.2f}x{_range(speed_range)} those of {plain.way}.')
  return [f'**What do other lossless ways buy?** {_told(sentences)}'] if sentences else []


def _trees(summaries: Summaries, headline: Summaries, samples: int) -> list[str]:
  """Each lossless tree against the fastest chain of its method; nothing if there are none."""
  sentences = []
  for s in summaries:
    if not s.is_tree or not s.lossless:
      continue
    chain = max((c for c in headline if (c.method, c.temperature) == (s.method, s.temperature)),
                key=lambda c: c.speedup_measured)
    tau, tau_range = summary_lib.gain_in_block_efficiency(s, chain, samples=samples)
    speed, speed_range = summary_lib.gain_in_speed(s, chain, samples=samples)
    sentences.append(
        f'{s.method}, {s.way}, at {_at(s)}: {s.drafted_per_call:.0f} nodes in {s.gamma} levels '
        f'have {tau:.2f}x{_range(tau_range)} the block efficiency and {speed:.2f}x'
        f'{_range(speed_range)} the speed of its fastest chain, γ = {chain.gamma} '
        f'(v = {s.verify_ratio:.2f} against {chain.verify_ratio:.2f}).')
  return [f'**What do trees buy?** {_told(sentences)}'] if sentences else []


def _tradeoff(summaries: Summaries, max_quality_drop: float | None) -> list[str]:
  """What nothing beats in speed and quality, and the fastest within the quality budget."""
  if all(s.lossless for s in summaries) and max_quality_drop is None:
    return []
  if any(s.quality is None for s in summaries):
    return ['**What does leniency buy?** The task has no metric, so that what lossy settings '
            'cost in quality was not measured.']
  sentences = []
  for temperature in sorted({s.temperature for s in summaries}):
    chosen = [s for s in summaries if s.temperature == temperature]
    place = lambda s: (f'{s.method}, {s.way}, γ = {s.gamma} ({s.speedup_measured:.2f}x, '
                       f'{s.quality_metric} {s.quality:.1f})')
    best = '; '.join(map(place, frontier.undominated(chosen))) or 'none but the target alone'
    sentences.append(f'At temperature {temperature:g}, where the target has '
                     f'{chosen[0].target_quality:.1f}, nothing beats in both: {best}.')
    if max_quality_drop is not None:
      found = frontier.fastest_within(chosen, max_quality_drop)
      answer = 'the target alone, since nothing is faster' if found is None else place(found)
      sentences.append(f'Fastest within {100 * max_quality_drop:g} % of the target\'s quality: '
                       f'{answer}.')
  return [f'**What does leniency buy?** {" ".join(sentences)} Qualities are single figures over '
          'the prompts; small differences are chance.']


def write(summaries: Summaries, *, samples: int,
          max_quality_drop: float | None = None) -> list[str]:
  """A paragraph for each question, in Markdown.

  Args:
    summaries: all of a study; methods are compared in its headline way.
    samples: of the bootstrap.
    max_quality_drop: quality that may be spent on speed, as a share of the target's.
  """
  headline = summary_lib.headline(summaries)
  return [
      f'**What did distillation buy?** {_distillation(headline, samples)}',
      f'**Is decoding really faster than the target alone?** {_faster(headline)}',
      f'**Does the prediction hold?** {_prediction(headline)}',
      f'**Which draft length is best?** {_draft_length(headline)}',
      *_other_ways(summaries, headline, samples),
      *_trees(summaries, headline, samples),
      *_tradeoff(summaries, max_quality_drop),
  ]
