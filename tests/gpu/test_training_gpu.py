"""Training on a GPU: a layer under torch.compile, and a step of distillation compiled and eager."""

from __future__ import annotations

import copy

import pytest
import torch

import distilbert_fast

LENGTHS = [5, 17, 128, 64, 33, 99, 7, 80]


@pytest.fixture
def counted():
    """torch.compile by a backend that counts its graphs."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch.compiler.reset()
    yield CompileCounterWithBackend("inductor")
    torch.compiler.reset()


def test_a_layer_compiles_for_few_lengths(counted):
    """One graph for the first length, one more with symbolic sizes for all others."""
    from transformers import DistilBertConfig

    torch.manual_seed(0)
    config = DistilBertConfig(dim=128, n_heads=4, hidden_dim=256, n_layers=1, vocab_size=50)
    block = distilbert_fast.DistilBertModel(config).transformer.layer[0].to("cuda").eval()
    step = torch.compile(block, backend=counted, fullgraph=True)
    for length in LENGTHS:
        x = torch.randn(3, length, 128, device="cuda", requires_grad=True)
        mask = torch.rand(3, 1, 1, length, device="cuda") < 0.8
        found, want = step(x, mask), block(x, mask)
        torch.testing.assert_close(found, want, rtol=1e-3, atol=1e-3)
        (dx,), (dy,) = (torch.autograd.grad(y.sum(), x) for y in (found, want))
        torch.testing.assert_close(dx, dy, rtol=1e-3, atol=1e-3)
    assert counted.frame_count <= 2


def losses(student, teacher, ids, mask, labels):
    """KL and MLM by linear_kl_div, cosine of the hidden states."""
    with torch.no_grad():
        h_t = teacher.distilbert(ids, mask).last_hidden_state.flatten(0, 1)
    h_s = student.distilbert(ids, mask).last_hidden_state.flatten(0, 1)
    x, y = (m.vocab_layer_norm(m.activation(m.vocab_transform(h))) for m, h in ((student, h_s), (teacher, h_t)))
    ours, theirs = student.vocab_projector, teacher.vocab_projector
    real = mask.flatten().bool()
    kl, ce = distilbert_fast.linear_kl_div(
        x, ours.weight, ours.bias, y.detach(), theirs.weight, theirs.bias, 2.0, real, labels.flatten()
    )
    return 5 * kl + 2 * ce + distilbert_fast.cosine_loss(h_s, h_t, real)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_compiled_step_is_the_eager_one(dtype):
    from transformers import DistilBertConfig

    torch.manual_seed(0)
    config = DistilBertConfig(
        dim=128, n_heads=4, hidden_dim=256, n_layers=2, vocab_size=1003, dropout=0.0, attention_dropout=0.0
    )
    teacher = distilbert_fast.DistilBertForMaskedLM(config).to("cuda", dtype).eval()
    eager = distilbert_fast.DistilBertForMaskedLM(config).to("cuda", dtype).train()
    compiled = copy.deepcopy(eager)
    ids = torch.randint(5, 1003, (4, 64), device="cuda")
    mask = (torch.arange(64, device="cuda") < torch.tensor([[64], [10], [33], [1]], device="cuda")).long()
    labels = torch.where(torch.rand(4, 64, device="cuda") < 0.15, ids, -100).masked_fill(mask == 0, -100)
    torch.compiler.reset()
    for model, function in ((eager, losses), (compiled, torch.compile(losses))):
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
        model.losses = []
        for _ in range(3):
            loss = function(model, teacher, ids, mask, labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            model.losses.append(loss.item())
    tolerance = 1e-3 if dtype == torch.float32 else 5e-2
    assert eager.losses == pytest.approx(compiled.losses, rel=tolerance) and eager.losses[2] < eager.losses[0]
