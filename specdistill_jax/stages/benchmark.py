"""The performance suite from a handful of settings to one JSON document; see `bench.py`."""

from collections.abc import Callable, Iterable, Sequence
import contextlib
import dataclasses
import os
import pathlib
import tempfile
from typing import Any

import jax
import numpy as np

from specdistill_jax import api
from specdistill_jax import structs
from specdistill_jax.decoding import rules as rules_lib
from specdistill_jax.decoding import sampling as sampling_lib
from specdistill_jax.decoding import simulated
from specdistill_jax.evaluation import contest
from specdistill_jax.evaluation import machine
from specdistill_jax.evaluation import peers as peers_lib
from specdistill_jax.evaluation import startup
from specdistill_jax.evaluation import suite
from specdistill_jax.models import base
from specdistill_jax.models import synthetic

PROMPT_TOKENS = 32
SEED = 0


@dataclasses.dataclass(frozen=True)
class Options:
  """What to measure; `bench.py` says what each means and holds the defaults."""
  preset: str
  dtype: str
  gammas: tuple[int, ...]
  batch_sizes: tuple[int, ...]
  new_tokens: int
  temperature: float
  acceptance: tuple[float, ...]
  tau: float | None
  peers: str | None
  rounds: int
  profile: str | None = None


def choose_peers(options: Options) -> tuple[str, str | None]:
  """Whom to compare with, and why with nobody.

  Raises:
    ValueError: peers were asked for and can't take part.
  """
  missing = ', '.join(peers_lib.missing())
  if options.peers == 'hf' and missing:
    raise ValueError(f'--peers=hf needs {missing}, not installed here; install it, or say '
                     '--peers=none')
  if options.peers == 'hf' and options.temperature:
    raise ValueError(f'--peers=hf compares greedy tokens, and --temperature is '
                     f'{options.temperature}; make it 0, or say --peers=none')
  if options.peers == 'none':
    return 'none', 'not asked for'
  if missing or options.temperature:
    return 'none', f'not installed: {missing}' if missing else 'not greedy'
  return 'hf', None


def make_rules(options: Options) -> dict[int, tuple[structs.Rule, simulated.Simulated]]:
  """By gamma: the exact rule, and the simulated one that does its work."""
  exact = rules_lib.for_sampling('exact', 1.0, sampling_lib.Sampling(options.temperature))
  chosen = {}
  for gamma in options.gammas:
    if options.tau is None:  # the last rate holds for all positions beyond
      rates = (options.acceptance + options.acceptance[-1:] * gamma)[:gamma]
    else:
      rates = simulated.even_acceptance(options.tau, gamma)
    chosen[gamma] = exact, simulated.Simulated(rates, exact)
  return chosen


@contextlib.contextmanager
def _peer(models: Sequence[base.Model], dtype: str):
  """Hugging Face's library on the same weights, which travel through files."""
  from specdistill_jax.checkpoints import hf  # pylint: disable=g-import-not-at-top
  with tempfile.TemporaryDirectory() as folder:
    paths = [pathlib.Path(folder) / name for name in ('target', 'draft')]
    for path, model in zip(paths, models, strict=True):
      hf.save(synthetic.stacked(model), path)
    with peers_lib.Peer(*paths, dtype) as peer:
      yield peer


def _warm_up(competitors: suite.Competitors) -> dict[str, dict[str, float]]:
  """Runs everything once; the seconds of compiling each decoder's prefill and decoding."""
  seconds = {}
  for (kind, gamma), competitor in competitors.items():
    with startup.watch_compilations() as found:
      competitor()
    parts = {part: sum(spent for name, spent in found.seconds.items() if name.startswith(part))
             for part in ('prefill', 'decode')}
    if parts['decode'] and (kind, gamma) != suite.CLOCK:
      seconds[f'{kind}_gamma_{gamma}' if gamma else kind] = parts
  return seconds


def _profile(directory: str, competitors: suite.Competitors) -> None:
  """One more round of the decoders under the profiler, after all that is measured."""
  with jax.profiler.trace(directory):
    for (kind, gamma), competitor in competitors.items():
      if (kind, gamma) == suite.ALONE or kind in (suite.SPECULATIVE, suite.SIMULATED):
        with jax.profiler.TraceAnnotation(f'{kind} gamma={gamma}'):
          competitor()


def _one_batch_size(options: Options, case: suite.Case, competitors: suite.Competitors,
                    peer: peers_lib.Peer | None,
                    progress: Callable[[Iterable[int]], Iterable[int]]) -> dict[str, Any]:
  compile_seconds = _warm_up(competitors)
  with startup.watch_compilations() as late:
    played = contest.play(competitors, options.rounds, progress=progress,
                          children=() if peer is None else (peer.pid,))
  if options.profile:
    _profile(os.path.join(options.profile, f'batch_size_{len(case.prompts_bt)}'), competitors)
  methods = played[0].results[suite.MEMORY]
  return dict(
      batch_size=len(case.prompts_bt), compile_seconds=compile_seconds,
      compilations_after_warm_up=late.count,
      foreign_cpu_share_by_round=[one.foreign_share for one in played],
      memory_read_gigabytes_per_second={
          name: contest.median(played, lambda one, name=name: one.results[suite.MEMORY][name])
          for name in methods},
      rows=suite.rows(case, played))


def run(options: Options, *, progress: Callable[[str], Callable[[Iterable[int]], Iterable[int]]]
        = lambda description: iter) -> dict[str, Any]:
  """Measures everything; returns what becomes the JSON document, units in its keys.

  Raises:
    ValueError: one sentence about an option that can't be met.
  """
  wanted, reason = choose_peers(options)
  rules = make_rules(options)
  config = synthetic.config(options.preset, options.dtype)
  startup_seconds = startup.import_seconds()
  # What is timed as a compilation shall be one.
  jax.config.update('jax_enable_compilation_cache', False)
  sampling = sampling_lib.Sampling(options.temperature)
  target, draft = synthetic.pair(config, jax.random.key(SEED))
  drafters = {gamma: api.make_drafter(draft, gamma=gamma, target_sampling=sampling)
              for gamma in options.gammas}
  rng = np.random.default_rng(SEED)
  probe = machine.read_probe()
  measured = []
  with contextlib.ExitStack() as stack:
    peer = stack.enter_context(_peer((target, draft), options.dtype)) if wanted == 'hf' else None
    for batch in options.batch_sizes:
      prompts_bt = rng.integers(2, config.vocab_size, (batch, PROMPT_TOKENS)).astype(np.int32)
      case = suite.Case(
          module=target.module, drafters=drafters, rules=rules, prompts_bt=prompts_bt,
          weight_bytes=synthetic.bytes_read(target, batch), new_tokens=options.new_tokens,
          sampling=sampling)
      competitors = suite.competitors(case, jax.random.key(SEED), probe, peer)
      measured.append(_one_batch_size(options, case, competitors, peer,
                                      progress(f'batch size {batch}')))
    return dict(
        suite='specdistill_jax.bench', **dataclasses.asdict(options),
        device=jax.devices()[0].device_kind, num_devices=jax.device_count(),
        jax_version=jax.__version__, cpu_cores=os.cpu_count(), prompt_tokens=PROMPT_TOKENS,
        target_parameters=target.num_parameters, draft_parameters=draft.num_parameters,
        compared_with=wanted, no_peers_because=reason,
        peer_versions=None if peer is None else peer.about,
        startup=startup_seconds, by_batch_size=measured)
