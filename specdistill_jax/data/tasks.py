"""seqio tasks, over TFDS and over examples held in memory: the only importer of TensorFlow.

A task is registered afresh each time it is made, because its vocabulary and its examples
belong to one workdir and not to the process. A task says where texts come from, how they are
put together, which vocabulary they have and how they are scored. Its own tokenising runs one
example at a time; `tokenised` runs its steps up to there, and gives the texts to the same
SentencePiece model many at once, which takes a fraction of the time.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent import futures
import itertools
import os
from typing import Any, NamedTuple

# TensorFlow announces every CPU feature it finds; it reads this at import.
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')

# pylint: disable=g-import-not-at-top
import numpy as np
import seqio
import tensorflow as tf

from specdistill_jax import storage
from specdistill_jax.data import papers
from specdistill_jax.data import quality
from specdistill_jax.data import splits
from specdistill_jax.data import vocabulary as vocabulary_lib

# Between a prompt and its completion. A newline keeps the two texts apart for the model and
# belongs to the prompt, so the completion decodes to the targets and nothing else.
SEPARATOR = '\n'
_BATCH_SIZE = 1024


class TokenisedExample(NamedTuple):
  """One example after tokenisation.

  Attributes:
    inputs: int32 token ids of the prompt, separator included; empty in language modelling.
    targets: int32 token ids of the completion, end token included.
    reference: the completion's text.
    document: id of the document it comes from.
    category: of the example, or ''.
  """
  inputs: np.ndarray
  targets: np.ndarray
  reference: str
  document: str
  category: str = ''


def make(name: str, examples: Mapping[str, Sequence[splits.Example]],
         vocabulary: Any, metric: str | None) -> seqio.Task:
  """Registers the task `specdistill_<name>`, in place of an earlier one.

  Args:
    name: of the task in the config.
    examples: by split; all with inputs, or all without.
    vocabulary: ours (or the path of its model), or one of `data.tokenizers`.
    metric: name of a quality metric, or None.
  """
  first = next(iter(examples.values()))[0]
  source = seqio.FunctionDataSource(
      lambda split, shuffle_files: _dataset(examples[split]), splits=tuple(examples),
      num_input_examples={split: len(e) for split, e in examples.items()})
  return _register(name, source, [], first.inputs is not None, seqio_vocabulary(vocabulary),
                   metric)


def paper(name: str, data_dir: str, vocabulary: seqio.Vocabulary | None = None) -> seqio.Task:
  """Registers one of the papers' tasks over TFDS data, which are read and never downloaded.

  Args:
    name: a key of `papers.PAPERS`.
    data_dir: where TFDS keeps its data sets: a folder, or a bucket (`gs://...`), from which the
      one that is read is copied.
    vocabulary: None is bytes, for whoever wants texts only.

  Raises:
    ValueError: the data set is not there, or lacks a split.
  """
  spec = papers.PAPERS[name]
  # The folder of one version: read as it is, whatever versions TFDS knows of.
  folder = os.fspath(storage.local(papers.directory(name, data_dir)))
  source = seqio.TfdsDataSource(tfds_data_dir=folder, splits=dict(spec.splits), read_only=True)
  return _register(name, source, [lambda dataset: dataset.map(lambda x: _texts(spec, x))],
                   spec.inputs_field is not None, vocabulary or seqio.ByteVocabulary(),
                   spec.metric)


def texts(task: seqio.Task, split: str) -> Iterator[dict[str, list[str]]]:
  """The texts of a split in their order, in batches: what the task's tokenisation is given."""
  dataset = task.source.get_dataset(split=split, shuffle=False)
  for step in itertools.takewhile(lambda s: s is not seqio.preprocessors.tokenize,
                                  task.preprocessors):
    dataset = step(dataset)
  for batch in dataset.batch(_BATCH_SIZE).as_numpy_iterator():
    yield {column: [value.decode() for value in values] for column, values in batch.items()}


def examples(task: seqio.Task, split: str, limit: int | None = None) -> list[splits.Example]:
  """The first `limit` examples of a split, or all of them."""
  found = []
  for batch in texts(task, split):
    inputs = batch.get('inputs', itertools.repeat(None))
    for text, target in zip(inputs, batch['targets']):
      text = None if text is None else text.removesuffix(SEPARATOR)
      found.append(splits.Example(text, target, f'{task.name}/{split}:{len(found)}'))
      if len(found) == limit:
        return found
  return found


def tokenised(task: seqio.Task, split: str, vocabulary: Any) -> Iterator[TokenisedExample]:
  """The examples of a split in their order, whole: nothing is trimmed.

  Args:
    task: from `make`.
    split: of the task.
    vocabulary: `data.vocabulary.Vocabulary` of the task's own model.
  """
  nothing = np.zeros((0,), np.int32)
  end = [vocabulary.eos_id]

  def encode(batch):
    return batch, *(vocabulary.encode_batch(batch[column]) if column in batch
                    else itertools.repeat(None) for column in ('inputs', 'targets'))

  for batch, inputs, targets in _one_ahead(encode, texts(task, split)):
    for prompt, completion, *others in zip(inputs, targets, batch['targets'],
                                           batch['document'], batch['category']):
      yield TokenisedExample(
          nothing if prompt is None else np.array(prompt, np.int32),
          np.array(completion + end, np.int32), *others)


def _one_ahead(function: Callable, items: Iterable) -> Iterator:
  """`map`, with the next result made in a thread: SentencePiece lets Python run meanwhile."""
  with futures.ThreadPoolExecutor(1) as pool:
    pending = None
    for item in items:
      following = pool.submit(function, item)
      if pending:
        yield pending.result()
      pending = following
    if pending:
      yield pending.result()


def _register(name: str, source: seqio.DataSource, steps: list, has_inputs: bool,
              vocabulary: seqio.Vocabulary, metric: str | None) -> seqio.Task:
  # It would take the accelerator's memory for nothing.
  tf.config.set_visible_devices([], 'GPU')
  features = {'targets': seqio.Feature(vocabulary, add_eos=True)}
  if has_inputs:
    features['inputs'] = seqio.Feature(vocabulary, add_eos=False)
  registered = f'specdistill_{name}'
  if registered in seqio.TaskRegistry.names():
    seqio.TaskRegistry.remove(registered)
  return seqio.TaskRegistry.add(
      registered, source=source,
      preprocessors=steps + [seqio.preprocessors.tokenize, seqio.preprocessors.append_eos],
      output_features=features, metric_fns=[_metric_fn(metric)] if metric else [])


def seqio_vocabulary(vocabulary: Any) -> seqio.Vocabulary:
  """A vocabulary of this project, or a tokenizer of `data.tokenizers`, as one of seqio's.

  seqio keeps SentencePiece models by path for as long as the process lives, so a path must
  never be used for two models.
  """
  if isinstance(vocabulary, (str, vocabulary_lib.Vocabulary)):
    path = getattr(vocabulary, 'path', vocabulary)
    return seqio.SentencePieceVocabulary(str(path), extra_ids=0)
  return TokenizerVocabulary(vocabulary)


class TokenizerVocabulary(seqio.Vocabulary):
  """seqio's interface to a tokenizer of `data.tokenizers`; special tokens are the tokenizer's."""

  def __init__(self, tokenizer: Any):
    super().__init__(extra_ids=0)
    self.tokenizer = tokenizer

  def __eq__(self, other):
    return (isinstance(other, TokenizerVocabulary)
            and self.tokenizer.digest == other.tokenizer.digest)

  @property
  def bos_id(self) -> int | None:
    return self.tokenizer.bos_id

  @property
  def eos_id(self) -> int:
    return self.tokenizer.eos_id

  @property
  def pad_id(self) -> int:
    return self.tokenizer.pad_id

  @property
  def unk_id(self) -> None:
    return None  # every id is known

  @property
  def _base_vocab_size(self) -> int:
    return self.tokenizer.size

  def _encode(self, s: str) -> list[int]:
    return self.tokenizer.encode(s)

  def _decode(self, ids: Sequence[int]) -> str:
    return self.tokenizer.decode(ids)

  def _encode_tf(self, s: tf.Tensor) -> tf.Tensor:
    def encode(text):  # bytes in a graph, an array of them outside one
      text = text.item() if isinstance(text, np.ndarray) else text
      return np.array(self.tokenizer.encode(text.decode()), np.int32)
    ids = tf.numpy_function(encode, [tf.convert_to_tensor(s)], tf.int32, stateful=False)
    return tf.ensure_shape(ids, [None])

  def _decode_tf(self, ids: tf.Tensor) -> tf.Tensor:
    def decode(ids):
      rows = ids.reshape(-1, ids.shape[-1])
      texts = [self.tokenizer.decode(row).encode() for row in rows]
      return np.array(texts, object).reshape(ids.shape[:-1])
    text = tf.numpy_function(decode, [ids], tf.string, stateful=False)
    return tf.ensure_shape(text, ids.shape[:-1])


def _texts(spec: papers.Paper, example: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
  found = {'targets': example[spec.targets_field]}
  if spec.inputs_field is not None:
    found['inputs'] = tf.strings.join(
        [spec.prefix, example[spec.inputs_field], spec.suffix, SEPARATOR])
  return found


def _dataset(examples_: Sequence[splits.Example]) -> tf.data.Dataset:
  columns = {'targets': [e.targets for e in examples_],
             'document': [e.document for e in examples_],
             'category': [e.category for e in examples_]}
  if examples_[0].inputs is not None:
    columns['inputs'] = [e.inputs + SEPARATOR for e in examples_]
  # As arrays: TensorFlow looks into every element of a list.
  return tf.data.Dataset.from_tensor_slices(
      {name: np.array([text.encode() for text in column], object)
       for name, column in columns.items()})


def _metric_fn(name: str):
  metric = quality.metric(name)
  # seqio tells a metric on predictions from one on scores by these argument names.
  def metric_fn(targets, predictions):
    return {name: metric(targets, predictions)}
  return metric_fn
