"""Every objective against its definition in plain torch, in float64, by transformers' own forward of whole models."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace

import pytest
import torch
import transformers
from distillation import tiny

import distilbert_fast
from distilbert_fast.distillation.arguments import objective_of
from distilbert_fast.distillation.objectives import relations
from distilbert_fast.distillation.objectives.mlm import LOSSES, MlmObjective, even_layer_map
from distilbert_fast.distillation.objectives.task import QaObjective, RegressionObjective, TaskObjective, answer_places
from distilbert_fast.distillation.student import student_from_teacher
from distilbert_fast.distillation.teachers import model as teachers
from distilbert_fast.distillation.teachers.model import ModelTeacher

T = tiny.LENGTH


def roberta(head="MaskedLM", layers=2, seed=0, **settings):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "num_hidden_layers": layers, "num_attention_heads": 4, "intermediate_size": 64}
    config = transformers.RobertaConfig(
        vocab_size=tiny.VOCABULARY, max_position_embeddings=T + 2, pad_token_id=1, **{**sizes, **settings}
    )
    model = getattr(transformers, f"RobertaFor{head}")(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def without_dropout(model):
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model.eval()


def pair(kind, head="MaskedLM"):
    """A student and its teacher in float64."""
    teacher = roberta(head) if "roberta" in kind else tiny.teacher(head)
    if kind == "bert":
        student = tiny.teacher(head, seed=1, num_hidden_layers=1)
    elif kind == "roberta":
        student = roberta(head, layers=1, seed=1)
    else:
        student = student_from_teacher(teacher, num_layers=1)[0]
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in student.parameters():
                parameter += torch.randn_like(parameter) * 0.1
    if kind.startswith("fast"):
        drop_in = getattr(distilbert_fast, type(student).__name__)(student.config)
        drop_in.load_state_dict(student.state_dict())
        student = drop_in
    return without_dropout(student.double()), without_dropout(teacher.double())


def mlm_batch(seed=0, masked=0.4, shape=(5, T), first_id=2):
    """Sequences of 0 to T tokens, masked at random; labels lie on padding too, where they do not count."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(first_id, tiny.VOCABULARY, shape, generator=generator)
    lengths = torch.randint(0, shape[1] + 1, shape[:1], generator=generator)
    lengths[:1] = shape[1]
    real = torch.arange(shape[1]) < lengths[:, None]
    hidden = torch.rand(shape, generator=generator) < masked
    labels = ids.masked_fill(~hidden, -100)
    ids = ids.masked_fill(hidden, 2).masked_fill(~real, 1)
    return {"input_ids": ids, "attention_mask": real, "labels": labels}


def log_softmax(x):
    return x - x.logsumexp(-1, keepdim=True)


def kl(t, s, tau=1.0):
    """τ² KL of rows of logits, [...]"""
    p, q = log_softmax(t / tau), log_softmax(s / tau)
    return tau**2 * (p.exp() * (p - q)).sum(-1)


def last_attention(model, batch):
    """Output of the last layer's query, key and value, as they are computed inside of the model."""
    encoder = model.base_model
    layer = (encoder.transformer if hasattr(encoder, "transformer") else encoder.encoder).layer[-1].attention
    names = ("q_lin", "k_lin", "v_lin") if hasattr(layer, "q_lin") else ("query", "key", "value")
    owner = layer if hasattr(layer, "q_lin") else layer.self
    seen = {}
    hooks = [
        getattr(owner, name).register_forward_hook(lambda _, __, y, name=name: seen.update({name: y})) for name in names
    ]
    keep = {"keep_padding": True} if type(model).__module__.startswith("distilbert_fast") else {}
    output = model(batch["input_ids"], attention_mask=batch["attention_mask"], output_hidden_states=True, **keep)
    for hook in hooks:
        hook.remove()
    return [seen[name].view(*batch["input_ids"].shape, -1) for name in names], output


def relation(x, length, heads):
    d = x.shape[1] // heads
    return [x[:length, a * d : (a + 1) * d] @ x[:length, a * d : (a + 1) * d].T / math.sqrt(d) for a in range(heads)]


def mlm_spec(student, teacher, batch, settings):
    """{loss: (sum, rows)} sequence by sequence, token by token."""
    with torch.no_grad():
        of_teacher, t = last_attention(teacher, batch)
    of_student, s = last_attention(student, batch)
    tau = settings.get("temperature", 2.0)
    sums, rows = dict.fromkeys(LOSSES, 0.0), dict.fromkeys(LOSSES, 0)
    pairs = settings.get("layer_map", ())
    for b, length in enumerate(batch["attention_mask"].sum(1).tolist()):
        for i in range(length):
            masked = int(batch["labels"][b, i]) != -100
            if masked or settings.get("kd_positions", "real") == "real":
                sums["kl"] = sums["kl"] + kl(t.logits[b, i], s.logits[b, i], tau)
                sums["mse"] = sums["mse"] + (t.logits[b, i] - s.logits[b, i]).square().sum()
                rows["kl"], rows["mse"] = rows["kl"] + 1, rows["mse"] + 1
            if masked:
                sums["mlm"] = sums["mlm"] - log_softmax(s.logits[b, i])[batch["labels"][b, i]]
                rows["mlm"] += 1
            h_s, h_t = s.hidden_states[-1][b, i], t.hidden_states[-1][b, i]
            if h_s.shape == h_t.shape:
                sums["cos"] = sums["cos"] + 1 - torch.nn.functional.cosine_similarity(h_s, h_t, dim=0)
            for mine, theirs in pairs:
                h_s, h_t = s.hidden_states[mine + 1][b, i], t.hidden_states[theirs + 1][b, i]
                if settings.get("hidden_loss", "mse") == "mse":
                    row = (h_s - h_t).square().mean()
                else:
                    row = 1 - torch.nn.functional.cosine_similarity(h_s, h_t, dim=0)
                sums["hidden"] = sums["hidden"] + row / len(pairs)
            for name in ("cos", "hidden", "relation"):
                rows[name] += 1
        if "relation_heads" in settings:
            heads = settings["relation_heads"]
            for x_s, x_t in zip(of_student, of_teacher, strict=True):
                for r_s, r_t in zip(relation(x_s[b], length, heads), relation(x_t[b], length, heads), strict=True):
                    sums["relation"] = sums["relation"] + kl(r_t, r_s).sum() / heads
    return {name: (sums[name], rows[name]) for name in LOSSES}


def assert_same(objective, student, teacher, batch, spec, progress=0.0):
    """Sums, counts, and the gradient of the weighted means."""
    parameters = [p for p in student.parameters() if p.requires_grad]
    counts = objective.counts(batch)
    assert counts.tolist() == [spec[name][1] for name in objective.names]
    step = objective(student, ModelTeacher(teacher), batch, progress)
    wanted = torch.stack([torch.as_tensor(spec[name][0], dtype=torch.float64) for name in objective.names])
    torch.testing.assert_close(step.sums.double(), wanted, atol=1e-9, rtol=1e-7)
    weights = torch.tensor(objective.weights(progress), dtype=torch.float64)

    def gradient(sums):
        loss = (sums * weights / counts.clamp(min=1)).sum()
        if not loss.requires_grad:
            return [torch.zeros_like(p) for p in parameters]
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]

    assert step.sums.requires_grad
    for mine, theirs in zip(gradient(step.sums), gradient(wanted), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-8, rtol=1e-6)


KINDS = ["bert", "distilbert", "fast", "roberta", "fast of roberta"]
SETTINGS = [
    {},
    {"kd_positions": "masked", "temperature": 3.0, "kl": 0.7, "mlm": 0.0},
    {"kl": 0.0, "mse": 0.3, "cos": 0.0},
    {"hidden": 2.0, "layer_map": ((0, 0), (0, 1)), "mlm": 0.0, "kl": 0.0},
    {"hidden": 2.0, "layer_map": ((0, 1),), "hidden_loss": "cosine", "cos": 0.0},
    {"relation": 1.5, "relation_heads": 2, "kl": 0.0, "mlm": 0.0, "cos": 0.0},
    {"mse": 1.0, "kd_positions": "masked", "relation": 0.1, "relation_heads": 8, "hidden": 1.0, "layer_map": ((0, 1),)},
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("settings", [SETTINGS[0], SETTINGS[-1]])
def test_masked_lm_is_its_definition(kind, settings):
    student, teacher = pair(kind)
    batch = mlm_batch(seed=3)
    assert_same(MlmObjective(**settings), student, teacher, batch, mlm_spec(student, teacher, batch, settings))


@pytest.mark.parametrize("settings", SETTINGS[1:-1])
@pytest.mark.parametrize("seed", range(2))
def test_every_loss_is_its_definition(settings, seed):
    student, teacher = pair("distilbert")
    batch = mlm_batch(seed, masked=0.2)
    assert_same(MlmObjective(**settings), student, teacher, batch, mlm_spec(student, teacher, batch, settings))


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_batch_with_nothing_to_count(settings):
    """Nothing masked, and then not a token either: losses 0, gradients 0, and still a graph for DDP."""
    student, teacher = pair("distilbert")
    batch = mlm_batch(masked=0.0)
    assert_same(MlmObjective(**settings), student, teacher, batch, mlm_spec(student, teacher, batch, settings))
    batch = mlm_batch(masked=1.0)
    batch["attention_mask"] = torch.zeros_like(batch["attention_mask"])
    objective = MlmObjective(**settings)
    assert objective.counts(batch).tolist() == [0] * len(objective.names)
    sums = objective(student, ModelTeacher(teacher), batch, 0.0).sums
    assert not sums.any()
    sums.sum().backward()
    assert not any(p.grad.any() for p in student.parameters() if p.grad is not None)


def test_every_position_masked_and_no_mask_given():
    student, teacher = pair("distilbert")
    batch = mlm_batch(masked=1.0)
    batch["attention_mask"] = torch.ones_like(batch["attention_mask"])
    spec = mlm_spec(student, teacher, batch, {})
    del batch["attention_mask"]
    assert_same(MlmObjective(), student, teacher, batch, spec)


def test_the_head_runs_on_counted_rows_only():
    student, teacher = pair("distilbert")
    batch = mlm_batch(seed=1, masked=0.2)
    masked = int((batch["labels"].ne(-100) & batch["attention_mask"]).sum())
    for positions, rows in (("masked", masked), ("real", int(batch["attention_mask"].sum()))):
        seen = []
        hooks = [
            layer.register_forward_hook(lambda _, __, y, seen=seen: seen.append(len(y)))
            for layer in (student.vocab_transform, teacher.cls.predictions.transform)
        ]
        MlmObjective(kd_positions=positions)(student, ModelTeacher(teacher), batch, 0.0)
        for hook in hooks:
            hook.remove()
        assert seen == [rows, rows]


def test_without_a_teacher_it_is_masked_language_modelling():
    student, teacher = pair("distilbert")
    batch = mlm_batch()
    spec = mlm_spec(student, teacher, batch, {})
    objective = MlmObjective(kl=0, cos=0)
    objective.check(student, None)
    sums = objective(student, None, batch, 0.0).sums
    torch.testing.assert_close(sums, spec["mlm"][0][None])


def test_the_tied_embedding_learns_from_both_of_its_uses():
    student, teacher = pair("fast")
    assert student.vocab_projector.weight is student.distilbert.embeddings.word_embeddings.weight
    batch = mlm_batch()
    MlmObjective()(student, ModelTeacher(teacher), batch, 0.0).sums.sum().backward()
    gradient = student.vocab_projector.weight.grad
    unread = [token for token in range(tiny.VOCABULARY) if token not in batch["input_ids"]]
    assert unread and gradient[unread].any(dim=1).all()  # of the softmax, which has every word in it
    assert all(p.grad is None for p in teacher.parameters())


def test_narrower_students_learn_from_relations():
    teacher = without_dropout(tiny.teacher("MaskedLM").double())
    narrow = tiny.teacher("MaskedLM", seed=1, hidden_size=16, intermediate_size=32, num_attention_heads=2)
    student = without_dropout(narrow.double())
    settings = {"cos": 0.0, "relation": 1.0, "relation_heads": 4}
    batch = mlm_batch()
    assert_same(MlmObjective(**settings), student, teacher, batch, mlm_spec(student, teacher, batch, settings))


def test_even_layer_maps():
    assert even_layer_map(6, 12) == ((0, 1), (1, 3), (2, 5), (3, 7), (4, 9), (5, 11))
    assert even_layer_map(3, 4) == ((0, 0), (1, 1), (2, 3))


# Tasks ----------------------------------------------------------------------------------------------------------------


def padded(rows):
    batch = {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}
    batch.pop("token_type_ids")
    return batch


@pytest.mark.parametrize("head", ["SequenceClassification", "TokenClassification"])
@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_tasks_are_their_definition(head, alpha):
    student, teacher = pair("distilbert", head)
    batch = padded(tiny.rows(7, head))
    spec = {"kl": (0.0, 0), "ce": (0.0, 0)}
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    s, t = student(**inputs).logits.flatten(0, -2), teacher(**inputs).logits.flatten(0, -2).detach()
    for row, label in enumerate(batch["labels"].flatten().tolist()):
        if label != -100:
            spec["kl"] = (spec["kl"][0] + kl(t[row], s[row], 3.0), spec["kl"][1] + 1)
            spec["ce"] = (spec["ce"][0] - log_softmax(s[row])[label], spec["ce"][1] + 1)
    objective = TaskObjective(3.0, alpha)
    assert objective.names == (("kl", "ce") if alpha else ("ce",))
    # task_loss sums the cross-entropy in float32
    sums = objective(student, ModelTeacher(teacher), batch, 0.0).sums
    wanted = torch.stack([spec[name][0] for name in objective.names])
    torch.testing.assert_close(sums.double(), wanted, atol=1e-5, rtol=1e-5)
    assert objective.counts(batch).tolist() == [spec[name][1] for name in objective.names]


@pytest.mark.parametrize("precision", ["fp32", "model"])
def test_outputs_have_names_whatever_the_config_says(precision):
    teacher = tiny.teacher()
    student, batch, objective = tiny.student(teacher, dropout=0.0), padded(tiny.rows(3)), TaskObjective(2.0, 0.5)
    expected = objective(student, ModelTeacher(teacher, precision), batch, 0.0).sums
    student.config.return_dict = teacher.config.return_dict = False
    assert torch.equal(objective(student, ModelTeacher(teacher, precision), batch, 0.0).sums, expected)


@pytest.mark.parametrize("outputs", [1, 3])
def test_regression_is_its_definition(outputs):
    teacher = without_dropout(tiny.teacher(num_labels=outputs, problem_type="regression").double())
    student = without_dropout(tiny.student(teacher).double())
    batch = padded(tiny.rows(5))
    batch["labels"] = torch.randn((5, outputs) if outputs > 1 else (5,), dtype=torch.float64)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    s, t = student(**inputs).logits, teacher(**inputs).logits.detach()
    spec = {
        "teacher_mse": ((s - t).square().sum(), 5 * outputs),
        "label_mse": ((s.flatten() - batch["labels"].flatten()).square().sum(), 5 * outputs),
    }
    args = SimpleNamespace(objective="task", alpha=0.4, temperature=2.0)
    objective = objective_of(args, student, teacher)
    assert objective == RegressionObjective(0.4) and objective.weights(0.5) == (0.4, 0.6)
    objective.check(student, ModelTeacher(teacher))
    assert_same(objective, student, teacher, batch, spec)


def test_regression_refuses_what_does_not_fit():
    student = tiny.teacher(num_labels=1, seed=1)
    with pytest.raises(ValueError) as caught:
        RegressionObjective(0.5).check(student, ModelTeacher(tiny.teacher()))
    assert str(caught.value) == (
        "DistillationTrainer: teacher must be a regression model like the student, got a classifier"
    )
    batch = padded(tiny.rows(5)) | {"labels": torch.zeros(4)}
    with pytest.raises(ValueError) as caught:
        RegressionObjective(0.0)(student, None, batch, 0.0)
    assert str(caught.value) == ("DistillationTrainer: labels must be 5 numbers, one for each that is predicted, got 4")


def qa_batch():
    """[CLS] question [SEP] text [SEP], padded; answers in the text, none, cut off, and one in the question."""
    batch = mlm_batch(shape=(5, T))
    lengths = torch.tensor([T, 9, 8, T, 6])
    batch["attention_mask"] = torch.arange(T) < lengths[:, None]
    batch["token_type_ids"] = ((torch.arange(T) >= 4) & batch["attention_mask"]).long()
    del batch["labels"]
    return batch | {
        "start_positions": torch.tensor([4, 0, 5, 7, 2]),
        "end_positions": torch.tensor([6, 0, 6, T + 3, 4]),
    }


@pytest.mark.parametrize("given", ["token_type_ids", "answer_mask"])
@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_question_answering_is_its_definition(given, alpha):
    teacher = without_dropout(tiny.teacher("QuestionAnswering", num_labels=2).double())
    student = without_dropout(tiny.student(teacher).double())
    batch = qa_batch()
    places = [[0, *range(4, length - 1)] for length in batch["attention_mask"].sum(1).tolist()]
    if given == "answer_mask":
        answer_mask = torch.zeros(5, T, dtype=torch.bool)
        for row, allowed in enumerate(places):
            answer_mask[row, allowed[1:]] = True
        batch["answer_mask"] = answer_mask
    s = student(batch["input_ids"], batch["attention_mask"])
    t = teacher(batch["input_ids"], batch["attention_mask"], batch["token_type_ids"])
    spec = {"kl": (0.0, 0), "ce": (0.0, 0)}
    for b, allowed in enumerate(places):
        for side in ("start", "end"):
            of_s, of_t = (output[f"{side}_logits"][b, allowed] for output in (s, t))
            spec["kl"] = (spec["kl"][0] + kl(of_t.detach(), of_s, 2.0), spec["kl"][1] + 1)
            place = int(batch[f"{side}_positions"][b])
            if place in allowed:
                spec["ce"] = (spec["ce"][0] - log_softmax(of_s)[allowed.index(place)], spec["ce"][1] + 1)
    assert spec["ce"][1] == 8  # not the start in the question, not the end beyond the text
    objective = QaObjective(2.0, alpha)
    objective.check(student, ModelTeacher(teacher))
    assert_same(objective, student, teacher, batch, spec)


def test_padding_does_not_change_the_loss_of_an_answer():
    """It did in the original, whose softmax spans padding and question."""
    teacher = without_dropout(tiny.teacher("QuestionAnswering", num_labels=2).double())
    student = without_dropout(tiny.student(teacher).double())
    batch = qa_batch()
    short = {name: x[4:, :6] if x.dim() == 2 else x[4:] for name, x in batch.items()}
    padded = {name: x[4:] for name, x in batch.items()}
    ours, originals = [], []
    for one in (short, padded):
        ours.append(QaObjective(2.0, 0.5)(student, ModelTeacher(teacher), one, 0.0).sums)
        inputs = one["input_ids"], one["attention_mask"]
        s, t = student(*inputs).start_logits, teacher(*inputs, one["token_type_ids"]).start_logits
        originals.append(kl(t, s, 2.0).sum())
    torch.testing.assert_close(ours[0], ours[1], atol=1e-10, rtol=1e-8)
    assert (originals[0] - originals[1]).abs() > 0.5 * originals[0].abs()


def test_answer_places_on_the_right_of_padding():
    batch = {
        "input_ids": torch.arange(6)[None],
        "attention_mask": torch.tensor([[0, 1, 1, 1, 1, 1]]),
        "token_type_ids": torch.tensor([[0, 0, 0, 1, 1, 1]]),
    }
    assert answer_places(batch).int().tolist() == [[0, 1, 0, 1, 1, 0]]
    del batch["token_type_ids"]
    with pytest.raises(ValueError) as caught:
        answer_places(batch)
    assert str(caught.value) == (
        "DistillationTrainer: a batch must hold answer_mask or token_type_ids, got input_ids, attention_mask"
    )


# Refused --------------------------------------------------------------------------------------------------------------


def narrow():
    return tiny.teacher("MaskedLM", hidden_size=16, num_attention_heads=2, seed=1)


def deeper(**settings):
    return MlmObjective(hidden=1.0, **settings)


BAD = [
    (MlmObjective(kl=0, mlm=0, cos=0), "the weight of one loss at least must be above 0, got 0 for kl, mlm, cos, mse, "
     "hidden, relation", {}),
    (MlmObjective(), "teacher must be given for kl, cos, got None", {"teacher": lambda: None}),
    (MlmObjective(), "teacher and student must have the same vocabulary size, got 70 and 64",
     {"teacher": lambda: tiny.teacher("MaskedLM", vocab_size=70)}),
    (MlmObjective(), "the weight of cos must be 0 for a student of another hidden size than its teacher (relation can "
     "take its place), got 16 and 32", {"student": narrow}),
    (MlmObjective(cos=0, relation=1, relation_heads=32), "relation_heads must divide both hidden sizes, 16 and 32, "
     "got 32", {"student": narrow}),
    (MlmObjective(kd_positions="all"), "kd_positions must be one of 'real', 'masked', got 'all'", {}),
    (MlmObjective(hidden_loss="l1"), "hidden_loss must be one of 'mse', 'cosine', got 'l1'", {}),
    (deeper(), "layer_map must be pairs of 0 to 1 and 0 to 1, got []", {}),
    (deeper(layer_map=((0, 2),)), "layer_map must be pairs of 0 to 1 and 0 to 1, got [(0, 2)]", {}),
    (MlmObjective(), "model must be a DistilBERT, BERT or RoBERTa for masked LM, got BertForSequenceClassification",
     {"student": tiny.teacher}),
    (QaObjective(2.0, 0.5), "model and teacher must be for question answering, got BertForMaskedLM", {}),
]  # fmt: skip


@pytest.mark.parametrize(("objective", "message", "models"), BAD)
def test_models_that_do_not_fit(objective, message, models):
    make = {"student": lambda: tiny.teacher("MaskedLM", seed=1), "teacher": lambda: tiny.teacher("MaskedLM")} | models
    student, teacher = make["student"](), make["teacher"]()
    with pytest.raises((TypeError, ValueError)) as caught:
        objective.check(student, None if teacher is None else ModelTeacher(teacher))
    assert str(caught.value) == f"DistillationTrainer: {message}"


# Schedules ------------------------------------------------------------------------------------------------------------


def test_objectives_follow_their_schedules():
    student, teacher = pair("distilbert")
    batch = mlm_batch()
    changing = MlmObjective("linear:4.0:2.0", kl="cosine:2:4", cos="linear:1:0")
    assert changing.weights(0.5) == pytest.approx((3.0, 2.0, 0.5))
    spec = mlm_spec(student, teacher, batch, {"temperature": 3.5})
    assert_same(changing, student, teacher, batch, spec, progress=0.25)
    assert TaskObjective(2.0, "linear:1:0").weights(0.75) == (0.25, 0.75)


def test_checkpointed_losses_have_the_gradient_of_others(monkeypatch):
    """mse and relation compute in pieces, which are computed again in backward."""
    student, teacher = pair("distilbert")
    batch = mlm_batch()
    settings = {"mse": 1.0, "relation": 1.0, "relation_heads": 4}
    twin = copy.deepcopy(student)
    whole = MlmObjective(**settings)(twin, ModelTeacher(teacher), batch, 0.0).sums
    for module in (relations, teachers):
        monkeypatch.setattr(module, "checkpoint", lambda function, *args, use_reentrant: function(*args))
    again = MlmObjective(**settings)(student, ModelTeacher(teacher), batch, 0.0).sums
    gradients = [
        torch.autograd.grad(step.sum(), list(one.parameters()), allow_unused=True)
        for step, one in ((whole, twin), (again, student))
    ]
    assert torch.equal(whole, again)
    for mine, theirs in zip(*gradients, strict=True):
        assert (mine is None and theirs is None) or torch.equal(mine, theirs)
