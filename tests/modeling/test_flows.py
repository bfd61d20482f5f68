"""What people do with an optimized model: the numbers are transformers' own, and the engine served every call.

``explain`` counts the calls. A flow that comes to fall back shows here, with the reason.
"""

from __future__ import annotations

import copy
import logging
import os
import pickle
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
import transformers
from modeling.test_integrations import rounded
from torch.utils.data import DataLoader

import distilbert_fast
from distilbert_fast import explain, optimize

CLOSE = dict(rtol=1e-3, atol=1e-4)
QUESTIONS = ["Who writes a letter?", "What does the dog do?", "Is it raining?", "Where?"]


def served(model, count):
    """All calls since the last look, by the engine alone."""
    found = explain(model)
    assert found.fallbacks == {}, found
    assert found.served == count, found
    return True


@pytest.fixture
def pair(distilbert_dir):
    """One class with real weights below a head, optimized and as it is."""

    def make(name, **config):
        torch.manual_seed(0)
        plain = getattr(transformers, name).from_pretrained(distilbert_dir, **config).eval()
        return optimize(copy.deepcopy(plain)), plain

    return make


# Trainer ---------------------------------------------------------------------------------------------------------

HEADS = {
    "DistilBertForSequenceClassification": lambda i, ids: {"labels": i % 2},
    "DistilBertForTokenClassification": lambda i, ids: {"labels": [-100, *[1] * (len(ids) - 2), -100]},
    "DistilBertForQuestionAnswering": lambda i, ids: {"start_positions": 1, "end_positions": len(ids) - 2},
    "DistilBertForMaskedLM": lambda i, ids: {"labels": [-100, *ids[1:]]},
}


def trainer(model, tokenizer, texts, directory):
    rows = []
    for i, text in enumerate(texts):
        row = tokenizer(text, return_token_type_ids=False)
        rows.append({**row, **HEADS[type(model).__name__](i, row["input_ids"])})
    padded = {"Sequence": "Padding", "Token": "TokenClassification", "Question": "Padding", "Masked": "Seq2Seq"}
    kind = next(value for key, value in padded.items() if f"For{key}" in type(model).__name__)
    collator = {
        "Padding": lambda: transformers.DataCollatorWithPadding(tokenizer),
        "TokenClassification": lambda: transformers.DataCollatorForTokenClassification(tokenizer),
        "Seq2Seq": lambda: transformers.DataCollatorForSeq2Seq(tokenizer),
    }[kind]()
    arguments = transformers.TrainingArguments(
        directory, per_device_eval_batch_size=2, report_to=[], use_cpu=True, dataloader_pin_memory=False
    )
    return transformers.Trainer(model, arguments, collator, train_dataset=rows, eval_dataset=rows)


@pytest.mark.parametrize("name", HEADS)
def test_trainer_evaluates_and_predicts(name, pair, tokenizer, texts, tmp_path):
    results = []
    models = pair(name)
    for model in models:
        run = trainer(model, tokenizer, texts, tmp_path)
        metrics, predictions = run.evaluate(), run.predict(run.eval_dataset).predictions
        results.append((metrics["eval_loss"], predictions if isinstance(predictions, tuple) else (predictions,)))
    assert served(models[0], 6)  # 5 texts in batches of 2, twice
    (loss, found), (expected_loss, expected) = results
    assert abs(loss - expected_loss) < 1e-4
    for ours, theirs in zip(found, expected, strict=True):
        if "Question" in name or "Sequence" in name:
            np.testing.assert_allclose(ours, theirs, **CLOSE)
        else:  # per token: what is on padding differs
            tokens = [len(tokenizer(text)["input_ids"]) for text in texts]
            for row, n in enumerate(tokens):
                np.testing.assert_allclose(ours[row, :n], theirs[row, :n], **CLOSE)


def test_an_evaluation_after_gradient_checkpointing(pair, tokenizer, texts, tmp_path):
    """It leaves a hook on the embeddings, which asks for gradients."""
    losses = []
    models = pair(next(iter(HEADS)))
    for model in models:
        model.gradient_checkpointing_enable({"use_reentrant": True})
        model.enable_input_require_grads()
        losses.append(trainer(model, tokenizer, texts, tmp_path).evaluate()["eval_loss"])
    assert abs(losses[0] - losses[1]) < 1e-4
    assert served(models[0], 3)
    for model in models:
        model.requires_grad_(False)
    ids = torch.ones(1, 3, dtype=torch.int64)
    outputs = [model.base_model(ids).last_hidden_state for model in models]
    assert outputs[0].requires_grad and outputs[1].requires_grad  # the hook's doing
    assert explain(models[0]).fallbacks == {"gradients are enabled": 1}


def test_trainer_with_padding_on_the_left(pair, tokenizer, texts, tmp_path):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.padding_side = "left"
    ours, plain = pair("DistilBertForSequenceClassification")
    found, expected = (trainer(m, tokenizer, texts, tmp_path).evaluate()["eval_loss"] for m in (ours, plain))
    assert served(ours, 3) and abs(found - expected) < 1e-4


# Pipelines -------------------------------------------------------------------------------------------------------

PIPELINES = {
    "text-classification": ("DistilBertForSequenceClassification", {}),
    "token-classification": ("DistilBertForTokenClassification", {"aggregation_strategy": "simple"}),
    "fill-mask": ("DistilBertForMaskedLM", {}),
    "zero-shot-classification": ("DistilBertForSequenceClassification", {"candidate_labels": ["sport", "rain"]}),
}


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("task", PIPELINES)
def test_pipelines(task, pair, tokenizer, texts):
    name, options = PIPELINES[task]
    labels = {"id2label": {0: "contradiction", 1: "entailment"}, "label2id": {"contradiction": 0, "entailment": 1}}
    ours, plain = pair(name, **(labels if "Sequence" in name else {}))
    given = [f"{text} [MASK]" if task == "fill-mask" else text for text in texts if text]
    results = []
    for model in (ours, plain):
        pipe = transformers.pipeline(task, model=model, tokenizer=tokenizer, device="cpu")
        results.append([rounded(pipe(given, batch_size=size, **options)) for size in (1, 2)])
    assert results[0] == results[1]
    assert explain(ours).served >= 6 and explain(ours).fallbacks == {}


def test_feature_extraction(pair, tokenizer, texts):
    ours, plain = pair("DistilBertModel")
    found, expected = (
        transformers.pipeline("feature-extraction", model=m, tokenizer=tokenizer, device="cpu")(texts)
        for m in (ours, plain)
    )
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, **CLOSE)
    assert served(ours, len(texts))


def test_question_answering_reads_padding(pair, tokenizer, texts):
    """As its softmax does, and as windows of transformers' own evaluation are padded."""
    ours, plain = pair("DistilBertForQuestionAnswering")
    batch = tokenizer(QUESTIONS, texts[:4], padding="max_length", max_length=64, return_tensors="pt", truncation=True)
    batch.pop("token_type_ids")
    starts = torch.tensor([3, 60, 2, 1])
    with torch.no_grad():
        for given in ({}, {"start_positions": starts, "end_positions": starts + 1}, {"output_hidden_states": True}):
            a, b = ours(**batch, **given), plain(**batch, **given)
            assert a.keys() == b.keys()
            for key in b:
                torch.testing.assert_close(a[key], b[key], **CLOSE)
    assert served(ours, 3)


# Other libraries -------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_sentence_transformers(bert_dir, texts):
    library = pytest.importorskip("sentence_transformers")
    plain, fast = (library.SentenceTransformer(str(bert_dir), device="cpu") for _ in range(2))
    model = optimize(fast[0].auto_model)
    for options in ({}, {"batch_size": 2}, {"normalize_embeddings": True}, {"output_value": "token_embeddings"}):
        found, expected = fast.encode(texts, **options), plain.encode(texts, **options)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), **CLOSE)
    assert served(model, 1 + 3 + 1 + 1)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_sentence_transformers_with_a_pooling_of_ones_own(bert_dir, texts):
    """One that reads every position, padding too."""
    library = pytest.importorskip("sentence_transformers")

    class Mean(torch.nn.Module):
        def forward(self, features):
            return {**features, "sentence_embedding": features["token_embeddings"].mean(1)}

    plain, fast = (library.SentenceTransformer(str(bert_dir), device="cpu") for _ in range(2))
    for model in (plain, fast):
        model[1] = Mean()
    model = optimize(fast[0].auto_model)
    np.testing.assert_allclose(fast.encode(texts), plain.encode(texts), **CLOSE)
    assert served(model, 1)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_cross_encoder(bert_dir, tmp_path, tokenizer, texts):
    library = pytest.importorskip("sentence_transformers")
    torch.manual_seed(0)
    made = transformers.BertForSequenceClassification.from_pretrained(bert_dir, num_labels=1)
    made.save_pretrained(tmp_path), tokenizer.save_pretrained(tmp_path)
    plain, fast = (library.CrossEncoder(str(tmp_path), device="cpu") for _ in range(2))
    model = optimize(fast.model if isinstance(fast.model, torch.nn.Module) else fast[0].auto_model)
    pairs = list(zip(QUESTIONS, texts, strict=False))
    np.testing.assert_allclose(fast.predict(pairs), plain.predict(pairs), **CLOSE)
    ranked = [[row["corpus_id"] for row in m.rank("a dog", texts[:4])] for m in (fast, plain)]
    assert ranked[0] == ranked[1]
    assert served(model, 2)


def test_adapters_of_peft(pair, batch):
    peft = pytest.importorskip("peft")
    ours, plain = pair("DistilBertForSequenceClassification")
    config = peft.LoraConfig(target_modules=["q_lin", "v_lin"], task_type="SEQ_CLS", init_lora_weights=False)
    torch.manual_seed(1)
    fast = peft.get_peft_model(ours, config).eval()
    torch.manual_seed(1)
    slow = peft.get_peft_model(plain, config).eval()
    with torch.no_grad():
        torch.testing.assert_close(fast(**batch).logits, slow(**batch).logits, **CLOSE)
        assert sum(explain(ours).fallbacks.values()) == 1  # layers of another library
        torch.testing.assert_close(
            fast.merge_and_unload()(**batch).logits, slow.merge_and_unload()(**batch).logits, **CLOSE
        )
    assert explain(ours).served == 1


def test_prompts_of_peft(pair, batch):
    """They come as vectors in place of ids, which transformers' own forward takes."""
    peft = pytest.importorskip("peft")
    ours, plain = pair("DistilBertForSequenceClassification")
    config = dict(task_type="SEQ_CLS", num_virtual_tokens=2, token_dim=ours.config.dim, num_layers=ours.config.n_layers)
    logits = []
    for model in (ours, plain):
        torch.manual_seed(1)
        tuned = peft.get_peft_model(model, peft.PromptTuningConfig(num_attention_heads=12, **config)).eval()
        with torch.no_grad():
            logits.append(tuned(**batch).logits)
    torch.testing.assert_close(*logits, **CLOSE)
    assert explain(ours).served == 0 and explain(ours).fallbacks == {"no input_ids": 1}


def test_accelerate(pair, tokenizer, texts):
    accelerate = pytest.importorskip("accelerate")
    ours, plain = pair("DistilBertForSequenceClassification")
    accelerator = accelerate.Accelerator(cpu=True)
    rows = [tokenizer(text, return_token_type_ids=False) for text in texts]
    loader = DataLoader(rows, 2, collate_fn=transformers.DataCollatorWithPadding(tokenizer))
    model, loader = accelerator.prepare(ours, loader)
    with torch.no_grad():
        for batch in loader:
            torch.testing.assert_close(accelerator.gather(model(**batch).logits), plain(**batch).logits, **CLOSE)
    assert served(ours, 3)


# Processes, threads, copies --------------------------------------------------------------------------------------


class Predictions(torch.utils.data.Dataset):
    """Rows that a worker's model makes."""

    def __init__(self, model, ids):
        self.model, self.ids = model, ids

    def __len__(self):
        return len(self.ids)

    @torch.no_grad()
    def __getitem__(self, i):
        logits = self.model(self.ids[i : i + 1]).logits[0]
        return logits, explain(self.model).served


def test_workers_of_a_data_loader(pair, batch):
    ours, plain = pair("DistilBertForSequenceClassification")
    ids = batch["input_ids"][:4]
    loader = DataLoader(Predictions(ours, ids), 2, num_workers=2, multiprocessing_context="fork", timeout=100)
    logits, counts = zip(*loader, strict=True)
    with torch.no_grad():
        torch.testing.assert_close(torch.cat(logits), plain(ids).logits, **CLOSE)
    assert sorted(torch.cat(counts).tolist()) == [1, 1, 2, 2]


def test_threads(pair, batch):
    ours, plain = pair("DistilBertForSequenceClassification")
    with torch.no_grad():
        expected = plain(**batch).logits
    found = []

    @torch.no_grad()
    def work():
        for _ in range(10):
            found.append(ours(**batch).logits)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 40
    for logits in found:
        torch.testing.assert_close(logits, expected, **CLOSE)
    assert served(ours, 40)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies(copied, pair, batch):
    ours, plain = pair("DistilBertForSequenceClassification")
    other = copied(ours)
    with torch.no_grad():
        other.classifier.bias += 1
        torch.testing.assert_close(other(**batch).logits, plain(**batch).logits + 1, **CLOSE)
        torch.testing.assert_close(ours(**batch).logits, plain(**batch).logits, **CLOSE)
    assert served(other, 1) and served(ours, 1)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled(backend, pair, batch):
    ours, plain = pair("DistilBertForSequenceClassification")
    torch.compiler.reset()
    compiled = torch.compile(ours, backend=backend)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(compiled(**batch).logits, plain(**batch).logits, **CLOSE)
    assert served(ours, 2)


# What explain says -----------------------------------------------------------------------------------------------


def test_explain(pair, batch, caplog):
    ours, plain = pair("DistilBertForSequenceClassification")
    assert explain(plain) == distilbert_fast.Explanation(False, None, 0, {})
    assert "call distilbert_fast.optimize(model)" in str(explain(plain)).lower()
    ours(**batch)  # gradients
    with torch.no_grad(), caplog.at_level(logging.INFO, "distilbert_fast"):
        ours(**batch)
        ours.train()(**batch)
        ours.eval()(**batch, output_attentions=True)
        with torch.autocast("cpu", torch.bfloat16):
            ours(**batch)
        embedded = ours.get_input_embeddings()(batch["input_ids"])
        ours(inputs_embeds=embedded)
        handle = ours.distilbert.transformer.layer[0].register_forward_hook(lambda *args: None)
        ours(**batch)
        handle.remove()
        ours(**batch, some_unknown_argument=3)
    found = explain(ours)
    assert found.optimized and found.engine == "fp32 by the C++ encoder on cpu" and found.served == 2
    assert found.fallbacks == {
        "gradients are enabled": 1,
        "training mode": 1,
        "output_attentions": 1,
        "autocast": 1,
        "no input_ids": 1,
        "a hook inside the encoder": 1,
    }
    assert str(found).splitlines() == [
        "engine: fp32 by the C++ encoder on cpu",
        "calls served by the engine: 2",
        *(f"calls served by the model's own forward: 1 ({reason})" for reason in found.fallbacks),
    ]
    assert f"DistilBertModel {list(batch['input_ids'].shape)}: engine" in caplog.messages
    assert any(message.endswith("own forward: training mode") for message in caplog.messages)
    assert explain(ours.distilbert) == found
    with pytest.raises(TypeError, match="explain: model must be a model of transformers, got Linear"):
        explain(torch.nn.Linear(2, 2))


def test_calls_are_logged_where_the_environment_asks():
    script = (
        "import torch, transformers, distilbert_fast\n"
        "config = transformers.DistilBertConfig(vocab_size=9, dim=8, n_heads=2, n_layers=1, hidden_dim=8)\n"
        "model = distilbert_fast.optimize(transformers.DistilBertModel(config).eval())\n"
        "ids = torch.ones(2, 3, dtype=torch.int64)\n"
        "torch.set_grad_enabled(False)\n"
        "model(ids), model(ids, output_attentions=True)\n"
    )
    environment = os.environ | {"DISTILBERT_FAST_LOG": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    logged = [line for line in done.stderr.splitlines() if line.startswith("distilbert_fast: ")]
    lines = ["engine", "own forward: output_attentions"]
    assert logged == [f"distilbert_fast: DistilBertModel [2, 3]: {line}" for line in lines]
