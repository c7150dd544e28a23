"""A run of seconds in InternLM's words: two layers, two steps, random data."""

JOB_NAME = 'tiny'
SEQ_LEN = 32

ckpt = dict(enable_save_ckpt=False, auto_resume=False)

data = dict(
    seq_len=SEQ_LEN,
    micro_num=2,
    micro_bsz=2,
    valid_every=0,
    pack_sample_into_one=False,
    total_steps=2,
    skip_batches='',
    rampup_batch_size='',
    min_length=0,
    train_folder=None,
    valid_folder=None,
)

hybrid_zero_optimizer = dict(
    overlap_sync_grad=True, overlap_sync_param=False, reduce_bucket_size=1024, clip_grad_norm=1.0
)
loss = dict(label_smoothing=0.1)
adam = dict(
    lr=1e-2, adam_beta1=0.9, adam_beta2=0.95, adam_beta2_c=0.8, adam_eps=1e-8, weight_decay=0.01
)
lr_scheduler = dict(
    total_steps=data['total_steps'], init_steps=0, warmup_ratio=0.5, eta_min=1e-3, last_epoch=-1
)
beta2_scheduler = dict(init_beta2=adam['adam_beta2'], c=adam['adam_beta2_c'], cur_iter=-1)

model = dict(
    checkpoint=0.5,
    num_attention_heads=2,
    vocab_size=64,
    hidden_size=32,
    num_layers=2,
    mlp_ratio=8 / 3,
    multiple_of=8,
    dtype='torch.float32',
    norm_type='rmsnorm',
    layer_norm_epsilon=1e-5,
    use_flash_attn=False,
    num_chunks=1,
)
parallel = dict(zero1=-1, tensor=1, pipeline=1)
