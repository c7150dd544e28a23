from internlm_mm.utils.adapters import is_adapter, layer_of


def test_names_are_told_apart() -> None:
    layer = 'layers.0.mlp.up_proj'
    for part in ('lora_A.weight', 'lora_B.weight', 'lora_magnitude_vector.weight'):
        assert is_adapter(f'{layer}.{part}') and layer_of(f'{layer}.{part}') == layer
    assert not is_adapter(f'{layer}.weight') and layer_of(f'{layer}.weight') == layer
