"""Keys of InternLM's and InternEvo's configs that have no key of ours, each with the reason.

Keys that do become something of ours are in `internlm_config.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

FAMILIES = {
    'INTERNLM': 'InternLM',
    'INTERNLM2_PUBLIC': 'InternLM2',
    'INTERNLM2': 'InternLM2',
    'INTERNLM3': 'InternLM3',
    'LLAMA2': 'Llama',
}
"""Class of ours for each `model_type`."""

DTYPES = {
    'torch.bfloat16': 'bfloat16',
    'torch.float16': 'float16',
    'torch.half': 'float16',
    'torch.float32': 'float32',
    'torch.tf32': 'float32',
}
"""`strategy.precision.param` for each `model.dtype`."""


@dataclass(frozen=True, slots=True)
class Dropped:
    """A key without a key of ours.

    Attributes:
        reason: Why it is not needed.
        only: Values with which nothing is lost; empty if that is so with all.
        otherwise: What is lost with another value.
        refused: Whether another value is an error, since it is another model.
    """

    reason: str
    only: tuple[Any, ...] = ()
    otherwise: str = ''
    refused: bool = False


def _only(*values: Any, reason: str, otherwise: str) -> Dropped:
    return Dropped(reason, values, otherwise)


def _must(*values: Any, otherwise: str) -> Dropped:
    return Dropped('as here', values, otherwise, refused=True)


_STATE = 'state of a run, not an option: checkpoints keep it'
_INIT = _only(0.02, reason='as here', otherwise='matrices are drawn as the family is published')
_LOGS = 'logs and curves lie in WORK_DIR/TIMESTAMP'
_ALERT = 'no alerts: a hook of your own sends them (docs/en/hooks.md)'
_DIAGNOSIS = 'no diagnosis inside a run; a lost rank is named by the others (docs/en/launch.md)'
_BUCKETS = 'FSDP2 reduces layer by layer, behind the backward'
_NO_MOE = _only(1, reason='a dense model', otherwise='no experts here')
_NO_MOE_OPTION = Dropped('an option of mixtures of experts, which are not here')

DROPPED: dict[str, Dropped] = {
    'DO_ALERT': Dropped(_ALERT),
    'alert_address': Dropped(_ALERT),
    'monitor': Dropped(_ALERT),
    'monitor.alert': Dropped(_ALERT),
    'monitor.tensorboard': Dropped('TensorBoard writes as MMEngine sets it up'),
    'tensorboard_folder': Dropped(_LOGS),
    'resume_tb_folder': Dropped('a resumed run is one curve: tools/analyze_logs.py'),
    'use_fp32_norm': Dropped('norms are computed in fp32 and all masters are fp32, always'),
    'metric_dtype': Dropped('losses are summed in fp32, always'),
    'gradient_handler': Dropped('gradients of shared parameters are summed where they are made'),
    'grad_profiling': Dropped('a hook can read gradients in after_backward (docs/en/hooks.md)'),
    'generation': Dropped('generation is `tools/chat.py` and Python (docs/en/python_api.md)'),
    'diagnosis': Dropped(_DIAGNOSIS),
    # ---------------------------------------------------------------------------------- ckpt
    'ckpt.load_optimizer': Dropped('an optimizer state of InternLM cannot be read; weights can'),
    'ckpt.async_upload_tmp_folder': Dropped('background saves write to the work dir itself'),
    'ckpt.oss_snapshot_freq': Dropped('no snapshots: checkpoints are whole or not there at all'),
    'ckpt.snapshot_ckpt_folder': Dropped('no snapshots, see ckpt.oss_snapshot_freq'),
    'ckpt.stop_file_path': Dropped('SIGTERM or Ctrl-C saves and stops (docs/en/launch.md)'),
    'ckpt.universal_ckpt': Dropped('every checkpoint loads on every layout'),
    'ckpt.enable_internevo2hf_ckpt': Dropped('tools/convert2hf.py, after the run'),
    # ---------------------------------------------------------------------------------- data
    'data.type': _only('tokenized', reason='token files', otherwise='token files are all there is'),
    'data.packed_length': Dropped('ignored by the original too: it is micro_bsz x seq_len'),
    'data.batch_size': Dropped('internal to the original: it is micro_num'),
    'data.valid_micro_num': Dropped('how evaluation is cut does not change its result'),
    'data.empty_cache_and_diag_interval': Dropped(_DIAGNOSIS),
    'data.diag_outlier_ratio': Dropped(_DIAGNOSIS),
    'data.use_packed_dataset': Dropped('rows are always packed; attention minds the documents'),
    'data.fixed_random_dataset_seqlen': Dropped('rows of random tokens are full'),
    'data.pack_sample_into_one': _only(
        False,
        reason='as here: no document sees another',
        otherwise='documents of a row never see each other here; the original let them, and '
        'cut at seq_len only',
    ),
    'data.min_length_dict': _only(
        {},
        None,
        reason='one minimum for all',
        otherwise='one minimum for all data; tools/preprocess_data.py --min-document-length on '
        'each kind of text gives several',
    ),
    # ----------------------------------------------------------------------------- optimizer
    'hybrid_zero_optimizer.overlap_sync_grad': Dropped(_BUCKETS),
    'hybrid_zero_optimizer.zero_overlap_communication': Dropped(_BUCKETS),
    'hybrid_zero_optimizer.reduce_bucket_size': Dropped(_BUCKETS),
    'hybrid_zero_optimizer.cpu_offload': _only(
        False,
        None,
        reason='the original does not use it',
        otherwise='strategy.offload=True does it',
    ),
    'adam.adam_beta2_c': Dropped('the original reads beta2_scheduler.c'),
    'lr_scheduler.init_steps': _only(
        0,
        reason='no steps of rate 0',
        otherwise='steps of rate 0 before the warm-up train nothing: the warm-up begins at once',
    ),
    'lr_scheduler.last_epoch': Dropped(_STATE),
    'beta2_scheduler.cur_iter': Dropped(_STATE),
    'loss.op_type': Dropped('one cross-entropy, cut along the vocabulary where the head is'),
    'loss.moe_loss_coeff': _NO_MOE_OPTION,
    # --------------------------------------------------------------------------------- model
    'model.parallel_output': Dropped('the loss is always taken from the cut logits'),
    'model.embed_split_hidden': Dropped('the embedding is cut along the vocabulary; same result'),
    'model.apply_post_layer_norm': Dropped('ignored by the original too'),
    'model.dropout_selective_checkpoint': Dropped('there is no dropout to recompute'),
    'model.activation_offload': Dropped('strategy.recompute, strategy.offload'),
    'model.mlp_layer_fusion': Dropped('layout of weights in memory; import and export know it'),
    'model.enable_qkv_fusion': Dropped('layout of weights in memory; import and export know it'),
    'model.adapt_hf': Dropped('order of rotary pairs on disk; import and export know it'),
    'model.qk_interleaved': Dropped('order of rotary pairs on disk; import and export know it'),
    'model.embed_grad_scale': _only(
        1,
        reason='as here',
        otherwise='gradients of embedding and head are not scaled',
    ),
    'model.drop_rate': _only(0, reason='as here', otherwise='there is no dropout here'),
    'model.attn_drop_rate': _only(0, reason='as here', otherwise='there is no dropout here'),
    'model.use_scaled_init': _only(
        True, reason='as here', otherwise='o and down projections are scaled by depth, always'
    ),
    'model.residual_in_fp32': _only(
        False, reason='as here', otherwise='the residual stream has the dtype of the layers'
    ),
    'model.norm_head': _only(
        False,
        reason='as here',
        otherwise='the head is not normalised in every forward: another loss from the first step. '
        'Released weights have the norm in them, so going on from those is right',
    ),
    'model.init_type': _only('normal', reason='as here', otherwise='weights are drawn normally'),
    'model.norm_type': _must('rmsnorm', otherwise='every family here has RMSNorm'),
    'model.use_swiglu': _must(True, otherwise='every family here has a SwiGLU'),
    'model.is_reward': _must(False, otherwise='reward models are not in this release'),
    'model.deepnorm': _must(False, otherwise='the original raises as well'),
    'model.num_experts': _must(1, 0, None, otherwise='mixtures of experts are not supported'),
    'model.moe_use_residual': _NO_MOE_OPTION,
    'model.moe_type': _NO_MOE_OPTION,
    'moe': _NO_MOE_OPTION,
    'model.embedding_init_std': _INIT,
    'model.attn_wqkv_init_std': _INIT,
    'model.attn_other_init_std': _INIT,
    'model.ffn_uplayer_init_std': _INIT,
    'model.ffn_other_init_std': _INIT,
    'model.out_head_init_std': _INIT,
    # ------------------------------------------------------------------------------ parallel
    'parallel.sequence_parallel': Dropped('always, with parallel.tensor'),
    'parallel.tensor.mode': Dropped('read with parallel.tensor'),
    'parallel.pipeline.interleaved_overlap': Dropped('messages overlap in every schedule'),
    'parallel.weight.overlap': Dropped('gathering ahead of a layer is always on'),
    'parallel.weight.memory_pool': Dropped("PyTorch's allocator"),
    'parallel.weight.launch_allgather_before': Dropped('gathering ahead is always on'),
    'parallel.weight.forward_overlap_per': Dropped('gathering ahead is by layer'),
    'parallel.expert': _NO_MOE_OPTION,
    'parallel.expert_weight': _NO_MOE_OPTION,
    'parallel.sequence_2D': Dropped('strategy.parallel.context, strategy.context_attention'),
}
"""By dotted key; a key of a dict stands for everything inside it."""

CONSTANTS = {
    'SEQ_LEN': 'data.seq_len',
    'HIDDEN_SIZE': 'model.hidden_size',
    'NUM_ATTENTION_HEAD': 'model.num_attention_heads',
    'NUM_KV_ATTENTION_HEAD': 'model.num_kv_attention_heads',
    'MLP_RATIO': 'model.mlp_ratio',
    'MULTIPLE_OF': 'model.multiple_of',
    'NUM_LAYER': 'model.num_layers',
    'VOCAB_SIZE': 'model.vocab_size',
    'MICRO_NUM': 'data.micro_num',
    'MICRO_BSZ': 'data.micro_bsz',
    'TOTAL_STEP': 'data.total_steps',
    'CHECKPOINT_EVERY': 'ckpt.checkpoint_every',
    'TRAIN_FOLDER': 'data.train_folder',
    'VALID_FOLDER': 'data.valid_folder',
    'SAVE_CKPT_FOLDER': 'ckpt.save_ckpt_folder',
    'LOAD_CKPT_FOLDER': 'ckpt.load_ckpt_folder',
    'MODEL_ONLY_FOLDER': 'ckpt.load_ckpt_info.path',
}
"""Constants that configs define by custom, with the key that counts."""

ALWAYS = (
    'weight decay is for matrices only; the original decays norms and biases, too',
    "the loss is the mean over all trained tokens of a step; the original's is a mean of the "
    "micro-batches' means",
    'gradients are summed in fp32 and clipped by their one global norm',
    'documents are cut at seq_len, and rows hold seq_len tokens, where the original packs '
    'micro_bsz x seq_len into one',
)
"""What differs whatever the config says; docs/en/migration.md has the reasons."""
