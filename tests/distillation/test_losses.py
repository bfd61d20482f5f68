from __future__ import annotations

import pytest
import torch

from distilbert_fast.distillation.objectives.losses import task_loss


def plain(student, teacher, labels, temperature, alpha, n):
    """The definition, row by row, in float64."""
    kl = ce = 0.0
    for s, t, label in zip(student, teacher, labels, strict=True):
        if label != -100:
            p = torch.softmax(t / temperature, -1)
            kl = kl + temperature**2 * (p * (p.log() - torch.log_softmax(s / temperature, -1))).sum()
            ce = ce - torch.log_softmax(s, -1)[label]
    return (alpha * kl + (1 - alpha) * ce) / n, kl / n, ce / n


def draw(shape, classes, seed, ignored=0.4):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(2, *shape, classes, generator=generator) * 3
    labels = torch.randint(0, classes, shape, generator=generator)
    labels[torch.rand(shape, generator=generator) < ignored] = -100
    return student.requires_grad_(), teacher, labels


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("shape", [(9,), (4, 7), (1,), (2, 0)])
@pytest.mark.parametrize(("temperature", "alpha"), [(1.0, 0.5), (2.0, 0.3), (7.5, 1.0), (0.5, 0.0)])
def test_it_is_its_definition(seed, shape, temperature, alpha):
    student, teacher, labels = draw(shape, 5, seed)
    n = max(int((labels != -100).sum()), 1)
    exact = student.detach().double().requires_grad_()
    wanted = plain(exact.view(-1, 5), teacher.double().view(-1, 5), labels.view(-1), temperature, alpha, n)
    got = task_loss(student, teacher, labels, temperature, alpha)
    for name, value in zip(got._fields, wanted, strict=True):
        assert getattr(got, name).item() == pytest.approx(float(torch.as_tensor(value).detach()), rel=1e-5), name
    got.loss.backward()
    if torch.is_tensor(wanted[0]) and wanted[0].requires_grad:
        wanted[0].backward()
        torch.testing.assert_close(student.grad.double(), exact.grad, atol=1e-6, rtol=1e-5)
    else:
        assert not student.grad.any()


def test_parts_of_a_batch_add_up_to_the_whole():
    student, teacher, labels = draw((8, 6), 4, seed=3)
    labels[0:2] = -100  # a part without a single label
    whole = task_loss(student, teacher, labels)
    whole.loss.backward()
    gradient, student.grad = student.grad, None
    n = (labels != -100).sum()
    total = torch.zeros(3)
    for part in (slice(0, 2), slice(2, 3), slice(3, 8)):
        losses = task_loss(student[part], teacher[part], labels[part], num_items=n)
        losses.loss.backward()
        total += torch.stack([value.detach() for value in losses])
    torch.testing.assert_close(total, torch.stack([value.detach() for value in whole]))
    torch.testing.assert_close(student.grad, gradient)


def test_the_mean_of_the_parts_means_would_not():
    """What normalising each part by its own count gives: the fault this loss is free of."""
    student, teacher, labels = draw((8, 6), 4, seed=3)
    labels[:4, 1:] = -100
    whole = task_loss(student, teacher, labels).loss
    halves = [task_loss(student[part], teacher[part], labels[part]).loss for part in (slice(0, 4), slice(4, 8))]
    assert abs(whole - sum(halves) / 2) > 0.05


def test_no_label_at_all_is_no_loss():
    student, teacher, labels = draw((3, 4), 5, seed=0, ignored=2.0)
    for teacher_logits, alpha in ((teacher, 0.5), (None, 0.0)):
        losses = task_loss(student, teacher_logits, labels, alpha=alpha)
        assert losses.loss == 0
        losses.loss.backward()
        assert not student.grad.any()


def test_rows_without_a_label_may_hold_anything():
    student, teacher, labels = draw((6,), 4, seed=0)
    labels[0], labels[1] = -100, 2
    wanted = task_loss(student, teacher, labels).loss
    with torch.no_grad():
        student[0], teacher[0] = float("nan"), float("inf")
    got = task_loss(student, teacher, labels)
    assert got.loss == wanted
    got.loss.backward()
    assert student.grad.isfinite().all() and not student.grad[0].any()


def test_without_teacher_it_is_cross_entropy():
    student, _, labels = draw((9,), 5, seed=1)
    got = task_loss(student, None, labels, alpha=0.0, label_smoothing=0.1)
    wanted = torch.nn.functional.cross_entropy(student, labels, label_smoothing=0.1)
    torch.testing.assert_close(got.loss, wanted)
    assert got.kl is None and got.ce is got.loss


def test_low_precision_logits_give_a_float32_loss():
    student, teacher, labels = draw((9,), 5, seed=1)
    got = task_loss(student.detach().bfloat16(), teacher.bfloat16(), labels)
    assert [value.dtype for value in got] == [torch.float32] * 3
    torch.testing.assert_close(got.loss, task_loss(student, teacher, labels).loss.detach(), atol=0.05, rtol=0.05)


BAD = [
    ({"labels": torch.zeros(4).long()}, "labels must be of shape [3], one for each row of logits, got [4]"),
    ({"labels": torch.tensor([0, 5, 1])}, "labels must be 0 to 4, or -100 for none, got 5"),
    ({"labels": torch.tensor([0, -1, 1])}, "labels must be 0 to 4, or -100 for none, got -1"),
    ({"labels": torch.zeros(3)}, "labels must be int64, got float32"),
    ({"labels": torch.zeros(3).int()}, "labels must be int64, got int32"),
    ({"teacher": None}, "teacher must be given for alpha above 0, got None for alpha 0.5"),
    ({"teacher": torch.zeros(3, 6)}, "teacher must be of the student's shape [3, 5], got [3, 6]"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_bad_input(arguments, message):
    good = {"student": torch.zeros(3, 5), "teacher": torch.zeros(3, 5), "labels": torch.zeros(3).long()}
    with pytest.raises((TypeError, ValueError)) as caught:
        task_loss(**{**good, **arguments})
    assert str(caught.value) == f"task_loss: {message}"
