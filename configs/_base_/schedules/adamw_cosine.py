"""AdamW, clipped, with warm-up and a cosine down to a tenth."""

from torch.optim import AdamW

from internlm_mm.optim import DecayGroupsConstructor, HybridZeroOptimWrapper, WarmupCosine

optim_wrapper = dict(
    type=HybridZeroOptimWrapper,
    constructor=DecayGroupsConstructor,
    optimizer=dict(type=AdamW, lr=3e-4, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, fused=True),
    clip_grad=dict(max_norm=1.0),
)
param_scheduler = [dict(type=WarmupCosine, warmup=2000, min_ratio=0.1)]
