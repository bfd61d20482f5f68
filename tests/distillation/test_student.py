"""A student starts as its teacher: proven by making it as deep as the teacher and comparing hidden states."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from transformers import BertConfig, RobertaConfig

import distilbert_fast
from distilbert_fast.distillation.student import student_from_teacher
from distilbert_fast.modeling.structure import keep_heads

TEXT = [
    "Return the number of times x appears in the list.",
    "The quick brown fox jumps over the lazy dog, and nobody in the village is in the least surprised.",
    "No.",
    "Distillation was invented to purify water; here it purifies a network of its depth.",
]
HEADS = {
    "BertForMaskedLM": "logits",
    "BertForTokenClassification": "logits",
    "BertForQuestionAnswering": "start_logits",
}


@pytest.fixture(scope="module")
def batch(tokenizer):
    return dict(tokenizer(TEXT, padding=True, return_tensors="pt"))


def load(name, bert_dir, **settings):
    """The real body under a head with random weights, large enough to matter."""
    torch.manual_seed(0)
    model = getattr(transformers, name).from_pretrained(bert_dir, use_safetensors=True, **settings).eval()
    for parameter in set(model.parameters()) - set(model.base_model.parameters()):
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def small(config_class=BertConfig, **settings):
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64}
    return config_class(**{"vocab_size": 100, "max_position_embeddings": 40, **sizes, **settings})


def make(name, config):
    """A model with no tensor at its initial value: zeros and ones would hide what was not copied."""
    torch.manual_seed(1)
    model = getattr(transformers, name)(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def run(model, batch):
    if "Distil" in type(model).__name__:
        batch = {name: value for name, value in batch.items() if name != "token_type_ids"}
    with torch.no_grad():
        return model(**batch, output_hidden_states=True)


def assert_same_hidden_states(student, teacher, batch, layers=None, atol=2e-5):
    mask = batch["attention_mask"].bool()
    of_student, of_teacher = run(student, batch).hidden_states, run(teacher, batch).hidden_states
    layers = range(len(of_teacher)) if layers is None else layers
    assert len(of_student) == len(layers)
    for state, layer in zip(of_student, layers, strict=True):
        torch.testing.assert_close(state[mask], of_teacher[layer][mask], atol=atol, rtol=1e-5)


def test_as_deep_as_the_teacher_the_student_is_the_teacher(bert, batch):
    student, report = student_from_teacher(bert, num_layers=6)
    assert type(student) is distilbert_fast.DistilBertModel  # computes no padding
    assert report.layers == (0, 1, 2, 3, 4, 5)
    assert batch["token_type_ids"].eq(0).all() and not batch["attention_mask"].all()
    assert_same_hidden_states(student, bert, batch)


def test_without_the_fold_it_would_not_be(bert, batch):
    student, _ = student_from_teacher(bert, num_layers=6)
    with torch.no_grad():
        student.embeddings.position_embeddings.weight -= bert.embeddings.token_type_embeddings.weight[0]
    difference = run(student, batch).hidden_states[0] - run(bert, batch).hidden_states[0]
    assert difference.abs().max() > 0.01


@pytest.mark.parametrize("layers", [(0, 2, 5), (1, 3), (4,)])
def test_fewer_layers_are_the_teacher_with_layers_removed(bert, batch, layers):
    student, report = student_from_teacher(bert, layers=layers)
    cut = copy.deepcopy(bert)
    cut.encoder.layer = torch.nn.ModuleList([cut.encoder.layer[i] for i in layers])
    cut.config.num_hidden_layers = len(layers)
    assert_same_hidden_states(student, cut, batch)
    assert report.layers == layers


@pytest.mark.parametrize(
    ("depth", "count", "layers"),
    [
        (12, None, (0, 2, 4, 7, 9, 11)),
        (6, None, (0, 2, 5)),
        (24, 3, (0, 12, 23)),
        (5, None, (0, 4)),
        (4, 4, (0, 1, 2, 3)),
        (3, 1, (0,)),
        (1, None, (0,)),
    ],
)
def test_layers_are_evenly_spaced(depth, count, layers):
    teacher = make("BertModel", small(num_hidden_layers=depth, hidden_size=8, num_attention_heads=1))
    _, report = student_from_teacher(teacher, num_layers=count)
    assert report.layers == layers


@pytest.mark.parametrize("name", HEADS)
def test_heads_of_the_real_bert_are_exact(bert_dir, batch, name):
    teacher = load(name, bert_dir)
    student, _ = student_from_teacher(teacher, num_layers=6)
    assert type(student).__name__ == name.replace("Bert", "DistilBert")
    mask = batch["attention_mask"].bool()
    for output in (HEADS[name], "end_logits") if "Question" in name else (HEADS[name],):
        expected = getattr(run(teacher, batch), output)[mask]
        torch.testing.assert_close(getattr(run(student, batch), output)[mask], expected, atol=3e-4, rtol=1e-4)


def test_the_vocabulary_projection_is_tied(bert_dir):
    student, _ = student_from_teacher(load("BertForMaskedLM", bert_dir))
    assert student.vocab_projector.weight is student.distilbert.embeddings.word_embeddings.weight
    untied = make("BertForMaskedLM", small(tie_word_embeddings=False))
    student, _ = student_from_teacher(untied)
    assert torch.equal(student.vocab_projector.weight, untied.cls.predictions.decoder.weight)
    assert torch.equal(student.distilbert.embeddings.word_embeddings.weight, untied.get_input_embeddings().weight)
    assert not torch.equal(student.vocab_projector.weight, untied.get_input_embeddings().weight)


def test_the_pooler_comes_as_close_to_tanh_as_relu_can(bert_dir, batch):
    teacher = load("BertForSequenceClassification", bert_dir, num_labels=5)
    student, report = student_from_teacher(teacher, num_layers=6)
    with torch.no_grad():
        z = teacher.bert.pooler.dense(run(teacher, batch).hidden_states[-1][:, 0])
    expected = teacher.classifier(z.clamp(min=-1))
    torch.testing.assert_close(run(student, batch).logits, expected, atol=1e-4, rtol=1e-4)
    tanh = teacher.classifier(torch.tanh(z))
    copied = teacher.classifier(z.relu())
    assert (expected - tanh).norm() < 0.5 * (copied - tanh).norm()
    assert "pools through relu(z + 1) - 1 where the teacher has tanh(z)" in report.notes


def test_max_z_and_minus_one_is_nowhere_farther_from_tanh_than_relu():
    z = torch.linspace(-20, 20, 100_001, dtype=torch.float64)
    assert ((z.clamp(min=-1) - z.tanh()).abs() <= (z.relu() - z.tanh()).abs()).all()


def test_multiple_choice(bert_dir, tokenizer):
    teacher = make("BertForMultipleChoice", small())
    student, _ = student_from_teacher(teacher, num_layers=4)
    ids = torch.randint(0, 100, (2, 3, 7), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        hidden = teacher.bert(ids.view(6, 7)).last_hidden_state[:, 0]
        expected = teacher.classifier(teacher.bert.pooler.dense(hidden).clamp(min=-1)).view(2, 3)
        torch.testing.assert_close(student(ids).logits, expected, atol=1e-4, rtol=1e-4)


ROBERTA = ["RobertaModel", "RobertaForMaskedLM", "RobertaForTokenClassification", "RobertaForQuestionAnswering"]


@pytest.mark.parametrize("name", [*ROBERTA, "RobertaForSequenceClassification"])
@pytest.mark.parametrize("eps", [1e-12, 1e-5])
def test_roberta(name, eps):
    config = small(RobertaConfig, pad_token_id=1, layer_norm_eps=eps, type_vocab_size=1)
    teacher = make(name, config)
    student, report = student_from_teacher(teacher, num_layers=4)
    assert student.config.max_position_embeddings == 38  # RoBERTa's first token reads row 2
    ids = torch.randint(3, 100, (3, 38), generator=torch.Generator().manual_seed(0))
    ids[1, 9:], ids[2, 30:] = 1, 1
    batch = {"input_ids": ids, "attention_mask": ids.ne(1).long()}
    assert_same_hidden_states(student, teacher, batch, atol=1e-4 if eps == 1e-12 else 2e-3)
    assert (f"LayerNorm eps is 1e-12, the teacher's {eps:g}" in report.notes) == (eps != 1e-12)
    if "logits" in (output := run(student, batch)) and "Sequence" not in name:
        mask = batch["attention_mask"].bool()
        expected = run(teacher, batch).logits[mask]
        torch.testing.assert_close(output.logits[mask], expected, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("head", ["Model", "ForSequenceClassification", "ForMaskedLM", "ForMultipleChoice"])
def test_distilbert_is_its_own_student(head):
    config = transformers.DistilBertConfig(
        vocab_size=100, max_position_embeddings=40, dim=32, hidden_dim=64, n_layers=3, n_heads=4
    )
    teacher = make(f"DistilBert{head}", config)
    student, report = student_from_teacher(teacher, num_layers=3)
    for name, tensor in teacher.state_dict().items():
        assert torch.equal(student.state_dict()[name], tensor), name
    assert report.left_out == () and report.notes == ()
    assert student_from_teacher(teacher, num_layers=2)[0].config.n_layers == 2
    assert teacher.config.n_layers == 3


def test_settings_follow_the_teacher():
    config = small(
        hidden_act="relu", hidden_dropout_prob=0.07, attention_probs_dropout_prob=0.03, classifier_dropout=0.25
    )
    config.id2label, config.label2id = {0: "no", 1: "yes", 2: "both"}, {"no": 0, "yes": 1, "both": 2}
    student, _ = student_from_teacher(make("BertForSequenceClassification", config))
    got = student.config
    assert (got.activation, got.dropout, got.attention_dropout) == ("relu", 0.07, 0.03)
    assert (got.seq_classif_dropout, got.qa_dropout) == (0.25, 0.0)
    assert (got.id2label, got.label2id) == (config.id2label, config.label2id)
    assert got.num_labels == 3


def test_the_teacher_is_not_changed_and_shares_nothing():
    teacher = make("BertForMaskedLM", small()).train()
    before = copy.deepcopy(teacher.state_dict())
    student, _ = student_from_teacher(teacher)
    assert teacher.training and not student.training
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.fill_(7.0)
    for name, tensor in teacher.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_student_is_float32(dtype):
    teacher = make("BertModel", small()).to(dtype)
    student, _ = student_from_teacher(teacher)
    assert {parameter.dtype for parameter in student.parameters()} == {torch.float32}
    expected = teacher.encoder.layer[3].output.dense.weight.float()
    assert torch.equal(student.transformer.layer[1].ffn.lin2.weight, expected)


def test_saved_and_loaded_by_transformers(tmp_path, bert_dir, batch):
    student, _ = student_from_teacher(load("BertForTokenClassification", bert_dir))
    student.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForTokenClassification.from_pretrained(tmp_path).eval()
    assert type(loaded) is transformers.DistilBertForTokenClassification
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(run(loaded, batch).logits[real], run(student, batch).logits[real], atol=2e-5, rtol=1e-5)
    for name, tensor in student.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)


def test_report(bert_dir):
    teacher = load("BertForSequenceClassification", bert_dir, num_labels=3)
    student, report = student_from_teacher(teacher)
    assert set(report.copied) == set(student.state_dict())
    sources = " ".join([*report.copied.values(), *report.left_out])
    for name in teacher.state_dict():  # nothing of the teacher goes unmentioned
        layer = ".".join(name.split(".")[:4])
        assert name in sources or layer in sources, name
    position = "bert.embeddings.position_embeddings.weight + bert.embeddings.token_type_embeddings.weight[0]"
    assert report.copied["distilbert.embeddings.position_embeddings.weight"] == position
    assert report.left_out == (
        "bert.embeddings.token_type_embeddings.weight[1:]",
        "bert.encoder.layer.1",
        "bert.encoder.layer.3",
        "bert.encoder.layer.4",
    )
    assert report.teacher_parameters == sum(parameter.numel() for parameter in teacher.parameters())
    assert report.student_parameters == sum(parameter.numel() for parameter in student.parameters())
    lines = str(report).splitlines()
    assert lines[0] == (
        "DistilBertForSequenceClassification of 3 layers from BertForSequenceClassification of 6 layers"
    )
    assert lines[1] == f"parameters: {report.teacher_parameters:,} -> {report.student_parameters:,} (77%)"
    assert any(line.split() == ["distilbert.transformer.layer.1", "<-", "layer", "2"] for line in lines)


@pytest.mark.parametrize("teacher_family", ["Bert", "Roberta"])
@pytest.mark.parametrize(
    "head",
    [
        "Model",
        "ForMaskedLM",
        "ForSequenceClassification",
        "ForTokenClassification",
        "ForQuestionAnswering",
        "ForMultipleChoice",
    ],
)
def test_a_student_of_robertas_shape_is_its_teacher(teacher_family, head):
    """Token types, eps, tanh and all."""
    pad = {"pad_token_id": 1} if teacher_family == "Roberta" else {}
    config = small(getattr(transformers, f"{teacher_family}Config"), layer_norm_eps=1e-5, type_vocab_size=2, **pad)
    teacher = make(f"{teacher_family}{head}", config)
    student, report = student_from_teacher(teacher, num_layers=4, architecture="roberta")
    assert type(student) is getattr(transformers, f"Roberta{head}")
    ids = torch.randint(3, 100, (4, 30), generator=torch.Generator().manual_seed(0))
    ids[1, 9:], ids[2, 25:] = config.pad_token_id, config.pad_token_id
    real = ids.ne(config.pad_token_id)
    batch = {
        "input_ids": ids,
        "attention_mask": real.long(),
        "token_type_ids": (torch.arange(30) > 5).expand(4, -1).int(),
    }
    if head == "ForMultipleChoice":
        batch = {name: x.view(2, 2, 30) for name, x in batch.items()}
    with torch.no_grad():
        got, expected = (model(**batch).to_tuple() for model in (student, teacher))
    for mine, theirs in zip(got, expected, strict=True):
        if mine.shape[:2] == (4, 30):
            mine, theirs = mine[real], theirs[real]
        torch.testing.assert_close(mine, theirs, atol=2e-5, rtol=1e-5)
    assert set(report.copied) == set(student.state_dict()) and report.notes == () and report.left_out == ()
    table, old = (model.base_model.embeddings.position_embeddings.weight for model in (student, teacher))
    expected = torch.cat([torch.zeros(1, 32), old]) if teacher_family == "Bert" else old
    assert torch.equal(table, expected) and student.config.max_position_embeddings == len(expected)


def test_a_roberta_student_of_half_the_depth():
    teacher = make("BertForMaskedLM", small())
    student, report = student_from_teacher(teacher, architecture="roberta")
    assert report.layers == (0, 3) and student.config.num_hidden_layers == 2
    position = "1 rows of 0, bert.embeddings.position_embeddings.weight"
    assert report.copied["roberta.embeddings.position_embeddings.weight"] == position
    assert report.left_out == ("bert.encoder.layer.1", "bert.encoder.layer.2")
    assert student.lm_head.decoder.weight is student.roberta.embeddings.word_embeddings.weight
    assert "roberta.encoder.layer.1" in str(report)


@pytest.mark.parametrize("architecture", ["distilbert", "roberta"])
@pytest.mark.parametrize("family", ["Bert", "Roberta"])
def test_a_student_of_another_width_starts_at_random(architecture, family):
    teacher = make(f"{family}ForMaskedLM", small(getattr(transformers, f"{family}Config")))
    torch.manual_seed(0)
    student, report = student_from_teacher(teacher, num_layers=3, architecture=architecture, hidden_size=16)
    config = student.config
    assert (config.hidden_size, config.num_attention_heads, config.num_hidden_layers) == (16, 2, 3)
    assert student.base_model.get_input_embeddings().weight.shape == (100, 16)
    inner = config.hidden_dim if architecture == "distilbert" else config.intermediate_size
    assert inner == 32
    assert (report.copied, report.layers, report.num_layers) == ({}, (), 3)
    assert report.notes == ("starts at random: 16 wide with 2 heads, the teacher 32 with 4",)
    assert str(report).splitlines()[0].endswith(f"of 3 layers from {family}ForMaskedLM of 4 layers")
    torch.manual_seed(0)
    again, _ = student_from_teacher(teacher, num_layers=3, architecture=architecture, hidden_size=16)
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, student.state_dict()[name]), name
    ids = torch.randint(3, 100, (2, 9))
    assert student(ids).logits.shape == (2, 9, 100)


def test_widths_of_the_teacher_are_no_other_width():
    teacher = make("BertModel", small())
    widths = {"hidden_size": 32, "num_heads": 4, "intermediate_size": 64}
    assert student_from_teacher(teacher, **widths)[1].layers == (0, 3)
    assert student_from_teacher(teacher, intermediate_size=48)[1].layers == ()


BAD = [
    ({"architecture": "gpt"}, "architecture must be one of distilbert, roberta, got 'gpt'"),
    ({"hidden_size": 0}, "hidden_size must be 1 or more, got 0"),
    ({"hidden_size": 16, "num_heads": 3}, "num_heads must divide hidden_size 16, got 3"),
    ({"hidden_size": 16, "layers": [0, 1]}, "layers must be None for a student of another width, got [0, 1]"),
    ({"num_layers": 0}, "num_layers must be 1 to 4, the teacher's depth, got 0"),
    ({"num_layers": 5}, "num_layers must be 1 to 4, the teacher's depth, got 5"),
    ({"layers": [0, 4]}, "layers must be ascending, of 0 to 3, got [0, 4]"),
    ({"layers": [-1, 2]}, "layers must be ascending, of 0 to 3, got [-1, 2]"),
    ({"layers": [2, 1]}, "layers must be ascending, of 0 to 3, got [2, 1]"),
    ({"layers": [1, 1]}, "layers must be ascending, of 0 to 3, got [1, 1]"),
    ({"layers": []}, "layers must be ascending, of 0 to 3, got []"),
    ({"layers": [0, 3], "num_layers": 3}, "num_layers must be 2, as many as layers, got 3"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_bad_depth(arguments, message):
    with pytest.raises(ValueError) as caught:
        student_from_teacher(make("BertModel", small()), **arguments)
    assert str(caught.value) == f"student_from_teacher: {message}"


@pytest.mark.parametrize("name", ["BertForPreTraining", "BertForNextSentencePrediction", "MPNetModel", "GPT2Model"])
def test_unsupported_models_are_refused_by_name(name):
    config = getattr(transformers, name).config_class()
    with torch.device("meta"):
        model = getattr(transformers, name)(config)
    with pytest.raises(TypeError) as caught:
        student_from_teacher(model)
    assert str(caught.value) == (
        "student_from_teacher: teacher must be a Bert, Roberta or DistilBert model, the base model or one "
        "ForMaskedLM, ForSequenceClassification, ForMultipleChoice, ForTokenClassification, "
        f"ForQuestionAnswering, got {name}"
    )


def test_not_a_model():
    with pytest.raises(TypeError, match=r"^student_from_teacher: teacher must be a Bert, .*, got dict$"):
        student_from_teacher({})


def test_a_decoder_is_refused():
    with pytest.raises(ValueError) as caught:
        student_from_teacher(make("BertModel", small(is_decoder=True)))
    assert str(caught.value) == (
        "student_from_teacher: teacher.config.is_decoder must be False for a DistilBERT, got True"
    )


def test_a_distilbert_has_no_student_of_another_shape():
    teacher = transformers.DistilBertModel(transformers.DistilBertConfig(dim=8, n_heads=1, n_layers=2, hidden_dim=8))
    with pytest.raises(ValueError) as caught:
        student_from_teacher(teacher, architecture="roberta")
    assert str(caught.value) == (
        "student_from_teacher: architecture must be distilbert for a DistilBert teacher, got 'roberta'"
    )


def test_a_base_model_without_pooler():
    teacher = transformers.BertModel(small(), add_pooling_layer=False)
    assert student_from_teacher(teacher)[1].layers == (0, 3)
    assert student_from_teacher(teacher, architecture="roberta")[0].pooler is None


def test_tensors_that_do_not_fit_are_named():
    teacher = make("BertModel", small())
    teacher.encoder.layer[0].attention.self.query.weight = torch.nn.Parameter(torch.zeros(16, 32))
    with pytest.raises(ValueError) as caught:
        student_from_teacher(teacher)
    assert str(caught.value) == (
        "student_from_teacher: teacher's encoder.layer.0.attention.self.query.weight must be a float tensor "
        "[32, 32] to become transformer.layer.0.attention.q_lin.weight of the student, got float32 [16, 32]"
    )


def test_a_pruned_teacher_is_refused_by_name():
    model = make("BertForSequenceClassification", small())
    keep_heads(model.base_model, 1, [0, 2, 3])
    expected = "one with all its heads and neurons, which can be distilled into a pruned model, got a pruned one"
    with pytest.raises(ValueError, match=f"^student_from_teacher: teacher must be {expected}$"):
        student_from_teacher(model)
    student_from_teacher(model, hidden_size=16, num_heads=2)  # takes none of its tensors
