"""Every architecture of the table, with every head, against transformers itself: whatever takes a BERT takes these."""

from __future__ import annotations

import ast
import copy
import json
import re
from pathlib import Path

import pytest
import torch
import transformers
from modeling.test_optimize import assert_same, calls, expect  # noqa: F401  (a fixture)

from distilbert_fast import Int8Config, optimize, pack_encoder, quantize_model
from distilbert_fast.distillation.student import student_from_teacher
from distilbert_fast.distillation.teachers.model import last_attention_inputs
from distilbert_fast.engine.engine import Engine
from distilbert_fast.modeling import architectures
from distilbert_fast.modeling.architectures import (
    ARCHITECTURES,
    architecture_of,
    first_position,
    longest_sequence,
)
from distilbert_fast.modeling.attention_interface import ENCODERS
from distilbert_fast.modeling.loading import CheckpointError, load_tokenizer, load_with_head, locate
from distilbert_fast.modeling.readers import reads_first_token
from distilbert_fast.modeling.vocabulary import vocabulary_head

SIZES = dict(vocab_size=97, max_position_embeddings=23, num_labels=2, num_hidden_layers=2, num_attention_heads=3)
SIZES |= dict(hidden_size=30)
TEXTS = [
    "The quick brown fox jumps over the lazy dog.",
    "Is it raining?",
    "Nobody in the village was surprised at all.",
]
HEADS = ("Model", "ForMaskedLM", "ForSequenceClassification", "ForTokenClassification", "ForMultipleChoice")
HEADS += ("ForQuestionAnswering",)
CASES = [(model_type, head) for model_type in ARCHITECTURES for head in HEADS]
CASES += [("bert", "ForPreTraining"), ("electra", "ForPreTraining"), ("ernie", "ForPreTraining")]
CASES += [("bert", "ForNextSentencePrediction"), ("ernie", "ForNextSentencePrediction")]


def make(model_type, head="Model", **changes):
    """A model with random weights of odd sizes, none at its initial value."""
    torch.manual_seed(0)
    special = {"distilbert": dict(hidden_dim=37)}.get(model_type, dict(intermediate_size=37, type_vocab_size=2))
    special |= {"electra": dict(embedding_size=30)}.get(model_type, {})
    pad = int(model_type in ARCHITECTURES and ARCHITECTURES[model_type].after_padding)
    config = transformers.AutoConfig.for_model(model_type, **(SIZES | special | dict(pad_token_id=pad) | changes))
    model = getattr(transformers, f"{ARCHITECTURES[model_type].prefix}{head}")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def inputs(model, lengths=(9, 4, 1, 6), length=9):
    """Ids padded on the right and their mask, with token types where there are any; of two choices each for some."""
    torch.manual_seed(1)
    mask = (torch.arange(length) < torch.tensor(lengths)[:, None]).long()
    ids = torch.where(mask == 1, torch.randint(3, 97, mask.shape), model.config.pad_token_id)
    batch = {"input_ids": ids, "attention_mask": mask}
    if model.config.model_type != "distilbert":
        batch["token_type_ids"] = torch.randint(0, 2, ids.shape) * mask
    if type(model).__name__.endswith("MultipleChoice"):
        batch = {name: value.view(2, -1, length) for name, value in batch.items()}
    return batch


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_the_names_by_which_modules_compute_and_read(model_type):
    """A method or a tensor under a name that is not in the table could be exchanged and not be noticed."""
    encoder = make(model_type)
    for module in (m for name, m in encoder.named_modules() if name and not name.startswith("pooler")):
        kinds = [kind for kind in type(module).__mro__ if kind.__module__.startswith("transformers.models.")]
        methods = {name for kind in kinds for name in vars(kind) if callable(getattr(kind, name))}
        assert {name for name in methods if not name.startswith("__")} <= set(architectures.COMPUTING_METHODS)
    names = {name.rpartition(".")[2] for name, _ in (*encoder.named_parameters(), *encoder.named_buffers())}
    assert names <= set(architectures.TENSORS)


def answers(model, batch):
    """All tensors that a model returns, of real tokens where there is a row for each position."""
    with torch.no_grad():
        output = model(**batch, output_hidden_states=True)
    real = batch["attention_mask"].flatten(0, -2).bool()
    tensors = [*(x for x in output.values() if isinstance(x, torch.Tensor)), *output.hidden_states]
    return type(output), [x[real] if x.shape[:2] == real.shape else x for x in tensors]


def assert_twice(ours, theirs, exact):
    """The 2× rule: an error of at most twice that of transformers, both against float64."""
    for a, b, wanted in zip(ours, theirs, exact, strict=True):
        assert (a - wanted).abs().max() <= 2 * (b - wanted).abs().max() + 1e-6


def assert_near(ours, exact, share=0.04):
    """int8: off by at most that share of the norm."""
    for a, wanted in zip(ours, exact, strict=True):
        assert (a - wanted).norm() <= share * wanted.norm() + 1e-3


# optimize and pack_encoder ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize(("model_type", "head"), CASES)
def test_optimize(model_type, head, precision, calls):  # noqa: F811
    theirs = make(model_type, head)
    ours, exact = optimize(copy.deepcopy(theirs), precision), copy.deepcopy(theirs).double()
    padded = inputs(theirs)
    whole = padded | {"attention_mask": torch.ones_like(padded["attention_mask"])}
    whole["input_ids"] = whole["input_ids"].clamp(3)
    for batch in (padded, whole):
        before = len(calls)
        (kind, a), (expected, b), (_, wanted) = (answers(model, batch) for model in (ours, theirs, exact))
        assert kind is expected
        served = len(calls) - before
        assert served == 1 or (head == "ForQuestionAnswering" and batch is padded)
        if precision == "fp32":
            assert_twice(a, b, wanted)
        else:
            assert_near(a, wanted)
    with torch.no_grad(), expect(calls, 1):
        assert_same(ours(**whole, return_dict=False), theirs(**whole, return_dict=False), rtol=0.1, atol=0.1)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_pack_encoder_and_its_file(model_type, tmp_path):
    model = make(model_type, "ForSequenceClassification")
    batch = inputs(model)
    engine = pack_encoder(model)
    engine.save(tmp_path / "encoder.safetensors")
    loaded = Engine.load(tmp_path / "encoder.safetensors")
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        wanted = model.base_model(**batch).last_hidden_state[real]
    for one in (engine, loaded):
        torch.testing.assert_close(one(**batch)[real], wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("summary_type", ["first", "last", "mean", "cls_index"])
def test_electra_may_summarize_padding(summary_type, calls):  # noqa: F811
    """The last token, or a mean, is that of padded rows in transformers."""
    theirs = make("electra", "ForMultipleChoice", summary_type=summary_type)
    ours, batch = optimize(copy.deepcopy(theirs)), inputs(theirs)
    with torch.no_grad():
        torch.testing.assert_close(ours(**batch).logits, theirs(**batch).logits, rtol=1e-5, atol=1e-5)
        del batch["attention_mask"]
        with expect(calls, 1):
            torch.testing.assert_close(ours(**batch).logits, theirs(**batch).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_who_reads_the_first_token_alone(model_type):
    for head in HEADS:
        model = make(model_type, head)
        kind = type(model)
        assert reads_first_token(model, kind) == (head == "ForSequenceClassification")
        assert not reads_first_token(model, type("Mine", (kind,), {"__module__": "mine"}))


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_longest_sequence(model_type):
    """By transformers, which has a position for each token of it and none for one more."""
    model = make(model_type)
    length = longest_sequence(model.config)
    assert length == 23 - first_position(model.config)
    for run in (model, optimize(copy.deepcopy(model))):
        with torch.no_grad():
            run(torch.full((1, length), 5))
            with pytest.raises((IndexError, ValueError, RuntimeError)):
                run(torch.full((1, length + 1), 5))


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_calibrated_on_texts_longer_than_a_model_reads(model_type, tokenizer, bert):
    model = make(model_type, vocab_size=bert.config.vocab_size)
    batch = inputs(model)
    with torch.no_grad():
        wanted = model(**batch).last_hidden_state
        got = optimize(
            copy.deepcopy(model),
            "int8",
            ["many different words about a river and its banks, " * 9, "few", *TEXTS],
            tokenizer,
        )(**batch).last_hidden_state
    real = batch["attention_mask"].bool()
    assert_near([got[real]], [wanted[real]], 0.15)


# Weights of another kind --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["Model", "ForMaskedLM", "ForSequenceClassification", "ForMultipleChoice"])
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_quantized_saved_and_read_back_bit_for_bit(model_type, head, tmp_path):
    theirs = make(model_type, head)
    model, batch = quantize_model(copy.deepcopy(theirs)), inputs(theirs)
    assert_near(answers(model, batch)[1], answers(theirs, batch)[1])
    model.save_pretrained(tmp_path)
    read = type(theirs).from_pretrained(tmp_path)
    for a, b in zip(answers(read, batch)[1], answers(model, batch)[1], strict=True):
        assert torch.equal(a, b)
    assert_near(answers(optimize(read), batch)[1], answers(theirs, batch)[1])


def test_a_small_electra_is_quantized_all_but_its_projection(tmp_path):
    theirs = make("electra", "ForMaskedLM", embedding_size=16)
    model, batch = quantize_model(copy.deepcopy(theirs), Int8Config(heads=True)), inputs(theirs)
    assert type(model.electra.embeddings_project) is type(model.generator_lm_head) is torch.nn.Linear
    assert_near(answers(model, batch)[1], answers(theirs, batch)[1])
    model.save_pretrained(tmp_path)
    read = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path)
    assert_near(answers(read, batch)[1], answers(model, batch)[1], 0)


# Students, heads and files ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("architecture", ["distilbert", "roberta"])
@pytest.mark.parametrize("model_type", [one for one in ARCHITECTURES if one != "distilbert"])
def test_a_student_of_all_layers_is_its_teacher(model_type, architecture, head):
    teacher = make(model_type, head, **({"layer_norm_eps": 1e-12} if architecture == "distilbert" else {}))
    student, report = student_from_teacher(teacher, num_layers=2, architecture=architecture)
    assert student.config.model_type == architecture
    assert longest_sequence(student.config) == longest_sequence(teacher.config)
    assert set(report.copied) == set(student.state_dict()) and set(report.copied.values())
    batch = inputs(teacher)
    if architecture == "distilbert":
        batch["token_type_ids"] = torch.zeros_like(batch["input_ids"])
    (_, wanted) = answers(teacher, batch)
    (_, got) = answers(student, {k: v for k, v in batch.items() if architecture == "roberta" or k != "token_type_ids"})
    for mine, theirs in zip(got[-3:], wanted[-3:], strict=True):  # the hidden states
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    pools = {"distilbert": "relu", "roberta": "tanh"}[architecture] != ARCHITECTURES[model_type].pools_by
    if head in ("ForSequenceClassification", "ForMultipleChoice") and pools:
        assert [note for note in report.notes if note.startswith("pools through ")]
    elif head != "Model":
        for mine, theirs in zip(got, wanted, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    assert not [note for note in report.notes if "activation" in note]


@pytest.mark.parametrize("head", ["ForSequenceClassification", "ForMultipleChoice"])
def test_a_distilbert_pools_by_relu_where_electra_has_gelu(head):
    teacher = make("electra", head)
    student, report = student_from_teacher(teacher, num_layers=2)
    assert "pools through relu(z) where the teacher has gelu(z)" in report.notes
    (teacher.classifier if head.startswith("ForS") else teacher.sequence_summary).activation = torch.nn.ReLU()
    batch = {k: v for k, v in inputs(teacher).items() if k != "token_type_ids"}
    torch.testing.assert_close(answers(student, batch)[1][0], answers(teacher, batch)[1][0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_vocabulary_head(model_type):
    model = make(model_type, "ForMaskedLM")
    head, batch = vocabulary_head(model, "test"), inputs(model)
    with torch.no_grad():
        hidden = model.base_model(**batch).last_hidden_state
        assert torch.equal(head.projection(head.transform(hidden)), model(**batch).logits)
    assert head.projection is model.get_output_embeddings()
    with pytest.raises(TypeError, match=r"^test: model must be a DistilBERT, BERT or RoBERTa for masked LM, got "):
        vocabulary_head(model.base_model, "test")


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_attention_inputs_of_the_last_layer(model_type):
    model = make(model_type)
    seen = []
    layer = model.get_submodule(f"{ARCHITECTURES[model_type].layers}.1")
    for name in ("query", "key", "value"):
        linear = layer.get_submodule(ARCHITECTURES[model_type].layer[name])
        linear.register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad():
        output = model(**inputs(model), output_hidden_states=True)
        for a, b in zip(last_attention_inputs(model, output), seen[:3], strict=True):
            assert torch.equal(a, b)


def vocabulary(directory, model):
    from transformers import BertTokenizer

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(chr(97 + i) for i in range(26))]
    BertTokenizer(vocab={word: i for i, word in enumerate(words)}).save_pretrained(directory)
    model.save_pretrained(directory)


@pytest.mark.parametrize("head", ["SequenceClassification", "MaskedLM", "QuestionAnswering", "TokenClassification"])
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_a_checkpoint_of_the_encoder_gets_a_head(model_type, head, tmp_path):
    body = make(model_type)
    vocabulary(tmp_path, body)
    with pytest.raises(CheckpointError, match="lacks"):
        load_with_head(tmp_path, head)
    model, _, random = load_with_head(tmp_path, head, new_head=True)
    assert type(model).__name__ == f"{ARCHITECTURES[model_type].prefix}For{head}"
    outside = {name for name in model.state_dict() if not name.startswith(f"{model.base_model_prefix}.")}
    tied = set(model.all_tied_weights_keys or ())
    assert outside - tied <= set(random) and not {n for n in random if n not in outside and "pooler" not in n}
    for name, tensor in model.base_model.state_dict().items():
        assert "pooler" in name or torch.equal(tensor, body.state_dict()[name])
    (tmp_path / "model.safetensors").unlink()
    model.save_pretrained(tmp_path)
    assert load_with_head(tmp_path, head)[2] == ()


def test_what_cannot_be_loaded_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mpnet"}))
    with pytest.raises(CheckpointError, match="expected a BERT, RoBERTa, DistilBERT model, got model_type 'mpnet'"):
        locate(tmp_path)


@pytest.mark.parametrize("model_type", ["roberta", "data2vec-text", "distilbert", "bert"])
def test_byte_level_tokenizers_read_words_as_in_a_text(model_type, tmp_path):
    """Whoever's model they are beside: a student keeps its teacher's tokenizer."""
    words = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", "a", "b", "Ġ", "Ġa", "Ġb", "ab"]
    merges = [("Ġ", "a"), ("Ġ", "b"), ("a", "b")]
    made = transformers.RobertaTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=merges)
    made.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    tokenizer = load_tokenizer(tmp_path, "TokenClassification")
    encoded = tokenizer(["a", "ba"], is_split_into_words=True)
    assert encoded.tokens() == ["<s>", "Ġa", "Ġb", "a", "</s>"] and encoded.word_ids() == [None, 0, 1, 1, None]
    assert load_tokenizer(tmp_path, "SequenceClassification")("a").tokens() == ["<s>", "a", "</s>"]


@pytest.mark.parametrize("kind", ["XLMRoberta", "Camembert"])
def test_sentencepiece_tokenizers_read_words_as_in_a_text(kind, tmp_path):
    pieces = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -3.0), ("▁a", -1.0), ("a", -2.0)]
    getattr(transformers, f"{kind}Tokenizer")(vocab=pieces).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": {"XLMRoberta": "xlm-roberta"}.get(kind, "camembert")})
    )
    tokenizer = load_tokenizer(tmp_path, "TokenClassification")
    assert tokenizer(["a", "aa"], is_split_into_words=True).tokens()[1:-1] == ["▁a", "▁a", "a"]


# What is not in the table -------------------------------------------------------------------------------------------


def test_the_attention_interface_knows_the_whole_table():
    assert set(ARCHITECTURES) < ENCODERS


TINY = dict(vocab_size=97, hidden_size=30, num_hidden_layers=1, num_attention_heads=3, intermediate_size=37)
OTHERS = ["MPNet", "Albert", "XLMRobertaXL", "RobertaPreLayerNorm", "MegatronBert", "Esm", "ConvBert", "MobileBert"]


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("call", [optimize, pack_encoder, quantize_model])
def test_other_encoders_are_refused_by_name(name, call):
    with torch.device("meta"):
        config = getattr(transformers, f"{name}Config")(**(TINY if name not in ("MobileBert", "ConvBert") else {}))
        model = getattr(transformers, f"{name}Model")(config)
    assert architecture_of(model) is None
    with pytest.raises(TypeError) as error:
        call(model)
    expected = f"model must be a DistilBERT, BERT or RoBERTa encoder, got {name}Model"
    assert str(error.value) == f"{call.__name__}: {expected}"


def test_embeddings_with_more_to_them_are_refused_by_name():
    small, tasks = make("electra", embedding_size=16), make("ernie", use_task_id=True)
    small_message = "config.embedding_size must be hidden_size, 30 (embeddings that are projected are not supported)"
    task_message = "config.use_task_id must be False (task types are not supported), got True"
    for call, owner in ((optimize, "model"), (pack_encoder, "model"), (student_from_teacher, "teacher")):
        for model, message in ((small, f"{small_message}, got 16"), (tasks, task_message)):
            with pytest.raises(ValueError) as error:
                call(model)
            assert str(error.value) == f"{call.__name__}: {owner}.{message}"


@pytest.mark.parametrize(
    "setting", [{"summary_type": "last"}, {"summary_use_proj": False}, {"summary_activation": "tanh"}]
)
def test_a_student_has_no_other_summary_than_electras_own(setting):
    ((name, value),) = setting.items()
    with pytest.raises(ValueError, match=rf"^student_from_teacher: teacher\.config\.{name} must be .*, got {value!r}$"):
        student_from_teacher(make("electra", "ForMultipleChoice", **setting))


def test_task_types_are_not_overlooked(calls):  # noqa: F811
    """ERNIE without task types ignores theirs; what the engine does not know, transformers answers."""
    theirs = make("ernie")
    ours, batch = optimize(copy.deepcopy(theirs)), inputs(theirs)
    task = torch.ones_like(batch["input_ids"])
    with torch.no_grad(), expect(calls, 0):
        assert_same(ours(**batch, task_type_ids=task), theirs(**batch, task_type_ids=task), rtol=0, atol=0)


# Names -----------------------------------------------------------------------------------------------------------

OWN_ATTRIBUTES = ("architectures.py", "distilbert.py", "distilbert_modules.py", "heads.py")  # the drop-in classes
PLAIN_WORDS = re.compile("[a-z]+")  # of no one alone: query, dense, output, activation …


def names_of_modules():
    """What only transformers would call a module, by the tables of architectures.py."""
    paths = [*architectures.EMBEDDINGS.values(), architectures.PROJECTION]
    for known in ARCHITECTURES.values():
        paths += [*known.layer.values(), *(path for head in known.heads.values() for path in head.values())]
    parts = {part for path in paths for part in path.split(".")}
    return {part for part in parts if not PLAIN_WORDS.fullmatch(part)} - {"LayerNorm", "layer_norm"}  # torch's, ours


def test_names_of_modules_stand_once():
    names = names_of_modules()
    assert {"word_embeddings", "q_lin", "sa_layer_norm", "pre_classifier", "lm_head", "out_proj"} <= names
    found = []
    for path in Path(architectures.__file__).parent.parent.rglob("*.py"):
        if path.name not in OWN_ATTRIBUTES:
            for node in ast.walk(ast.parse(path.read_text())):
                said = node.attr if isinstance(node, ast.Attribute) else getattr(node, "value", None)
                if isinstance(said, str) and names & set(said.split(".")):
                    found.append(f"{path.name}:{node.lineno}: {said}")
    assert not found
