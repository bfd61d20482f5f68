"""Compressed models in a process that has imported transformers alone: refused, and read once it imports us."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
import transformers
from compressed_models import FORMATS
from tiny_models import tiny

IDS = torch.arange(2, 11)[None]
MODELS = {
    "pruned": "RobertaModel",
    "pruned and int8": "RobertaModel",
    "int8": "DistilBertForSequenceClassification",
    "codebook 16": "DistilBertForSequenceClassification",
    "sparse": "BertForSequenceClassification",
}
FRESH = """
import json, sys, torch, transformers
transformers.logging.set_verbosity_error()
refused, found = {}, {}
directories = json.loads(sys.argv[1])
for name, (directory, *kinds) in directories.items():
    refused[name] = 0
    for kind in kinds:
        try:
            getattr(transformers, kind).from_pretrained(directory)
        except RuntimeError as error:
            assert "size mismatch" in str(error) or "ignore_mismatched_sizes" in str(error), error
            refused[name] += 1
import distilbert_fast
for name, (directory, kind, *_) in directories.items():
    model = getattr(transformers, kind).from_pretrained(directory).eval()
    with torch.no_grad():
        found[name] = model(torch.arange(2, 11)[None])[0].flatten().tolist()
print(json.dumps([refused, found]))
"""


@pytest.fixture(scope="module")
def read(tmp_path_factory):
    """Of each model what it computes here, how many classes refused it there, and what it computed there in the end."""
    models, given = {}, {}
    for name, kind in MODELS.items():
        models[name] = FORMATS[name](tiny(getattr(transformers, kind), num_hidden_layers=3)).eval()
        directory = tmp_path_factory.mktemp("fresh")
        models[name].save_pretrained(directory)
        auto = "AutoModel" + ("ForSequenceClassification" if kind.endswith("Classification") else "")
        given[name] = [str(directory), auto, kind]
    command = [sys.executable, "-c", FRESH, json.dumps(given)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stderr
    refused, found = json.loads(ran.stdout.strip().splitlines()[-1])
    with torch.no_grad():
        return {name: (model(IDS)[0].flatten(), refused[name], found[name]) for name, model in models.items()}


@pytest.mark.parametrize("name", MODELS)
def test_a_fresh_process_needs_our_import(name, read):
    want, refused, found = read[name]
    assert refused == 2  # by the auto class, and by the model's own
    torch.testing.assert_close(torch.tensor(found), want, rtol=1e-5, atol=1e-6)
