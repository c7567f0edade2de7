"""`report.md` with its plots, `report.html`, and the same table in the terminal; all from rows."""

from collections.abc import Callable, Sequence
import json
import pathlib
from typing import Any

import ml_collections
from rich import console as rich_console
from rich import table as rich_table

from specdistill_jax import storage
from specdistill_jax.evaluation import answers
from specdistill_jax.evaluation import formats
from specdistill_jax.evaluation import rows as rows_lib
from specdistill_jax.evaluation import summary as summary_lib
from specdistill_jax.stages import distill
from specdistill_jax.stages import sample_texts
from specdistill_jax.stages import tree_pictures
from specdistill_jax.stages import workdirs

STAGES = ('prepare', 'target', 'draft', 'distill', 'evaluate')  # those before this one
TARGET_ALONE = 'target alone'
COLUMNS = ('T', 'γ', 'method', 'α', 'block efficiency', 'speed-up', 'predicted', 'tokens/s')


def load_rows(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> list[dict[str, Any]]:
  """This config's lines of `results.jsonl`; raises ValueError if there is none."""
  path = workdir / 'results.jsonl'
  ours = rows_lib.config_hash(workdirs.to_json(config))
  found = [row for row in rows_lib.read(path) if row['config_hash'] == ours]
  if not found:
    raise ValueError(f'{path} has no line of this config ({ours}); run the stage evaluate first')
  return found


def _plus_minus(value: float, interval: tuple[float, float] | None, unit: str = '') -> str:
  """Half the interval's width: narrower, for the terminal."""
  if interval is None:
    return f'{value:.2f}{unit}'
  return f'{value:.2f}{unit} ±{(interval[1] - interval[0]) / 2:.2f}'


def _quality_columns(summaries: Sequence[summary_lib.Summary]) -> tuple[str, ...]:
  """Quality of the decoded text, where the task has a metric."""
  metric = next((s.quality_metric for s in summaries if s.quality is not None), None)
  return (f'{metric} (%)',) if metric else ()


def table(summaries: Sequence[summary_lib.Summary],
          with_interval: Callable[..., str] = formats.brackets) -> tuple[tuple[str, ...],
                                                                         list[tuple]]:
  """Header and lines: at each temperature the target alone, then every method and length."""
  quality_columns = _quality_columns(summaries)
  with_quality, with_ways = bool(quality_columns), len({s.way for s in summaries}) > 1
  header = COLUMNS[:3] + ('rule',) * with_ways + COLUMNS[3:] + quality_columns
  show = lambda value: '' if value is None else f'{value:.1f}'
  lines = []
  for temperature in sorted({s.temperature for s in summaries}):
    chosen = [s for s in summaries if s.temperature == temperature]
    first = chosen[0]
    lines.append((f'{temperature:g}', '', TARGET_ALONE, *('',) * with_ways, '', '1.00', '1.00x',
                  '', f'{first.autoregressive_tokens_per_second:.0f}')
                 + ((show(first.target_quality),) if with_quality else ()))
    lines += [
        (f'{s.temperature:g}', str(s.gamma),
         *((s.method, s.way) if with_ways else
           (s.method if s.lossless else f'{s.method}, lossy',)),
         with_interval(s.alpha, s.alpha_interval),
         with_interval(s.block_efficiency, s.block_efficiency_interval),
         with_interval(s.speedup_measured, s.speedup_measured_interval, unit='x'),
         f'{s.speedup_predicted:.2f}x', f'{s.tokens_per_second:.0f}')
        + ((show(s.quality),) if with_quality else ())
        for s in chosen]
  return header, lines


def category_table(summaries: Sequence[summary_lib.Summary]) -> tuple[tuple[str, ...],
                                                                   list[tuple]]:
  """Header and lines: a method, temperature and length each, a column for each category.

  A cell has block efficiency and measured speed-up.
  """
  categories = {s.category: s.counts_kpc.shape[1] for s in summaries}
  with_ways = len({s.way for s in summaries}) > 1
  header = ('T', 'γ', 'method') + ('rule',) * with_ways + tuple(
      f'{name} ({count})' for name, count in categories.items())
  lines: dict[tuple, dict[str, str]] = {}
  for s in summaries:
    method = (s.method, s.way) if with_ways else (
        s.method if s.lossless else f'{s.method}, lossy',)
    cell = f'{s.block_efficiency:.2f}, {s.speedup_measured:.2f}x'
    lines.setdefault((f'{s.temperature:g}', str(s.gamma), *method), {})[s.category] = cell
  return header, [line + tuple(cells.get(name, '') for name in categories)
                  for line, cells in lines.items()]


def _category_section(rows: Sequence[dict[str, Any]]) -> list[str]:
  """The report's part about categories; empty where prompts have none."""
  summaries = summary_lib.summarise(rows, samples=1, by_category=True)
  if not summaries:
    return []
  return ['## By category',
          formats.markdown(*category_table(summaries)),
          'Block efficiency and measured speed-up on the prompts of each category, the number of '
          'which stands in brackets. Prompts without a category count in the table above only. '
          'Intervals are in `results.jsonl`.']


def curves(path: pathlib.Path, figure: str = 'validation_alpha', *,
           before: bool = False) -> dict[str, list[list[tuple[int, float]]]]:
  """A figure of each distillation run, by method: a list of (step, figure) a seed.

  If `before`, of the runs before distillation, by their names.
  """
  runs: dict[str, list[tuple[int, float]]] = {}
  for record in rows_lib.read(path):
    if before is (record['stage'] != 'distill') and record.get(figure) is not None:
      runs.setdefault(record['run'], []).append((record['step'], record[figure]))
  found: dict[str, list[list[tuple[int, float]]]] = {}
  for run_name in sorted(runs):
    name = run_name
    if not before:
      objective, data_source, _ = distill.parse_arm(run_name)
      name = summary_lib.method(dict(objective=objective, data_source=data_source))
    found.setdefault(name, []).append(sorted(runs[run_name]))
  return found


def _plots(summaries, workdir: pathlib.Path,
           max_quality_drop: float | None) -> list[tuple[str, str]]:
  """Draws the plots; returns (file name, caption) of each."""
  from specdistill_jax.evaluation import tradeoff  # matplotlib takes a second to import
  everything, summaries = summaries, summary_lib.headline(summaries)
  plots = [
      ('block_efficiency.png', 'Block efficiency against the draft length, with 95 % intervals.',
       lambda path: tradeoff.block_efficiency(summaries, path)),
      ('speedup.png', 'Measured speed-up over the target alone (bars, 95 % intervals) beside '
       'the predicted one (diamonds).', lambda path: tradeoff.speedups(summaries, path)),
      ('acceptance_by_position.png', 'Acceptance by draft position, given that it was '
       'reached, with 95 % intervals as of independent tokens.',
       lambda path: tradeoff.acceptance_by_position(summaries, path))]
  if len({s.way for s in everything}) > 1 and all(s.quality is not None for s in everything):
    plots.append(('tradeoff.png', 'Quality against the time of a token. The line joins what '
                  'nothing beats in both; lossless settings differ in quality by chance alone. '
                  'Numbers are ε; hollow markers are greedy drafts.',
                  lambda path: tradeoff.tradeoff(everything, path, max_quality_drop)))
  training = curves(workdir / 'metrics.jsonl')
  if training:
    plots.append(('training_alpha.png', 'Held-out α during distillation: means over seeds, '
                  'single seeds thin.', lambda path: tradeoff.training_curves(training, path)))
  for name, _, draw in plots:
    with storage.made(workdir / name) as path:
      draw(path)
  return [(name, caption) for name, caption, _ in plots]


def _setting(rows: Sequence[dict[str, Any]]) -> str:
  row = rows[0]
  rules = dict.fromkeys(f'`{r["rule"]}`' for r in rows)
  millions = lambda count: f'{count / 1e6:.2f}M'
  top = ', '.join(f'{name} {row[name]}' for name in ('top_k', 'top_p') if row[name] is not None)
  return (
      f'Task `{row["task"]}`. Target: {row["target"]}, {millions(row["target_parameters"])} '
      f'parameters; draft: {row["draft"]}, {millions(row["draft_parameters"])}. '
      f'{row["num_prompts"]} held-out prompts, up to {row["max_new_tokens"]} new tokens each, '
      f'batch {row["batch_size"]}{", " + top if top else ""}, '
      f'rule{"s" * (len(rules) > 1)} {", ".join(rules)}. '
      f'Device `{row["device"]}`, jax {row["jax_version"]}, commit `{row["commit"]}`, '
      f'config `{row["config_hash"]}`.')


def _origins(config: ml_collections.ConfigDict) -> str:
  """Where models come from that the study did not begin itself."""
  names = dict(target='target', draft='draft', distill='distilled drafts')
  found = [f'{name} from `{config[section].init_from}`' for section, name in names.items()
           if config[section] is not None and config[section].init_from is not None]
  return f' Imported: {", ".join(found)}.' if found else ''


def _wall_times(workdir: pathlib.Path) -> str:
  def told(seconds):
    return 'unknown (an attempt was killed)' if seconds is None else f'{seconds:.0f} s'
  found = [workdirs.done_path(workdir, stage) for stage in STAGES]
  done = [json.loads(path.read_text()) for path in found if path.exists()]
  return ', '.join(f'{stage["stage"]} {told(stage["wall_seconds"])}' for stage in done)


def _html(config: ml_collections.ConfigDict, workdir: pathlib.Path, rows, summaries, answered,
          notes: str, plots: Sequence[tuple[str, str]], footer: str) -> None:
  """Writes `report.html` from what `report.md` was written from, and from sample texts."""
  from specdistill_jax.stages import html_report  # plotly takes a second to import
  metrics, hashed = workdir / 'metrics.jsonl', rows[0]['config_hash']
  by_category = summary_lib.summarise(rows, samples=1, by_category=True)
  html_report.write(
      workdir / 'report.html', summaries, setting=_setting(rows), answers=answered,
      title=f'{config.study}: speculative decoding of {config.task.name}',
      results=table(summaries), notes=notes, footer=footer,
      categories=category_table(by_category) if by_category else None,
      training={'held-out α': curves(metrics), 'loss of distillation': curves(metrics, 'loss'),
                'loss before distillation': curves(metrics, 'loss', before=True)},
      samples=sample_texts.found(workdir, hashed), trees=tree_pictures.found(workdir, hashed),
      plots=[(caption, (workdir / name).read_bytes()) for name, caption in plots],
      max_quality_drop=config.evaluate.max_quality_drop)


def run(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
  """Writes `report.md` with its plots, and `report.html`, into `workdir`."""
  workdir = storage.path(workdir)
  rows = load_rows(config, workdir)
  samples = config.evaluate.bootstrap_samples
  max_quality_drop = config.evaluate.max_quality_drop
  summaries = summary_lib.summarise(rows, samples=samples)
  header, lines = table(summaries)
  seeds = max(s.num_seeds for s in summaries)
  plots = _plots(summaries, workdir, max_quality_drop)
  pictures = [*plots, *tree_pictures.draw(workdir, rows[0]['config_hash'])]
  answered = answers.write(summaries, samples=samples, max_quality_drop=max_quality_drop)
  size = config.evaluate.batch_size
  units = 'prompts' if size == 1 else f'batches of {size} prompts'
  notes = (
      f'T is the temperature. Brackets are 95 % bootstrap intervals over {units} and, for trained '
      f'arms, {seeds} seed{"s" * (seeds > 1)}; counts are summed before ratios. *Standard SD* is '
      'the undistilled draft; the *control* had as many further cross-entropy steps as '
      'distillation. The predicted speed-up is τ / (γ c + v), with the cost of a draft step, c, '
      'and of a verification, v, measured in the same run. Prefill is left out of all times.')
  wall = _wall_times(workdir)
  footer = f'Wall time of the stages before this one: {wall}.' if wall else ''
  parts = [
      f'# {config.study}: speculative decoding of `{config.task.name}`',
      _setting(rows) + _origins(config),
      '## What came out',
      *answered,
      '## Results',
      formats.markdown(header, lines),
      notes,
      *_category_section(rows),
      '## Plots',
      *(f'![{caption}]({name})\n\n*{caption}*' for name, caption in pictures),
      *([footer] if footer else [])]
  storage.write(workdir / 'report.md', '\n\n'.join(parts) + '\n')
  _html(config, workdir, rows, summaries, answered, notes, plots, footer)


def show(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
  """Prints the table and the answers in the terminal."""
  samples = config.evaluate.bootstrap_samples
  summaries = summary_lib.summarise(load_rows(config, workdir), samples=samples)
  header, lines = table(summaries, _plus_minus)
  shown = rich_table.Table(title=config.study, header_style='bold')
  for index, name in enumerate(header):
    shown.add_column(name, justify='left' if index == 2 else 'right', no_wrap=index == 2)
  for previous, line in zip([None, *lines], lines):
    if previous is not None and previous[:2] != line[:2]:
      shown.add_section()
    style = 'bold' if line[2].startswith(('DistillSpec', 'distilled')) else None
    shown.add_row(*line, style=style)
  # Wide enough for the table where there is no terminal to ask, as in a log file.
  console = rich_console.Console()
  if not console.is_terminal:
    console = rich_console.Console(width=120)
  console.print(shown)
  for answer in answers.write(summaries, samples=samples,
                              max_quality_drop=config.evaluate.max_quality_drop):
    console.print(answer.replace('**', '').replace('\n\n', '\n'), highlight=False)
  console.print(f'Report: {workdir / "report.md"}, to explore: {workdir / "report.html"}',
                highlight=False)
