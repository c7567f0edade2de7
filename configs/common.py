"""Defaults that every study shares. A config starts from `study()` and states what differs.

A section per stage: `task` (prepare), `target`, `draft`, `distill`, `evaluate`. Setting a
section to None leaves its stage out. `specdistill_jax.stages.checks` says what is legal.
"""

import ml_collections
from ml_collections import config_dict


def _optional(kind):
  return config_dict.placeholder(kind)


def study(name: str) -> ml_collections.ConfigDict:
  """The skeleton of a study, all defaults visible here."""
  config = ml_collections.ConfigDict()
  config.study = name
  config.seed = 0
  config.mesh = ml_collections.ConfigDict(dict(
      data=-1,      # -1: all devices that the other axes leave
      fsdp=1,
      tensor=1,
  ))
  config.topology = _optional(str)  # the TPU slice that the study is meant for, as 'v5e:4x4'
  config.task = task()
  config.target = model_stage()
  config.target.weights_dtype = 'float32'  # | bfloat16: of the frozen one that a draft reads
  config.draft = model_stage()
  config.distill = distill()
  config.evaluate = evaluate()
  return config


def task() -> ml_collections.ConfigDict:
  return ml_collections.ConfigDict(dict(
      # stdlib_docs | stdlib_docstrings | arithmetic | local_files | conversations;
      # xsum | cnn_dailymail | wmt14_en_de | gsm8k | lm1b, which TFDS has in data_dir;
      # bbh, a folder of JSON files in data_dir, and prompts: for evaluation only.
      name='stdlib_docs',
      vocab_size=1000,         # pieces of the SentencePiece model trained in `prepare`
      max_length=96,           # tokens of a row: prompt, completion and end token
      prompt_length=16,        # language modelling: leading tokens that serve as a prompt
      max_examples=_optional(int),   # of the training split; None: all
      validation_fraction=0.05,      # of the documents, where the task has no own split
      max_inputs=_optional(int),     # tokens of a prompt, the rest is cut; None: the paper's
      max_targets=_optional(int),    # tokens of a completion, the rest is cut; None: the paper's
      data_dir=_optional(str),       # folder or bucket of the TFDS data sets, or of bbh's files
      vocabulary=_optional(str),     # a SentencePiece model; None: trained on the training split
      chat_template=_optional(str),  # llama-2 | llama-3 | vicuna | chatml | qwen | gemma | a .json
      prompt_files=(),         # prompts only: JSON lines with `turns` or `prompt`
      # local_files: paths, or (inputs, targets) pairs of parallel files. conversations: paths.
      train_files=(),
      validation_files=(),     # empty: validation_fraction of the documents in train_files
      inputs_field='inputs',   # of a JSON line; empty: language modelling on targets_field
      targets_field='targets',
      # accuracy | exact_answer | rouge1 | rouge2 | rougeL | bleu; None: the task's own, if any.
      metric=_optional(str),
  ))


def model_stage() -> ml_collections.ConfigDict:
  return ml_collections.ConfigDict(dict(
      # A Hugging Face directory or one of ours: its shape, weights and tokenizer are taken, of
      # `model` only dtype; train.steps of 0 leaves it as it is. None: trained from scratch.
      init_from=_optional(str),
      model=decoder(),
      train=train(),
      layout='sharded',        # sharded | tensor | replicated, see sharding.LAYOUTS
  ))


def decoder() -> ml_collections.ConfigDict:
  """Fields of `models.decoder.DecoderConfig`; vocab_size comes from the task."""
  return ml_collections.ConfigDict(dict(
      family='decoder',        # decoder | t5
      num_layers=4, width=256, num_heads=4, num_kv_heads=4, head_dim=64, mlp_width=704,
      tie_embeddings=True, dtype='float32',
  ))


def t5() -> ml_collections.ConfigDict:
  """Fields of `models.t5.T5Config`; in place of `decoder()`, for target and draft alike."""
  return ml_collections.ConfigDict(dict(
      family='t5',
      num_encoder_layers=4, num_decoder_layers=4, width=256, num_heads=4, head_dim=64,
      mlp_width=512, gated_mlp=True, tie_embeddings=False, dtype='float32',
  ))


def feature_draft(family: str) -> ml_collections.ConfigDict:
  """A feature-level draft of a decoder, in place of the draft's `decoder()`.

  Trained by `distill` with the objective 'feature'; `draft.train.steps` is 0. Sizes that are
  not given are the target's. Fields are those of `drafters.fspad`, `eagle3`, `mtp`, and of
  `drafters.heads`: medusa and mlp, whose attention and MLP sizes are not used.
  """
  own = {
      'eagle': dict(fusion_bias=True, feature_noise=0.2),
      'fspad': dict(feature_sampling=True, partial_alignment=True, feature_noise=0.2),
      'eagle3': dict(draft_vocab_size=_optional(int),  # most frequent tokens; None: 32,000 or all
                     unrolled_steps=7, step_decay=0.8),
      'mtp': dict(unrolled_steps=6, step_decay=0.8),
      'medusa': dict(positions=6, own_heads=True, step_decay=0.8),
      'mlp': dict(positions=6, inner_width=_optional(int), tied=False, step_decay=1.0),
  }
  return ml_collections.ConfigDict(dict(
      family=family, num_heads=_optional(int), num_kv_heads=_optional(int),
      head_dim=_optional(int), mlp_width=_optional(int), **own[family]))


def feature_recipe(family: str) -> dict:
  """Of `train()`, what the released codes set for the papers' own targets; rows of 2,048 tokens.

  FSPAD's for EAGLE-1 too, as its authors retrained it: 20 epochs of 64,600 rows, on a line that
  would reach 0 at step 800,000. EAGLE-3 goes to its end.
  """
  shared = dict(batch_size=16, learning_rate=5e-5, schedule='linear', b1=0.9, b2=0.95,
                weights_dtype='bfloat16', log_every=100, eval_every=4_000, checkpoint_every=4_000)
  if family == 'eagle3':
    return shared | dict(steps=800_000, warmup_steps=12_000, final_fraction=0.0, clip_norm=0.5,
                         remat='full')
  return shared | dict(steps=80_750, warmup_steps=2_000, final_fraction=0.9, clip_norm=None,
                       clip_value=0.5, weight_decay=0.01)


def train() -> ml_collections.ConfigDict:
  return ml_collections.ConfigDict(dict(
      steps=300,
      batch_size=16,           # rows a step, over all devices
      accumulation=1,          # micro-batches a step
      head_chunk=_optional(int),     # positions of a row whose logits exist at a time; None: all
      optimizer='adamw',       # adamw | adafactor
      learning_rate=1e-3,      # peak
      warmup_steps=20,
      schedule='cosine',       # cosine | linear | constant | plateau_cosine
      final_fraction=0.1,      # of the peak, at the last step
      weight_decay=0.0,
      b1=0.9,
      b2=0.95,
      clip_norm=1.0,           # of the whole gradient; None: no limit
      clip_value=_optional(float),   # of each of its values, before; EAGLE and FSPAD: 0.5
      dropout=0.0,
      weights_dtype='float32',       # float32 | bfloat16: what the passes read; masters: float32
      remat='none',            # none | dots | full: kept of each layer for the backward pass
      log_every=10,
      eval_every=100,
      checkpoint_every=100,
      keep_checkpoints=2,
  ))


def distill() -> ml_collections.ConfigDict:
  return ml_collections.ConfigDict(dict(
      # forward_kl | reverse_kl | jsd | tvd | acceptance_nll | lk_hybrid | end_to_end_tvd | dspark;
      # feature, for drafts of `feature_draft`; or a function of yours (student logits, teacher
      # logits) -> loss of each token, as 'my_losses.sharp_kl'. Fields behind it, as in
      # 'lk_hybrid,eta=10':
      #   eta=3, kl_weight=None, alpha_over=batch|previous|token    of lk_hybrid
      #   position_weights=decay|uniform|adaptive, decay=0.8, floor=0.5    of draft positions
      #   block=1: tokens that a standalone draft drafts together
      #   keep=1: share of tokens learnt (AdaSPEC), by a reference: this objective without it
      # See losses.objectives.Objective.
      objective='forward_kl',
      also=(),                 # further objectives: an arm each, of the same draft, data, steps
      beta=0.5,                # jsd only
      data_source='draft',     # fixed | target | draft | draft_stored | fixed+draft | target+draft
      student_fraction=0.5,    # lambda, of the sources with a plus
      normalisation='sequence',      # sequence (paper, Eq. 2) | token
      # Of both models inside the loss; None: the one above 0 in evaluate.temperatures.
      temperature=_optional(float),
      rollout=ml_collections.ConfigDict(dict(
          temperature=1.0, top_k=_optional(int), top_p=_optional(float),
          max_new_tokens=64,
      )),
      seeds=(0, 1),
      control=True,            # as many further cross-entropy steps, for an equal-compute row
      train=train(),
  ))


def evaluate() -> ml_collections.ConfigDict:
  return ml_collections.ConfigDict(dict(
      temperatures=(0.0, 1.0),
      top_k=_optional(int),
      top_p=_optional(float),
      gammas=(3, 5, 7),
      draft_sampling=('sampled',),   # sampled, greedy
      # (rule, epsilon) pairs. Lossless, with epsilon 1: exact, block. Lossy above temperature 0:
      # linear, square, exponential, typical; at 0: greedy_lenience; at any: top_k, k = 1/epsilon.
      rules=(('exact', 1.0),),
      # Drafted beside chains, siblings sampled or greedy as draft_sampling says: 'eagle1', paths of
      # ranks as in '0 1 00 01', or EAGLE-2's as in 'dynamic k10 d6 n60' (top-k, depth, nodes).
      trees=(),
      # Drafting ends where the draft's best token is less likely than this; 0: always gamma.
      min_confidences=(0.0,),
      max_quality_drop=_optional(float),  # share of the target's quality that the report may spend
      mesh=ml_collections.ConfigDict(dict(data=1, fsdp=1, tensor=1)),  # of the devices that decode
      topology=_optional(str),       # of the slice that decodes; None: the study's
      batch_size=1,
      num_prompts=24,
      max_new_tokens=48,
      bootstrap_samples=1000,
  ))
