"""The command line; what it writes is tested in test_checkpoint/test_gguf.py."""

import pytest
from gguf import GGUFReader

from tests.gguf_reference import llama_folder
from tests.trained import trained_run
from tools.convert2gguf import main
from tools.convert2hf import main as convert2hf

pytestmark = pytest.mark.filterwarnings('ignore:torch.distributed is disabled:UserWarning')


def test_an_export_becomes_a_file(tmp_path, capsys):
    work_dir, _, _ = trained_run(tmp_path)
    folder, out = tmp_path / 'hf', tmp_path / 'model.gguf'
    assert convert2hf([str(work_dir), str(folder)]) == 0
    assert main([str(folder), str(out), '--dtype', 'f16']) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f'written: {out}'
    types = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(out).tensors}
    assert types['blk.0.attn_q.weight'] == 'F16'
    assert types['blk.0.attn_q.bias'] == 'F32'
    assert main([str(folder), str(out)]) == 2
    assert 'exists' in capsys.readouterr().err
    assert main([str(folder), str(out), '--overwrite']) == 0


def test_no_tokenizer(tmp_path, capsys):
    folder = llama_folder(tmp_path / 'folder', None)
    assert main([str(folder), str(tmp_path / 'model.gguf')]) == 2
    assert 'has no tokenizer.model' in capsys.readouterr().err
    assert not (tmp_path / 'model.gguf').exists()


def test_no_such_dtype(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(['folder', 'out.gguf', '--dtype', 'q4_0'])
    assert stopped.value.code == 2
    assert 'f16' in capsys.readouterr().err
