"""A fine-tuning of InternLM-7B as releases of 2023 write it: flat constants, dicts, one file."""

import os

JOB_NAME = 'seven'
ALERTS = False

SEQ_LEN = 2048
HIDDEN_SIZE = 4096
NUM_ATTENTION_HEAD = 32
MLP_RATIO = 8 / 3
NUM_LAYER = 32
VOCAB_SIZE = 103168
SAVE_EVERY = 50

ckpt = dict(
    enable_save_ckpt=True,
    save_ckpt_folder='local:runs/seven',
    load_ckpt_folder='local:runs/older/',
    load_ckpt_info=dict(
        path=f'local:runs/{JOB_NAME}_base', content=('model',), ckpt_type='internlm'
    ),
    checkpoint_every=SAVE_EVERY,
    async_upload=True,
    async_upload_tmp_folder='/dev/shm/somewhere/',
    oss_snapshot_freq=int(SAVE_EVERY / 2),
    stop_file_path=None,
)

data = dict(
    seq_len=SEQ_LEN,
    micro_num=4,
    micro_bsz=2,
    valid_micro_num=4,
    valid_every=50,
    pack_sample_into_one=False,
    total_steps=50000,
    skip_batches='1-3,5',
    rampup_batch_size='1 1 100',
    min_length=50,
    train_folder='/data/train',
    valid_folder='/data/valid',
    empty_cache_and_diag_interval=10,
    diag_outlier_ratio=1.1,
)

grad_scaler = dict(
    fp16=dict(initial_scale=2**16, min_scale=1, growth_interval=1000),
    growth_factor=2,
    backoff_factor=0.5,
    max_scale=2**24,
    hysteresis=2,
)

hybrid_zero_optimizer = dict(
    overlap_sync_grad=True,
    overlap_sync_param=True,
    reduce_bucket_size=512 * 1024 * 1024,
    clip_grad_norm=1.0,
)

loss = dict(label_smoothing=0)

adam = dict(
    lr=1e-4, adam_beta1=0.9, adam_beta2=0.95, adam_beta2_c=0, adam_eps=1e-8, weight_decay=0.01
)

lr_scheduler = dict(
    total_steps=data['total_steps'], init_steps=0, warmup_ratio=0.01, eta_min=1e-5, last_epoch=-1
)

beta2_scheduler = dict(init_beta2=adam['adam_beta2'], c=adam['adam_beta2_c'], cur_iter=-1)

model = dict(
    checkpoint=False,
    num_attention_heads=NUM_ATTENTION_HEAD,
    embed_split_hidden=True,
    vocab_size=VOCAB_SIZE,
    embed_grad_scale=1,
    parallel_output=True,
    hidden_size=HIDDEN_SIZE,
    num_layers=NUM_LAYER,
    mlp_ratio=MLP_RATIO,
    apply_post_layer_norm=False,
    dtype='torch.bfloat16',
    norm_type='rmsnorm',
    layer_norm_epsilon=1e-5,
    use_flash_attn=True,
    num_chunks=1,
)

parallel = dict(
    zero1=8,
    tensor=1,
    pipeline=dict(size=1, interleaved_overlap=True),
    sequence_parallel=False,
)

cudnn_deterministic = False
cudnn_benchmark = False

monitor = dict(alert=dict(enable_feishu_alert=ALERTS, feishu_alert_address=None))
