from __future__ import annotations

import pytest
import torch
from ranks import Ranks, Runs
from run_log import read_log

from lumos.training.muon import Muon, layer_matrices, orthogonal


def test_singular_values_come_near_one_and_directions_stay():
    torch.manual_seed(0)
    for shape in ((3, 40, 24), (2, 24, 40), (1, 8, 8)):
        matrices = torch.randn(shape)
        u, _, vh = torch.linalg.svd(matrices, full_matrices=False)
        middle = u.mT @ orthogonal(matrices) @ vh.mT
        values = middle.diagonal(dim1=1, dim2=2)
        assert values.min() > 0.5 < 1.3 > values.max()
        assert (middle - torch.diag_embed(values)).abs().max() < 1e-4


def test_products_of_half_precision_give_nearly_the_same():
    torch.manual_seed(0)
    matrices = torch.randn(2, 24, 40)
    whole, half = orthogonal(matrices), orthogonal(matrices, half=True)
    assert half.dtype == torch.float32
    assert 0 < (half - whole).norm() / whole.norm() < 0.03


def test_a_step_is_the_published_rule_one_matrix_at_a_time():
    """An update is Nesterov momentum, five Newton-Schulz steps, 0.2 sqrt(max(m, n)) and decoupled decay; vectors use AdamW."""
    torch.manual_seed(0)
    shapes = [(6, 4), (6, 4), (4, 6), (5,)]
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    plain = [p.detach().clone() for p in ours]
    adam = torch.nn.Parameter(plain[3].clone())
    groups = [{"params": ours[:3], "muon": True, "weight_decay": 0.1}, {"params": ours[3:], "muon": False, "weight_decay": 0.0}]
    optimizer, reference = Muon(groups, lr=0.01), torch.optim.AdamW([adam], lr=0.01, weight_decay=0.0)
    momentum = [torch.zeros(shape) for shape in shapes]
    for _ in range(3):
        gradients = [torch.randn(shape) for shape in shapes]
        for p, g in zip(ours, gradients, strict=True):
            p.grad = g.clone()
        adam.grad = gradients[3].clone()
        optimizer.step()
        reference.step()
        for i in range(3):
            momentum[i] = 0.95 * momentum[i] + 0.05 * gradients[i]
            x = 0.05 * gradients[i] + 0.95 * momentum[i]
            x = x / x.norm()
            for _ in range(5):
                square = x @ x.T
                x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
            plain[i] = plain[i] * (1 - 0.01 * 0.1) - 0.01 * 0.2 * 6**0.5 * x
    for p, expected in zip(ours, [*plain[:3], adam], strict=True):
        assert torch.allclose(p, expected, atol=1e-5)


def test_which_weights_are_matrices_of_a_layer(model):
    names = layer_matrices(model)
    assert len(names) == 2 * 7
    assert all(name.startswith("model.layers.") and name.endswith("_proj.weight") for name in names)


@pytest.fixture
def muon_settings(runs: Runs):
    def make(name: str):
        settings = runs.make(runs.folder / name)
        settings.training.optimizer = "muon"
        return settings

    return make


def test_muon_resumes_bitwise_and_two_processes_train_as_one(muon_settings, runs: Runs, ranks: Ranks):
    whole = ranks.finish(muon_settings("muon"), "plain", 1)
    (process,) = ranks.train(killed := muon_settings("muon-killed"), "plain", 1, {0: [["kill_after_step", 3]]})
    assert process.code == -9
    ranks.finish(killed, "plain", 1)
    spread = ranks.finish(muon_settings("muon-spread"), "own", 2)  # of itself ZeRO 0
    for key in ("loss", "grad_norm", "val_loss_video_ema"):
        assert read_log(killed.output_dir, key) == read_log(whole, key), key
        assert read_log(spread, key) == pytest.approx(read_log(whole, key), abs=1e-3), key
    assert read_log(whole) != read_log(runs.whole("plain"))


def test_cut_matrices_are_refused(muon_settings, ranks: Ranks):
    for process in ranks.train(muon_settings("muon-cut"), "zero2", 2):
        assert process.code == 2
        assert "training.optimizer is muon, which needs whole matrices" in process.err
