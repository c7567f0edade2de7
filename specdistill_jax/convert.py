"""Hugging Face safetensors to a checkpoint of ours, and back.

  python -m specdistill_jax.convert --source=HF_DIRECTORY --destination=W/target
  python -m specdistill_jax.convert --source=W/distill/forward_kl-draft-seed0 --destination=DIR
  python -m specdistill_jax.convert --source=EAGLE_DIRECTORY --destination=W/draft --target=DIR

The source says which way it goes. Parameters keep their dtype unless `--dtype` names another. A
feature-level draft may need its target, of which only the config is read.
"""

from collections.abc import Sequence
import pathlib
import sys

from absl import flags


def make_flags() -> flags.FlagValues:
  values = flags.FlagValues()
  flags.DEFINE_string('source', None, 'Directory of the model.', flag_values=values)
  flags.DEFINE_string('destination', None, 'Directory to be made.', flag_values=values)
  flags.DEFINE_string('target', None, 'Directory of the target of a feature-level draft.',
                      flag_values=values)
  flags.DEFINE_enum('dtype', None, ['float32', 'bfloat16'],
                    'Of the parameters that are written.', flag_values=values)
  flags.DEFINE_float('max_shard_gb', 5.0, 'Largest safetensors file, in 10^9 bytes.',
                     lower_bound=1e-6, flag_values=values)
  return values


def convert(source: str | pathlib.Path, destination: str | pathlib.Path, *,
            dtype: str | None = None, max_shard_bytes: int = 5_000_000_000,
            target: str | pathlib.Path | None = None) -> str:
  """Converts a model, over all devices; returns a line about what was done.

  Raises:
    ValueError: one sentence about a source that can't be read or a destination in use.
  """
  # Imported here, so that a misspelt flag is answered at once.
  from specdistill_jax import sharding  # pylint: disable=g-import-not-at-top
  from specdistill_jax import storage
  from specdistill_jax.checkpoints import pretrained
  from specdistill_jax.checkpoints import store
  source, destination = storage.path(source), storage.path(destination)
  if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
    raise ValueError(f'destination {destination} is there already; name a new directory')
  mesh = sharding.make_mesh(data=1, fsdp=-1)
  if pretrained.is_ours(source):
    model = store.load_model(source, mesh, weights_dtype=None)
    pretrained.save(model, destination, dtype=dtype, max_shard_bytes=max_shard_bytes)
    kind = 'a Hugging Face directory'
  else:
    model = pretrained.load(source, mesh, parameter_dtype=dtype,
                            target=target and pretrained.load_config(target))
    store.save_model(destination, model)
    kind = 'a checkpoint of specdistill_jax'
  return (f'{source} ({model.num_parameters:,} parameters) is now {kind}, '
          f'{destination}')


def main(argv: Sequence[str] | None = None) -> int:
  """The command. Returns the exit status: 0, or 2 after printing one `error:` line."""
  argv = list(sys.argv if argv is None else argv)
  values = make_flags()
  if '--help' in argv:
    print(f'{__doc__}\nflags:\n{values.get_help()}')
    return 0
  try:
    rest = values(argv)
    if len(rest) > 1:
      raise ValueError(f'{rest[1]!r} is no flag; give --source and --destination')
    for name in ('source', 'destination'):
      if not values[name].value:
        raise ValueError(f'--{name} is missing; give --source=DIRECTORY and '
                         '--destination=DIRECTORY')
    print(convert(values.source, values.destination, dtype=values.dtype,
                  max_shard_bytes=int(values.max_shard_gb * 1e9), target=values.target))
  except (ValueError, flags.Error) as error:
    print(f'error: {" ".join(str(error).split())}', file=sys.stderr, flush=True)
    return 2
  return 0


if __name__ == '__main__':
  sys.exit(main())
