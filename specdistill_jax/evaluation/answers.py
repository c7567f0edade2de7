"""The questions of a study, answered in sentences from its summaries, favourable or not."""

from collections.abc import Sequence

from specdistill_jax.evaluation import intervals
from specdistill_jax.evaluation import summary as summary_lib

Summaries = Sequence[summary_lib.Summary]


def _range(interval: intervals.Interval | None, scale: float = 1.0, sign: str = '') -> str:
  if interval is None:
    return ''
  low, high = (scale * value for value in interval)
  return f' [{low:{sign}.2f}, {high:{sign}.2f}]'


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
  if not sentences:
    return 'Nothing was distilled in this study.'
  return ' '.join(sentences)


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
    low = best.speedup_measured_interval and best.speedup_measured_interval[0]
    if best.speedup_measured <= 1.0:
      answer = 'no, it is slower'
    elif low is not None and low <= 1.0:
      answer = 'not clearly'
    else:
      answer = 'yes'
    sentences.append(
        f'At temperature {temperature:g}: {answer}; {best.method} at its best γ = {best.gamma} '
        f'runs at {best.speedup_measured:.2f}x{_range(best.speedup_measured_interval)} the '
        f'speed of the target alone ({best.tokens_per_second:.0f} against '
        f'{best.autoregressive_tokens_per_second:.0f} tokens/s).')
  return ' '.join(sentences)


def _prediction(summaries: Summaries) -> str:
  """How far the clock and the formula are apart, and what the formula was fed."""
  off = [s.speedup_measured / s.speedup_predicted - 1.0 for s in summaries]
  worst = max(range(len(off)), key=lambda index: abs(off[index]))
  s = summaries[worst]
  gamma = _middle_gamma(summaries)
  costs = [f'c = {s.cost_ratio:.2f} and v = {s.verify_ratio:.2f} at {_at(s)}'
           for s in summaries if s.gamma == gamma and s.method == summaries[0].method]
  return (f'Measured speed-ups lie on average {100 * sum(map(abs, off)) / len(off):.0f} % from '
          f'the predicted ones, at most {100 * off[worst]:+.0f} % ({s.method}, {_at(s)}, '
          f'γ = {s.gamma}). For γ = {gamma}, {"; ".join(costs)}.')


def write(summaries: Summaries, *, samples: int) -> list[str]:
  """A paragraph for each question, in Markdown."""
  return [
      f'**What did distillation buy?** {_distillation(summaries, samples)}',
      f'**Is decoding really faster than the target alone?** {_faster(summaries)}',
      f'**Does the prediction hold?** {_prediction(summaries)}',
  ]
