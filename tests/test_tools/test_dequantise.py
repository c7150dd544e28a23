"""The command line; what it writes is tested in test_checkpoint/test_awq.py."""

import json

import torch
from safetensors.torch import load_file, save_file

from tools.dequantise import main


def test_a_folder(tmp_path, capsys):
    folder, out = tmp_path / 'awq', tmp_path / 'plain'
    folder.mkdir()
    said = dict(quant_method='awq', version='gemm', bits=4, group_size=8, zero_point=True)
    (folder / 'config.json').write_text(json.dumps({'quantization_config': said}))
    # 0x11111111: ones everywhere; a zero point of 0; steps of 0.5.
    parts = dict(
        qweight=torch.full((8, 1), 0x11111111, dtype=torch.int32),
        qzeros=torch.zeros(1, 1, dtype=torch.int32),
        scales=torch.full((1, 8), 0.5),
    )
    state = {f'proj.{name}': part for name, part in parts.items()}
    save_file(state, folder / 'model.safetensors')
    assert main([str(folder), str(out), '--dtype', 'float16']) == 0
    assert capsys.readouterr().out == f'written: {out}\n'
    held = load_file(out / 'model.safetensors')
    assert torch.equal(held['proj.weight'], torch.full((8, 8), 0.5).half())
    assert main([str(folder), str(out)]) == 2
    assert 'exists' in capsys.readouterr().err
