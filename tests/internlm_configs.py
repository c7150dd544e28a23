"""Configs as users of InternLM and InternEvo have them, written here after the documented keys."""

from pathlib import Path
from textwrap import dedent

FOLDER = Path(__file__).parent / 'configs' / 'internlm'
SFT_2023 = FOLDER / 'sft_2023.py'
TINY = FOLDER / 'tiny.py'

EVO_RUNTIME = """\
    cudnn_deterministic = False
    cudnn_benchmark = True
    enable_tb = False
    grad_scaler = dict(
        fp16=dict(initial_scale=2**14, min_scale=2, growth_interval=500),
        growth_factor=4,
        backoff_factor=0.25,
        max_scale=2**20,
        hysteresis=3,
    )
    """
EVO_MODEL = """\
    model_type = '{model_type}'
    HIDDEN_SIZE = 4096
    NUM_LAYER = 32
    model = dict(
        num_chunks=1,
        checkpoint=0.2,
        dtype='torch.bfloat16',
        embed_split_hidden=True,
        num_layers=NUM_LAYER,
        hidden_size=HIDDEN_SIZE,
        vocab_size=92544,
        embed_grad_scale=1,
        parallel_output=True,
        num_attention_heads=32,
        num_kv_attention_heads=8,
        mlp_ratio=3.5,
        multiple_of=256,
        norm_type='rmsnorm',
        adapt_hf=False,
        apply_post_layer_norm=False,
        no_bias=True,
        layer_norm_epsilon=1e-5,
        rope_base=1000000,
        norm_head=False,
    )
    hybrid_zero_optimizer = dict(
        overlap_sync_grad=True,
        overlap_sync_param=False,
        reduce_bucket_size=512 * 1024 * 1024,
        clip_grad_norm=1.0,
    )
    parallel = dict(
        zero1=dict(size=8),
        tensor=dict(size=2, mode='msp'),
        pipeline=dict(size=2, interleaved_overlap=True),
        weight=dict(size=1, overlap=True, memory_pool=True),
    )
    """
EVO_LEAF = """\
    from internlm.utils.utils import read_base

    with read_base():
        from configs._base_.default_runtime import *
        from configs._base_.models.seven_B import *

    JOB_NAME = 'evo'
    SEQ_LEN = 4096
    MLP_RATIO = 8 / 3  # left over from another file, as in the original's demonstration
    ckpt = dict(
        enable_save_ckpt=True,
        save_ckpt_folder='boto3:s3://bucket.10.0.0.1/evo',
        load_ckpt_info=dict(path=None, content=('model',), ckpt_type='internevo'),
        auto_resume=False,
        checkpoint_every=100,
    )
    data = dict(
        seq_len=SEQ_LEN, micro_num=4, micro_bsz=1, valid_every=0, pack_sample_into_one=True,
        total_steps=1000, skip_batches='', rampup_batch_size='', min_length=0,
        min_length_dict={{'code': 10}}, train_folder='/data', valid_folder=None,
        fixed_random_dataset_seqlen=True, use_packed_dataset=True,
    )
    loss = dict(label_smoothing=0, op_type='py_vocab_parallel')
    adam = dict(lr=3e-4, adam_beta1=0.9, adam_beta2=0.95, adam_beta2_c=0, adam_eps=1e-8,
                weight_decay=0.1)
    lr_scheduler = dict(total_steps=2000, init_steps=10, warmup_ratio=0.025, eta_min=3e-5)
    beta2_scheduler = dict(init_beta2=0.98, c=0, cur_iter=-1)
    monitor = dict(alert=dict(enable_feishu_alert=False), tensorboard=dict(queue_max_length=10))
    model['no_biass'] = True
    mesage = 'hello'
    """


def write_evo(folder: Path, model_type: str = 'LLAMA2', leaf: str = '', model: str = '') -> Path:
    """An InternEvo config with its bases; the leaf.

    Args:
        folder: Where the tree goes.
        model_type: Of the model.
        leaf: Lines to add to the leaf.
        model: Lines to add to the base of the model.
    """
    files = {
        'configs/_base_/default_runtime.py': EVO_RUNTIME,
        'configs/_base_/models/seven_B.py': EVO_MODEL.replace('{model_type}', model_type),
        'configs/evo.py': EVO_LEAF.replace('{{', '{').replace('}}', '}'),
    }
    more = {'configs/_base_/models/seven_B.py': model, 'configs/evo.py': leaf}
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(dedent(text) + dedent(more.get(name, '')), encoding='utf-8')
    return folder / 'configs' / 'evo.py'
