"""A step of distilling BERT-base into DistilBERT: 16,384 tokens, forward and backward, bf16, no optimizer.

    loss = 5 · KL + 2 · MLM + 1 · cosine        τ = 2; KL and cosine over all tokens, MLM over the 15% that are masked

Original form: both [N, V] logits, F.kl_div of their softmaxes, cross-entropy, CosineEmbeddingLoss, as DistilBERT's own
distiller computes them, in eager mode and compiled. Ours: the drop-in student, the teacher by ``optimize``,
linear_kl_div and cosine_loss. Sanh, Debut, Chaumond, Wolf: DistilBERT, arXiv:1910.01108.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch

import distilbert_fast
from bench.gpu.measure import Case, Work, compiled, run
from bench.gpu.records import Records, Where
from bench.harness.contest import forgetting
from bench.step.original import ALPHA_CE, ALPHA_COS, ALPHA_MLM, TEMPERATURE, original_loss

DTYPE, LENGTH = torch.bfloat16, 128
ROUNDS = 5


def step(where: Where, records: Records) -> None:
    batch = where.size(128, 2)
    length = where.size(LENGTH, 7)
    torch.manual_seed(0)
    student, original, teacher = make_models(where)
    vocabulary = student.config.vocab_size
    ids = torch.randint(0, vocabulary, (batch, length), device=where.device)
    masked = torch.rand(batch * length, device=where.device) < 0.15
    labels = torch.randint(0, vocabulary, (batch * length,), device=where.device).masked_fill(~masked, -100)
    engine = distilbert_fast.optimize(copy.deepcopy(teacher.bert))

    forget = forgetting(*student.parameters(), *original.parameters())

    def stepping(loss: Callable[..., torch.Tensor], model: Any, *arguments: Any) -> Callable[[], Any]:
        def call():
            value = loss(model, *arguments)
            value.backward()
            return value, model.vocab_projector.weight.grad, model.distilbert.embeddings.word_embeddings.weight.grad

        return call

    operations = _operations(student, teacher, batch * length, length)
    case = Case("distillation step", f"{batch} x {length} tokens, bf16", Work(operations), "original", 0.1, forget)
    case.calls["ours"] = stepping(our_loss, student, engine, teacher, ids, labels, None)
    case.calls["ours, KL on the masked rows"] = stepping(our_loss, student, engine, teacher, ids, labels, masked)
    case.calls["original"] = stepping(rival_loss, original, teacher, ids, labels)
    with compiled() as compile:
        case.rival(
            where,
            "original, torch.compile",
            lambda: stepping(compile(rival_loss), original, teacher, ids, labels),
            compiled=True,
        )
        run(case, where, records, ROUNDS)


def make_models(where: Where) -> tuple[Any, Any, Any]:
    """A student of our class and one of transformers' with the same random weights, and the teacher."""
    from transformers import BertConfig, BertForMaskedLM, DistilBertConfig, DistilBertForMaskedLM

    tiny_student = dict(vocab_size=97, dim=24, n_heads=3, n_layers=2, hidden_dim=40)
    tiny_teacher = dict(vocab_size=97, hidden_size=24, num_attention_heads=3, num_hidden_layers=3, intermediate_size=40)
    plain = dict(dropout=0.0, attention_dropout=0.0)  # dropout draws differently in each form
    config = DistilBertConfig(**where.size({}, tiny_student), **plain)
    original = DistilBertForMaskedLM(config)
    student = distilbert_fast.DistilBertForMaskedLM(copy.deepcopy(config))
    student.load_state_dict(original.state_dict())
    teacher = BertForMaskedLM(BertConfig(**where.size({}, tiny_teacher))).eval()
    return tuple(model.to(where.device, DTYPE) for model in (student.train(), original.train(), teacher))


def our_loss(student: Any, engine: Any, teacher: Any, ids: Any, labels: Any, kd_mask: Any) -> torch.Tensor:
    with torch.no_grad():
        h_t = engine(ids).last_hidden_state.flatten(0, 1)  # [N, C]
        transformed = teacher.cls.predictions.transform(h_t)
    h_s = student.distilbert(ids).last_hidden_state.flatten(0, 1)
    x = student.vocab_layer_norm(student.activation(student.vocab_transform(h_s)))
    ours, theirs = student.vocab_projector, teacher.cls.predictions.decoder
    kl, ce = distilbert_fast.linear_kl_div(
        x, ours.weight, ours.bias, transformed, theirs.weight, theirs.bias, TEMPERATURE, kd_mask, labels
    )
    return ALPHA_CE * kl + ALPHA_MLM * ce + ALPHA_COS * distilbert_fast.cosine_loss(h_s, h_t)


def rival_loss(student: Any, teacher: Any, ids: Any, labels: Any) -> torch.Tensor:
    with torch.no_grad():
        theirs = teacher(ids, output_hidden_states=True)
    return original_loss(student(ids, output_hidden_states=True), theirs, labels)


def _operations(student: Any, teacher: Any, tokens: int, length: int) -> float:
    """Two a product, once for the teacher, three times for the student; attention's included."""

    def forward(model: Any, layers: int, c: int, f: int) -> float:
        return tokens * (layers * (2 * (4 * c * c + 2 * c * f) + 4 * length * c) + 2 * c * model.config.vocab_size)

    s, t = student.config, teacher.config
    return 3 * forward(student, s.n_layers, s.dim, s.hidden_dim) + forward(
        teacher, t.num_hidden_layers, t.hidden_size, t.intermediate_size
    )
