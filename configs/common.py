"""Defaults that every study shares. A config starts from `study()` and states what differs.

A section per stage: `task` (prepare), `target`, `draft`, `distill`, `evaluate`. Setting a
section to None leaves its stage out. `specdistill_jax.stages.checks` says what is legal.

Below the defaults stand the papers' models and recipes at full scale, their twins that two CPU
cores can train, and what a file needs that stands for a whole table of a paper: `cell_of`,
`sweep` and `published`.
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
  config.bucket = _optional(str)    # what '{bucket}' in paths stands for: 'gs://my-bucket/inputs'
  config.task = task()
  config.target = model_stage()
  config.target.weights_dtype = 'float32'  # | bfloat16: of the frozen one that a draft reads
  config.target.teacher_layout = _optional(str)  # of that one; None: `layout`, as it is trained
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
      max_inputs=_optional(int),     # tokens of a prompt, the rest is cut; None: the paper's.
                                     #   Of a chat, before the answer that its row ends with
      max_targets=_optional(int),    # tokens of a completion, the rest is cut; None: the paper's
      data_dir=_optional(str),       # folder or bucket of the TFDS data sets, or of bbh's files
      vocabulary=_optional(str),     # a SentencePiece model; None: trained on the training split
      chat_template=_optional(str),  # llama-2 | llama-3 | vicuna | chatml | qwen | gemma | a .json
      # JSON lines with `turns` or `prompt`: of the task prompts, and of conversations what
      # `evaluate` decodes in place of held-out ones.
      prompt_files=(),
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
  if family not in own:
    raise ValueError(f'feature_draft is given {family!r}; it must be one of {", ".join(own)}')
  return ml_collections.ConfigDict(dict(
      family=family, num_heads=_optional(int), num_kv_heads=_optional(int),
      head_dim=_optional(int), mlp_width=_optional(int), **own[family]))


def feature_recipe(family: str) -> dict:
  """Of `train()`, what the released codes set for the papers' own targets; rows of 2,048 tokens.

  FSPAD's for EAGLE-1 too, as its authors retrained it: 21 epochs of 64,600 rows (its loop counts
  from 0 to 20), on a line that would reach 0 at step 800,000. EAGLE-3 goes to its end.
  """
  shared = dict(batch_size=16, learning_rate=5e-5, schedule='linear', b1=0.9, b2=0.95,
                weights_dtype='bfloat16', log_every=100, eval_every=4_000, checkpoint_every=4_000)
  if family == 'eagle3':
    return shared | dict(steps=800_000, warmup_steps=12_000, final_fraction=0.0, clip_norm=0.5,
                         remat='full')
  return shared | dict(steps=84_787, warmup_steps=2_000, final_fraction=0.9, clip_norm=None,
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
      # cross_entropy, on data_source 'target': SeqKD;
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
          # Chips that share a model's heads while stored samples are drawn and held-out prompts
          # decoded, of those of mesh.fsdp and mesh.tensor; None: mesh.tensor; 0: as None, and
          # held-out prompts are not decoded while the draft learns.
          tensor=_optional(int),
      )),
      seeds=(0, 1),            # an arm each
      # The folder `distill` of another study, whose arms of these names are taken as they are:
      # nothing is trained, train.steps says what they have behind them.
      init_from=_optional(str),
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
      weights_dtype='float32',       # float32 | bfloat16: of both models as they decode
      batch_size=1,
      num_prompts=24,                # None: all there are
      max_new_tokens=48,
      bootstrap_samples=1000,
  ))


# The papers' models and recipes at their own sizes. Slices: docs/tpu_slices.md. What they start
# from and read lies in `config.bucket`: docs/full_scale.md.

# T5 v1.1: layers of the encoder and of the decoder each, width, heads, MLP width.
T5_SIZES = {'small': (8, 512, 6, 1024), 'base': (12, 768, 12, 2048), 'large': (24, 1024, 16, 2816),
            'xl': (24, 2048, 32, 5120), 'xxl': (24, 4096, 64, 10_240)}
# DistillSpec's tasks of T5: most tokens of a row, and of a completion.
T5_TASKS = {'xsum': (1088, 64), 'cnn_dailymail': (2176, 128), 'wmt14_en_de': (160, 80),
            'gsm8k': (832, 320)}


def t5_v1_1(size: str) -> ml_collections.ConfigDict:
  layers, width, heads, mlp_width = T5_SIZES[size]
  model = t5()
  model.update(num_encoder_layers=layers, num_decoder_layers=layers, width=width, num_heads=heads,
               head_dim=64, mlp_width=mlp_width, dtype='bfloat16')
  return model


def distillspec_recipe(batch_size: int, steps: int = 300_000) -> dict:
  """Of `train()`, what the re-implementation mjbooo/RLSD sets for DistillSpec.

  The models it starts from are fine-tuned likewise, over 100,000 steps.
  """
  return dict(
      steps=steps, batch_size=batch_size, optimizer='adafactor', learning_rate=3e-4,
      warmup_steps=steps // 60, schedule='plateau_cosine', clip_norm=None,
      weights_dtype='bfloat16', remat='full', log_every=100, eval_every=10_000,
      checkpoint_every=10_000)


def distillspec_t5(name: str, task_name: str, target: str = 'xl',
                   draft: str = 'small') -> ml_collections.ConfigDict:
  """A T5 v1.1 pair on one of `T5_TASKS`; an XXL target needs the chips of v4."""
  max_length, new_tokens = T5_TASKS[task_name]
  is_largest = target == 'xxl'
  config = study(name)
  config.topology = 'v4:2x2x4' if is_largest else 'v5e:4x4'
  config.mesh.update(data=1, fsdp=-1)
  config.task.update(name=task_name, vocab_size=32_128, max_length=max_length,
                     data_dir='{bucket}/tfds')
  for section, size in ((config.target, target), (config.draft, draft)):
    section.init_from = f'{{bucket}}/models/t5_v1_1_{size}_lm_adapt'
    section.model = t5_v1_1(size)
    section.train.update(distillspec_recipe(batch_size=32, steps=100_000))
  config.target.update(weights_dtype='bfloat16', teacher_layout='replicated')
  config.draft.layout = 'replicated'
  config.distill.rollout.max_new_tokens = new_tokens
  config.distill.train.update(distillspec_recipe(batch_size=32))
  config.evaluate.update(gammas=(3, 5, 7), max_new_tokens=new_tokens, num_prompts=500,
                         topology='v4:1x1x1' if is_largest else 'v5e:1x1',
                         weights_dtype='bfloat16')
  return config


def distillspec_lm1b(name: str) -> ml_collections.ConfigDict:
  """DistillSpec's decoder pair, 234M and 33M; the shapes are guesses that hit these totals."""
  config = study(name)
  config.topology = 'v5e:4x4'
  config.task.update(name='lm1b', vocab_size=32_000, max_length=64, prompt_length=8,
                     data_dir='{bucket}/tfds')
  shared = dict(norm='layer', gated_mlp=False, activation='gelu', head_dim=64, dtype='bfloat16')
  config.target.model.update(num_layers=16, width=1024, num_heads=16, num_kv_heads=16,
                             mlp_width=4096, **shared)
  config.target.update(weights_dtype='bfloat16', layout='replicated')
  config.draft.model.update(num_layers=8, width=512, num_heads=8, num_kv_heads=8,
                            mlp_width=1024, **shared)
  config.draft.layout = 'replicated'
  for section in (config.target, config.draft):
    section.train.update(distillspec_recipe(batch_size=1024, steps=100_000), head_chunk=16)
  config.distill.rollout.max_new_tokens = 56
  config.distill.train.update(distillspec_recipe(batch_size=1024), head_chunk=16)
  config.evaluate.update(gammas=(3, 5, 7), max_new_tokens=56, num_prompts=500,
                         topology='v5e:1x1', weights_dtype='bfloat16')
  return config


_LK_TARGETS = {'llama3_8b': 'llama3_1_8b', 'llama3_70b': 'llama3_3_70b'}
_LLAMA3 = dict(num_kv_heads=8, head_dim=128, norm_eps=1e-5, rope_theta=500_000.0)
# Targets of the feature-level papers; what they are trained and decoded on (the chips of one host,
# the first, which decodes alone), the tensor axis of training, drafted nodes of EAGLE-2's tree.
FEATURE_TARGETS = {
    'vicuna_7b': dict(num_layers=32, width=4096, num_heads=32, num_kv_heads=32, head_dim=128,
                      mlp_width=11_008, norm_eps=1e-5),
    'vicuna_33b': dict(num_layers=60, width=6656, num_heads=52, num_kv_heads=52, head_dim=128,
                       mlp_width=17_920, norm_eps=1e-6),
    'llama3_8b': _LLAMA3 | dict(num_layers=32, width=4096, num_heads=32, mlp_width=14_336),
    'llama3_70b': _LLAMA3 | dict(num_layers=80, width=8192, num_heads=64, mlp_width=28_672),
}
_FEATURE_SLICES = {
    'vicuna_7b': ('v5e:2x2', 'v5e:2x2', 1, 59), 'vicuna_33b': ('v5e:4x4', 'v4:2x2x1', 1, 47),
    'llama3_8b': ('v5e:2x4', 'v5e:2x2', 1, 59), 'llama3_70b': ('v5e:4x8', 'v5p:2x2x1', 2, 47)}
# What differs in released drafts: EAGLE-1's of Llama 3 have no bias, its one of the 33B has 13 key
# heads; FSPAD's of the 8B is wider than the target's own layers; those of the 7B have another eps.
_FEATURE_DRAFTS = {
    ('vicuna_7b', 'eagle'): dict(norm_eps=1e-6), ('vicuna_7b', 'fspad'): dict(norm_eps=1e-6),
    ('vicuna_33b', 'eagle'): dict(num_kv_heads=13), ('llama3_8b', 'eagle'): dict(fusion_bias=False),
    ('llama3_70b', 'eagle'): dict(fusion_bias=False),
    ('llama3_8b', 'fspad'): dict(num_kv_heads=32, mlp_width=11_008)}


def feature_pod(name: str, target: str, draft: str) -> ml_collections.ConfigDict:
  """A feature-level draft of one of `FEATURE_TARGETS` on conversations, with FSPAD's recipe.

  See configs/pod_feature_vicuna.py and configs/pod_feature_llama3.py for its reasons.
  """
  training, decoding, tensor, nodes = _FEATURE_SLICES[target]
  is_llama3 = target.startswith('llama3')
  config = study(name)
  config.topology = training
  config.mesh.update(data=1, fsdp=-1, tensor=tensor)
  config.task.update(
      name='conversations', vocab_size=128_256 if is_llama3 else 32_000, max_length=2048,
      chat_template='llama-3' if is_llama3 else 'vicuna',
      max_examples=64_600, train_files=('{bucket}/sharegpt.jsonl',))
  config.target.init_from = f'{{bucket}}/models/{target}'
  config.target.model.update(
      dict(tie_embeddings=False, dtype='bfloat16') | FEATURE_TARGETS[target])
  config.target.weights_dtype = 'bfloat16'
  config.target.train.update(steps=0, batch_size=16)
  config.draft.model = feature_draft(draft)
  config.draft.model.update(_FEATURE_DRAFTS.get((target, draft), {}))
  config.draft.train.update(steps=0, batch_size=16)
  config.distill.update(objective='feature', data_source='fixed', control=False, seeds=(0,))
  config.distill.rollout.max_new_tokens = 512
  # Decoding would gather all weights that fsdp spreads: heads over all chips where they divide;
  # of the 33B and the 70B nothing is decoded on chips of 16 GiB while their drafts learn.
  config.distill.rollout.tensor = {'vicuna_7b': 4, 'llama3_8b': 8}.get(target, 0)
  recipe = 'eagle3' if draft == 'eagle3' else 'fspad'
  config.distill.train.update(feature_recipe(recipe), head_chunk=256)
  depth = 8 if draft == 'eagle3' else 6
  config.evaluate.update(gammas=(5,), trees=('eagle1', f'dynamic k10 d{depth} n{nodes}'),
                         max_new_tokens=512, num_prompts=480, topology=decoding,
                         weights_dtype='bfloat16')
  config.evaluate.mesh.tensor = -1
  return config


def lk_pod(name: str, target: str, draft: str) -> ml_collections.ConfigDict:
  """LK losses' own setting, of what it states: 10 epochs of 660,000 answers of the target.

  Samarin et al., arXiv 2602.23881, section 5; targets are of Llama 3.1 and 3.3. Forward KL; the
  other losses are `distill.also`.
  """
  config = feature_pod(name, target, draft)
  config.task.update(max_examples=None, train_files=('{bucket}/infinity_instruct_0625.jsonl',),
                     # With what is sampled after it a row has max_length tokens.
                     max_inputs=config.task.max_length - config.distill.rollout.max_new_tokens,
                     prompt_files=tuple(f'{{bucket}}/{name}/question.jsonl'
                                        for name in ('mt_bench', 'human_eval', 'gsm8k')))
  config.target.init_from = f'{{bucket}}/models/{_LK_TARGETS[target]}'
  config.target.model.update(rope_scaling='llama3', rope_factor=8.0)
  config.draft.model['positions' if draft in ('medusa', 'mlp') else 'unrolled_steps'] = 6
  config.distill.update(objective='forward_kl', data_source='target', normalisation='token')
  if draft == 'medusa':  # heads of 13 GB in float32, gathered in bfloat16
    config.topology = 'v5e:4x4'
  if target == 'llama3_70b':  # it writes its answers with heads over 8 chips, 18 GB on each
    config.topology = 'v5p:2x2x4'
    config.distill.rollout.tensor = 8
  if draft == 'mlp':  # embeddings and heads stay split by vocabulary
    config.mesh.update(fsdp=1, tensor=-1)
    config.draft.model.tied = True
  config.distill.train.update(
      steps=103_125, batch_size=64,
      accumulation=2 if target == 'llama3_70b' else 4 if draft == 'medusa' else 8,
      learning_rate=4e-4, schedule='cosine', warmup_steps=100, final_fraction=0.0, clip_norm=0.5,
      clip_value=None, weight_decay=0.0, remat='full')
  config.evaluate.update(gammas=(6 if draft in ('medusa', 'mlp') else 7,), trees=(),
                         num_prompts=None)
  return config


# Their twins, from scratch on embedded tasks, for two CPU cores.

# Task of a paper -> the embedded one that stands for it.
TWIN_TASKS = {
    'xsum': dict(name='stdlib_docstrings', max_length=128),
    'gsm8k': dict(name='arithmetic', metric='rouge2', max_length=96, max_examples=9_000),
    'lm1b': dict(name='stdlib_docs', max_length=64, prompt_length=12),
}


def distillspec_twin(name: str, task_name: str) -> ml_collections.ConfigDict:
  """A pair of 2.0M and 0.2M on the embedded task that stands for one of DistillSpec's.

  T5 models for XSum. Quality of word problems is ROUGE-2 against the worked solution: a target
  of this size seldom gets the answer right.
  """
  config = study(name)
  config.task.update(TWIN_TASKS[task_name])
  if task_name == 'xsum':
    config.target.model, config.draft.model = t5(), t5()
    config.target.model.update(num_encoder_layers=2, num_decoder_layers=4, width=144, num_heads=3,
                               head_dim=48, mlp_width=288)
    config.draft.model.update(num_encoder_layers=1, num_decoder_layers=1, width=64, num_heads=2,
                              head_dim=32, mlp_width=128)
  else:
    config.target.model.update(num_layers=4, width=192, num_heads=3, num_kv_heads=3, head_dim=64,
                               mlp_width=528)
    config.draft.model.update(num_layers=1, width=96, num_heads=2, num_kv_heads=2, head_dim=48,
                              mlp_width=256)
  config.target.train.update(steps=400, learning_rate=2e-3, warmup_steps=40, eval_every=200)
  config.draft.train.update(steps=400, learning_rate=4e-3, eval_every=200, checkpoint_every=200)
  config.distill.seeds = (0, 1, 2)
  config.distill.rollout.max_new_tokens = 24 if task_name == 'xsum' else 48
  # Fewer steps, or 3e-3, leave the draft where it began.
  config.distill.train.update(steps=400, batch_size=8, learning_rate=2e-3, eval_every=200,
                              checkpoint_every=200)
  config.evaluate.update(gammas=(7,), num_prompts=24,
                         max_new_tokens=32 if task_name == 'xsum' else 48)
  return config


def feature_twin(name: str, draft: str, **fields) -> ml_collections.ConfigDict:
  """A feature-level draft of a target of 3.8M on running text, by its paper's own loss."""
  config = study(name)
  config.task.update(name='stdlib_docs', max_length=64, prompt_length=12)
  # Eight layers: of fewer, EAGLE-3's three would not be apart.
  config.target.model.update(num_layers=8, width=192, num_heads=3, num_kv_heads=3, head_dim=64,
                             mlp_width=528)
  config.target.train.update(steps=500, learning_rate=1.5e-3, warmup_steps=40, eval_every=250)
  config.draft.model = feature_draft(draft)
  config.draft.model.update(fields)
  config.draft.train.steps = 0
  config.distill.update(objective='feature', data_source='fixed', seeds=(0, 1, 2), control=False)
  config.distill.rollout.max_new_tokens = 48
  config.distill.train.update(steps=200, learning_rate=1e-3, schedule='linear', clip_norm=None,
                              clip_value=0.5, final_fraction=0.0, eval_every=100,
                              checkpoint_every=100)
  config.evaluate.update(gammas=(5,), trees=('dynamic k10 d6 n59',), num_prompts=16)
  return config


def lk_twin(name: str, draft: str, width: int = 128) -> ml_collections.ConfigDict:
  """A feature-level draft by forward KL on the target's own text; 4,096 tokens of vocabulary.

  TVD's failure from scratch scales with the vocabulary over the tokens that matter, and a small
  one hides it.
  """
  config = study(name)
  config.task.update(name='stdlib_docs', vocab_size=4096, max_length=64, prompt_length=12)
  config.target.model.update(num_layers=4, width=width, num_heads=width // 64,
                             num_kv_heads=width // 64, head_dim=64, mlp_width=11 * width // 4)
  config.target.train.update(steps=400, learning_rate=2e-3, warmup_steps=40, eval_every=200)
  config.draft.model = feature_draft(draft)
  heads = draft in ('medusa', 'mlp')
  config.draft.model['positions' if heads else 'unrolled_steps'] = 4
  if draft == 'mlp':
    config.draft.model.inner_width = width
  config.draft.train.steps = 0
  config.distill.update(objective='forward_kl', data_source='target', normalisation='token',
                        control=False, seeds=(0, 1, 2))
  config.distill.rollout.max_new_tokens = 48
  config.distill.train.update(steps=120, batch_size=8, learning_rate=2e-3, warmup_steps=20,
                              clip_norm=0.5, eval_every=60, checkpoint_every=60, head_chunk=24)
  config.evaluate.update(gammas=(4,) if heads else (5,), num_prompts=24)
  return config


# A file that stands for a table of a paper has
#   CELLS: of each scale ('' is full scale, 'small' its twin) the names of its studies, in order;
#   get_config(arg): '' or 'small' for the first study, 'xsum' or 'small,xsum' for a named one;
#   get_sweep(arg): of a scale, the overrides that make each study of the first one;
#   baseline(cell): fields of the line that a cell's lines are compared with;
#   PUBLISHED: what the paper found, as `published` gives it.


def cell_of(arg: str, cells: dict) -> tuple:
  """Scale and cell of an argument.

  Args:
    arg: of `get_config`.
    cells: names of each scale.

  Raises:
    ValueError: no such scale or cell.
  """
  words = [word for word in arg.split(',') if word]
  scale = words.pop(0) if words and words[0] in cells else ''
  if len(words) > 1 or (words and words[0] not in cells[scale]):
    raise ValueError(f"{arg!r} names no study; there are, full scale, {', '.join(cells[''])}, and, "
                     f"behind 'small,', {', '.join(cells['small'])}")
  return scale, words[0] if words else cells[scale][0]


def scale_of(arg: str, cells: dict) -> str:
  """The scale of a sweep. Raises ValueError if the argument names a single cell, or nothing."""
  cell_of(arg, cells)
  if arg not in cells:
    raise ValueError(f"a sweep goes over all cells of '' or 'small', and the config's argument is "
                     f'{arg!r}; leave the cell out')
  return arg


def overrides(first: ml_collections.ConfigDict, other: ml_collections.ConfigDict,
              path: str = '') -> dict:
  """What turns one study into another; a `model` is taken whole, since its fields may differ."""
  found = {}
  for name in other:
    place, old, new = f'{path}{name}', first[name], other[name]
    both = all(isinstance(value, ml_collections.ConfigDict) for value in (old, new))
    if both and name != 'model':
      found.update(overrides(old, new, f'{place}.'))
    elif (old.to_dict() != new.to_dict()) if both else old != new:
      found[place] = new
  return found


def sweep(studies: dict, taken: dict | None = None) -> list:
  """The cells of a table, as overrides of the first.

  Args:
    studies: the study of each cell by its name, in order.
    taken: cell -> model -> (an earlier cell, the model's folder in it): what is not trained
      again. `{sweep}` is the folder that holds the cells.
  """
  names, made = list(studies), []
  for name, config in studies.items():
    cell = overrides(studies[names[0]], config)
    for which, (earlier, folder) in (taken or {}).get(name, {}).items():
      cell.update({f'{which}.init_from': f'{{sweep}}/cell-{names.index(earlier)}/{folder}',
                   f'{which}.train.steps': 0})
    made.append(cell)
  return made


def sweep_on_one_target(arg: str, cells: dict, study) -> list:
  """Studies of all cells; the twin's target is trained once, at full scale it is imported."""
  names = cells[scale_of(arg, cells)]
  shared = {name: dict(target=(names[0], 'target')) for name in names[1:]} if arg else {}
  return sweep({name: study(arg, name) for name in names}, shared)


MEAN = 'mean of categories'  # the category of a line in which each of them has as much weight


def published(figure: str, source: str, trust: str, columns: tuple, lines: tuple) -> tuple:
  """Figures of a printed table, one dict each.

  Args:
    figure: what is printed, as 'block efficiency'.
    source: table or figure, and paper.
    trust: how well it is known: paper, authors' code, secondary, derived.
    columns: of each column what it is about: cell, temperature, category, gamma, tree, rule,
      epsilon, objective, data_source.
    lines: (what the line is about, its values); None where a figure is not known.
  """
  for about, values in lines:
    if len(values) != len(columns):
      raise ValueError(f'{source}: the line {about} has {len(values)} values for {len(columns)} '
                       'columns')
  return tuple(dict(column | about, figure=figure, value=value, source=source, trust=trust)
               for about, values in lines for column, value in zip(columns, values))
