"""The drop-in classes and the attention interface where people use them."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
import transformers

import distilbert_fast

QUESTION = {"question": "Where does Anna live?", "context": "Anna lives in Oslo. Ben, whom she met in Rome, does not."}
PIPELINES = {
    "text-classification": ("DistilBertForSequenceClassification", ["It rains.", "The sun shines on all of us today."]),
    "fill-mask": ("DistilBertForMaskedLM", ["Paris is the [MASK] of France.", "A dog is [MASK]."]),
    "token-classification": ("DistilBertForTokenClassification", ["Anna lives in Oslo.", "Ben."]),
    "question-answering": ("DistilBertForQuestionAnswering", QUESTION),
}


def rounded(result):
    if isinstance(result, dict):
        return {key: rounded(value) for key, value in result.items()}
    if isinstance(result, (list, tuple)):
        return [rounded(value) for value in result]
    return round(float(result), 3) if hasattr(result, "__float__") else result


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize("task", PIPELINES)
def test_pipelines(task, batch_size, distilbert_dir, tokenizer):
    if task not in transformers.pipelines.get_supported_tasks():
        pytest.skip(f"transformers {transformers.__version__} has no {task} pipeline")
    name, texts = PIPELINES[task]
    torch.manual_seed(0)
    theirs = getattr(transformers, name).from_pretrained(distilbert_dir).eval()
    ours = getattr(distilbert_fast, name)(theirs.config).eval()
    ours.load_state_dict(theirs.state_dict())
    results = []
    for model in (ours, theirs):
        pipe = transformers.pipeline(task, model=model, tokenizer=tokenizer, batch_size=batch_size, device="cpu")
        results.append(rounded(pipe(**texts) if isinstance(texts, dict) else pipe(texts)))
    assert results[0] == results[1]


@pytest.mark.parametrize("training", [False, True])
def test_compiles_once_for_all_lengths(training, tiny_config):
    tiny_config.max_position_embeddings = 60
    torch.manual_seed(0)
    model = distilbert_fast.DistilBertForSequenceClassification(tiny_config).eval()
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend=count)
    with torch.set_grad_enabled(training):
        for length in range(2, 52):
            mask = (torch.arange(length) < torch.tensor([length, 1, length // 2])[:, None]).long()
            batch = {"input_ids": torch.randint(1, 97, (3, length)), "attention_mask": mask}
            logits = compiled(**batch).logits
            torch.testing.assert_close(logits, model(**batch).logits, atol=2e-5, rtol=1e-4)
    assert len(graphs) <= 2  # the first length, then any


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_numbers_and_gradients(backend, tiny_config):
    tiny_config.dropout = tiny_config.attention_dropout = tiny_config.seq_classif_dropout = 0.0
    tiny_config.n_layers = 1
    model = distilbert_fast.DistilBertForSequenceClassification(tiny_config).train()
    mask = (torch.arange(9) < torch.tensor([9, 4, 1])[:, None]).long()
    batch = {"input_ids": torch.randint(1, 97, (3, 9)), "attention_mask": mask, "labels": torch.tensor([0, 1, 1])}
    torch.compiler.reset()
    results = []
    for forward in (torch.compile(model, fullgraph=True, backend=backend), model):
        model.zero_grad()
        head_mask = torch.tensor([1.0, 0.5, 0.0], requires_grad=True)
        output = forward(**batch, head_mask=head_mask)
        output.loss.backward()
        results.append([output.logits, head_mask.grad, *(p.grad for p in model.parameters())])
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-3)


def test_exports_with_dynamic_shapes(tiny_config):
    model = distilbert_fast.DistilBertForTokenClassification(tiny_config).eval()

    def batch(*lengths):
        length = max(lengths)
        mask = (torch.arange(length) < torch.tensor(lengths)[:, None]).long()
        return torch.randint(1, 97, (len(lengths), length)), mask

    dynamic = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length", max=23)}
    program = torch.export.export(model, batch(9, 4, 1), dynamic_shapes=(dynamic, dynamic)).module()
    given = batch(2, 12, 5, 1)
    logits = program(*given)["logits"]
    torch.testing.assert_close(logits, model(*given, keep_padding=True).logits, atol=2e-5, rtol=1e-4)


def test_compiled_padding_only_is_finite(tiny_config):
    model = distilbert_fast.DistilBertModel(tiny_config).eval()
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager")
    ids, mask = torch.ones(2, 4, dtype=torch.int64), torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0]])
    hidden = compiled(ids, mask).last_hidden_state
    hidden.sum().backward()
    assert hidden.isfinite().all() and all(p.grad.isfinite().all() for p in model.parameters())


TRAINING = [
    ("it is a good day", 1),
    ("it is a bad day", 0),
    ("good good good work, all of it", 1),
    ("bad work", 0),
    ("a good dog", 1),
    ("what a bad and terrible dog it was that night", 0),
    ("all is good", 1),
    ("bad", 0),
]


def train(model, tokenizer, directory, **changes):
    data = [{**tokenizer(text), "labels": label} for text, label in TRAINING]
    for row in data:
        row.pop("token_type_ids", None)
    given = {
        "per_device_train_batch_size": 4,
        "num_train_epochs": 12,
        "learning_rate": 3e-4,
        "lr_scheduler_type": "constant",
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "use_cpu": True,
        "seed": 0,
        **changes,
    }
    trainer = transformers.Trainer(
        model,
        transformers.TrainingArguments(output_dir=str(directory), **given),
        data_collator=transformers.DataCollatorWithPadding(tokenizer),
        train_dataset=data,
    )
    return trainer, trainer.train()


@pytest.mark.parametrize("bf16", [False, True])
def test_trainer(bf16, distilbert_dir, tokenizer, tmp_path):
    torch.manual_seed(0)
    model = distilbert_fast.DistilBertForSequenceClassification.from_pretrained(distilbert_dir, num_labels=2)
    trainer, _ = train(model, tokenizer, tmp_path, bf16=bf16)
    assert all(p.dtype == torch.float32 for p in model.parameters())
    predicted = trainer.predict(trainer.train_dataset).predictions.argmax(-1)
    assert predicted.tolist() == [label for _, label in TRAINING]
    trainer.save_model(tmp_path / "saved")
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved").eval()
    batch = tokenizer([text for text, _ in TRAINING], padding=True, return_tensors="pt", return_token_type_ids=False)
    assert plain(**batch).logits.argmax(-1).tolist() == predicted.tolist()


def test_accumulated_gradients_are_those_of_one_batch(tiny_config, tokenizer, tmp_path):
    """transformers' own class gets gradients four times as large."""
    tiny_config.vocab_size = tokenizer.vocab_size
    tiny_config.dropout = tiny_config.attention_dropout = tiny_config.seq_classif_dropout = 0.0
    torch.manual_seed(0)
    model = distilbert_fast.DistilBertForSequenceClassification(tiny_config)
    weights = []
    for batch, steps in ((8, 1), (2, 4)):
        clone = copy.deepcopy(model)
        train(
            clone,
            tokenizer,
            tmp_path,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=steps,
            max_steps=1,
            optim="sgd",
            learning_rate=1.0,
            max_grad_norm=0.0,
        )
        weights.append(clone.state_dict())
    for key, value in weights[0].items():
        torch.testing.assert_close(weights[1][key], value, atol=1e-6, rtol=1e-4, msg=key)
    assert not torch.equal(weights[0]["classifier.weight"], model.state_dict()["classifier.weight"])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_sentence_transformers(bert_dir, distilbert_dir, texts):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    plain = sentence_transformers.SentenceTransformer(str(bert_dir), device="cpu")
    ours = sentence_transformers.SentenceTransformer(
        str(bert_dir), device="cpu", model_kwargs={"attn_implementation": "distilbert_fast"}
    )
    assert ours[0].auto_model.config._attn_implementation == "distilbert_fast"
    torch.testing.assert_close(
        torch.tensor(ours.encode(texts)), torch.tensor(plain.encode(texts)), atol=1e-5, rtol=1e-4
    )
    distil = sentence_transformers.SentenceTransformer(str(bert_dir), device="cpu")
    distil[0].auto_model = distilbert_fast.DistilBertModel.from_pretrained(distilbert_dir).eval()
    torch.testing.assert_close(
        torch.tensor(distil.encode(texts)), torch.tensor(plain.encode(texts)), atol=1e-4, rtol=1e-3
    )


def test_empty_weights_and_offloading(tiny_config, tmp_path):
    """accelerate makes a model without memory, and brings weights in when a module is called."""
    accelerate = pytest.importorskip("accelerate")
    torch.manual_seed(0)
    model = distilbert_fast.DistilBertForMaskedLM(tiny_config).eval()
    model.save_pretrained(tmp_path)
    with accelerate.init_empty_weights():
        empty = distilbert_fast.DistilBertForMaskedLM(tiny_config)
    assert {p.device.type for p in empty.parameters()} == {"meta"}
    ids, mask = torch.randint(1, 97, (2, 5)), torch.tensor([[1] * 5, [1, 1, 0, 0, 0]])
    expected = model(ids, mask).logits
    for options in ({"low_cpu_mem_usage": True}, {"device_map": "cpu"}):
        loaded = distilbert_fast.DistilBertForMaskedLM.from_pretrained(tmp_path, **options).eval()
        assert torch.equal(loaded(ids, mask).logits, expected)
    accelerate.cpu_offload(model, execution_device="cpu")
    with torch.no_grad():  # a hooked nn.Linear computes as torch does, another may be the op's
        torch.testing.assert_close(model(ids, mask).logits, expected, rtol=1e-5, atol=1e-6)


def test_autocast_keeps_the_residual_stream_in_float32(distilbert_dir, batch):
    model = distilbert_fast.DistilBertModel.from_pretrained(distilbert_dir).eval()
    theirs = transformers.DistilBertModel.from_pretrained(distilbert_dir).eval()
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        exact = theirs(**batch).last_hidden_state[real]
        with torch.autocast("cpu", torch.bfloat16):
            a, b = (m(**batch).last_hidden_state for m in (model, theirs))
    assert a.dtype == b.dtype == torch.float32
    assert (a[real] - exact).abs().max() <= 2 * (b[real] - exact).abs().max()


def test_a_training_step_under_autocast(distilbert_dir, batch):
    """Loss and gradients as near to those in float64 as transformers' own."""
    config = {"dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0}
    torch.manual_seed(0)
    theirs = transformers.DistilBertForSequenceClassification.from_pretrained(distilbert_dir, **config).train()
    model = distilbert_fast.DistilBertForSequenceClassification(theirs.config).train()
    model.load_state_dict(theirs.state_dict())
    exact = copy.deepcopy(theirs).double()
    losses = []
    for m, precision in ((model, torch.bfloat16), (theirs, torch.bfloat16), (exact, None)):
        with contextlib.nullcontext() if precision is None else torch.autocast("cpu", precision):
            losses.append(m(**batch, labels=torch.tensor([0, 1, 1, 0, 1])).loss)
        losses[-1].backward()
    a, b, c = (loss.item() for loss in losses)
    assert abs(a - c) <= 2 * abs(b - c) + 2**-8 * abs(c)
    gradients = ([p.grad.double() for p in m.parameters()] for m in (model, theirs, exact))
    for (key, parameter), a, b, c in zip(model.named_parameters(), *gradients, strict=True):
        assert parameter.grad.dtype == torch.float32
        # Norms: where a gradient is only rounding, its largest element is a matter of luck.
        assert (a - c).norm() <= 2 * (b - c).norm() + 2**-8 * c.norm(), key
