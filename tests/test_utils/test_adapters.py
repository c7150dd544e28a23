from internlm_mm.utils.adapters import is_adapter, is_score, layer_of, names_held


def test_names_are_told_apart() -> None:
    layer = 'layers.0.mlp.up_proj'
    for part in ('lora_A.weight', 'lora_B.weight', 'lora_magnitude_vector.weight'):
        assert is_adapter(f'{layer}.{part}') and layer_of(f'{layer}.{part}') == layer
    assert not is_adapter(f'{layer}.weight') and layer_of(f'{layer}.weight') == layer


def test_what_a_checkpoint_must_hold() -> None:
    base, lora, score = 'model.norm.weight', 'model.q.lora_A.weight', 'model.objective.score.weight'
    assert is_score(score) and is_score('objective.score.weight') and not is_score(base)
    head = 'model.lm_head.weight'
    assert names_held([base], [base]) == [base]
    assert names_held([base], []) == [base]  # and so it is missed
    assert names_held([base, lora], [base]) == [base]
    assert names_held([base, lora], [lora]) == [lora]
    assert names_held([base, lora], [base, lora]) == [base, lora]
    assert names_held([base, score], [base, head]) == [base]  # it begins anew
    assert names_held([base, score], [base, score]) == [base, score]
    assert names_held([base, lora, score], [lora]) == [lora]
    assert names_held([base, lora, score], [lora, score]) == [lora, score]
    assert names_held([base, lora, score], [base]) == [base]
