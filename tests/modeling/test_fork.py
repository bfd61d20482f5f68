"""A process that loads and optimizes a model, then forks: the child predicts, as it does with transformers alone."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import transformers

# Large enough that torch and our kernels would use threads for a weight.
SIZES = dict(vocab_size=300, max_position_embeddings=16)
WIDE = dict(hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4) | SIZES
CONFIGS = {
    "bert": transformers.BertConfig(**WIDE),
    "roberta": transformers.RobertaConfig(**WIDE),
    "distilbert": transformers.DistilBertConfig(dim=256, hidden_dim=512, n_layers=2, n_heads=4, **SIZES),
}
LOAD = {
    "plain": "load()",
    "fp32": "optimize(load(), 'fp32')",
    "bf16": "optimize(load(), 'bf16')",
    "fp16": "optimize(load(), 'fp16')",
    "int8": "optimize(load(), 'int8')",
    "calibrated": "optimize(load(), 'int8', calibration=[torch.ones(2, 5, dtype=torch.int64)])",
    "quantize_model": "distilbert_fast.quantize_model(load())",
    "quantized_at_load": "load(quantization_config=distilbert_fast.Int8Config())",
    "pack_encoder": "distilbert_fast.pack_encoder(load(), 'int8')",
    "pruned": "pruned()",
    "attention": "load(attn_implementation='distilbert_fast')",
}
SCRIPT = """
import os, signal, sys
import torch, transformers
torch.set_num_threads(2)
import distilbert_fast
from distilbert_fast import optimize

def predict(model):
    with torch.no_grad():
        output = model(torch.arange(2, 12).view(2, 5))
    return output if isinstance(output, torch.Tensor) else output[0]

def load(**options):
    torch.manual_seed(0)  # of a head that the checkpoint lacks
    return getattr(module, name).from_pretrained(directory, **options).eval()

def pruned():
    model = load()
    model.prune_heads({0: [1], 1: [0, 2]})
    return model

def forked(make):
    model = make()
    child = os.fork()
    if child == 0:
        signal.alarm(300)  # ends a child that waits for threads that are not there
        try:
            plain = pruned() if "pruned" in text else load()
            found = predict(model)
            expected = predict(plain.base_model if "pack_encoder" in text else plain)
            os._exit(0 if torch.allclose(found, expected, rtol=0, atol=0.05) else 3)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(4)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

def run(modes):
    global text
    for text in modes:
        code = forked(lambda: eval(text))
        assert code == 0, f"{name}: {text}: the child ended with {code}"
"""


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """A checkpoint of each architecture that every class reads."""
    made = {}
    for kind, config in CONFIGS.items():
        torch.manual_seed(0)
        made[kind] = tmp_path_factory.mktemp(kind)
        config.num_labels = 2
        transformers.AutoModelForSequenceClassification.from_config(config).save_pretrained(made[kind])
    return made


CASES = {
    "bert": [
        ("transformers", "BertModel", ["fp32", "int8"]),  # with a pooler; the others have none
        ("transformers", "BertForSequenceClassification", [mode for mode in LOAD if mode not in ("plain", "pruned")]),
        ("transformers", "BertForTokenClassification", ["int8"]),
    ],
    "roberta": [("transformers", "RobertaModel", ["int8"])],
    "distilbert": [
        ("transformers", "DistilBertForQuestionAnswering", ["fp32", "int8"]),
        ("distilbert_fast", "DistilBertModel", ["plain", "pruned"]),
        ("distilbert_fast", "DistilBertForSequenceClassification", ["plain", "fp32", "int8", "quantized_at_load"]),
    ],
}


@pytest.fixture(scope="module")
def ended(directories):
    """How the one process of all kinds ended: what it said, and the kinds that it came through."""
    script = SCRIPT
    for kind, cases in CASES.items():
        script += f"directory = {str(directories[kind])!r}\n"
        for module, name, modes in cases:
            script += f"module, name = {module}, {name!r}\nrun({[LOAD[mode] for mode in modes]!r})\n"
        script += f"print({kind!r}, flush=True)\n"
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=1800)


@pytest.mark.parametrize("kind", CASES)
def test_a_forked_child_predicts(ended, kind):
    assert kind in ended.stdout.split(), ended.stderr[-3000:]
    assert ended.returncode == 0 or kind != list(CASES)[-1], ended.stderr[-3000:]


def test_a_child_forked_while_another_thread_packs():
    script = """
import os, signal, threading
import torch, transformers
torch.set_num_threads(1)
from distilbert_fast import optimize
from distilbert_fast.modeling import accelerator

model = optimize(transformers.BertModel(transformers.BertConfig(hidden_size=64, intermediate_size=64,
    num_hidden_layers=1, num_attention_heads=2, vocab_size=90)).eval())
ids = torch.arange(2, 12).view(2, 5)
packs, forked = threading.Event(), threading.Event()
pack = accelerator.Accelerator.pack

def slowly(self, encoder):
    packs.set()
    forked.wait()
    return pack(self, encoder)

def change():
    with torch.no_grad():
        model.encoder.layer[0].output.dense.weight.mul_(2)
        model(ids)

accelerator.Accelerator.pack = slowly
thread = threading.Thread(target=change)
thread.start()
packs.wait()
child = os.fork()
if child == 0:
    signal.alarm(60)
    forked.set()
    with torch.no_grad():
        model(ids)
    os._exit(7)
forked.set()
thread.join()
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=200)
    assert (done.stdout, done.returncode) == ("7\n", 0), done.stderr
