"""Turns, medians and sizes; no time is asserted, only what is done with the times."""

from __future__ import annotations

import pytest
import torch
from demo_input import bert, load_classifier, sentences
from safetensors.torch import save_file

from distilbert_fast.evaluation import speed


def inputs(count: int) -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": torch.full((2, 3), i)} for i in range(count)]


def test_candidates_take_turns_on_the_same_inputs():
    calls = []

    def candidate(name):
        return lambda input_ids: calls.append((name, int(input_ids[0, 0])))

    seconds = speed.time_calls({"A": candidate("A"), "B": candidate("B")}, inputs(2), turns=3)
    assert calls == [("A", 0), ("A", 1), ("B", 0), ("B", 1)] * 4  # one untimed turn and three timed ones
    assert {name: [len(turn) for turn in turns] for name, turns in seconds.items()} == {"A": [2] * 3, "B": [2] * 3}
    assert all(second >= 0 for turns in seconds.values() for turn in turns for second in turn)


def test_latency_and_throughput_are_medians_over_turns(monkeypatch):
    turns = {"A": [[1.0, 3.0, 2.0], [5.0, 5.0, 5.0], [0.5, 0.5, 4.0]]}
    monkeypatch.setattr(speed, "time_calls", lambda models, inputs, count: turns)
    assert speed.latency({}, inputs(3)) == {"A": speed.Measured(2000.0, 500.0, 5000.0)}
    assert speed.throughput({}, inputs(3)) == {"A": speed.Measured(1.0, 6 / 15, 6 / 5)}


def test_steps_are_timed_in_training_and_leave_generators_and_mode_as_they_were(tmp_path):
    model, tokenizer = load_classifier(bert(tmp_path / "bert"), ["a", "b"], new_head=True)
    (batch,) = speed.batches_of_texts(tokenizer, [text for text, _ in sentences(4, seed=0)], 4, 8, "cpu")
    modes, state, weight = [], torch.get_rng_state(), model.classifier.weight.detach().clone()
    model.register_forward_pre_hook(lambda module, inputs: modes.append(module.training))
    seconds = speed.step_seconds(model, {**batch, "labels": torch.tensor([0, 1, 0, 1])})
    assert seconds > 0 and modes == [True] * 3 and not model.training
    assert torch.equal(torch.get_rng_state(), state) and not torch.equal(model.classifier.weight, weight)
    assert speed.call_seconds(model, batch) > 0 and modes == [True] * 3 + [False] * 3


def test_nothing_to_time_is_refused():
    with pytest.raises(ValueError, match=r"^time_calls: expected inputs and turns >= 1, got 0 inputs, 3 turns$"):
        speed.time_calls({}, [], 3)
    with pytest.raises(ValueError, match=r"^time_calls: expected inputs and turns >= 1, got 1 inputs, 0 turns$"):
        speed.time_calls({}, inputs(1), 0)


def test_batches_hold_every_sentence_padded_to_the_longest_of_its_batch(tmp_path):
    _, tokenizer = load_classifier(bert(tmp_path / "bert"), ["a", "b"], new_head=True)
    texts = [text for text, _ in sentences(10, seed=0)]
    made = speed.batches_of_texts(tokenizer, texts, 4, 8, "cpu")
    assert [len(batch["input_ids"]) for batch in made] == [4, 4, 2]
    lengths = [min(8, len(text.split()) + 2) for text in texts]
    assert [batch["attention_mask"].sum(1).tolist() for batch in made] == [lengths[:4], lengths[4:8], lengths[8:]]
    assert [batch["input_ids"].shape[1] for batch in made] == [max(lengths[i : i + 4]) for i in (0, 4, 8)]
    paired = speed.batches_of_texts(tokenizer, list(zip(texts, reversed(texts), strict=True)), 8, 64, "cpu")
    assert [len(batch["input_ids"]) for batch in paired] == [8, 2]
    counts = [len(text.split()) for text in texts]
    assert paired[1]["token_type_ids"].sum(1).tolist() == [counts[1] + 1, counts[0] + 1]


def test_parameters_count_a_shared_tensor_once(tmp_path):
    from transformers import AutoModelForMaskedLM

    path = bert(tmp_path / "bert")
    model = AutoModelForMaskedLM.from_pretrained(path)  # decoder and word embeddings are one tensor
    assert speed.parameters(model) == sum(parameter.numel() for parameter in model.parameters())


def test_file_bytes(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        speed.file_bytes(tmp_path)
    assert str(error.value) == f"file_bytes: expected .safetensors files in {str(tmp_path)!r}, got none"
    save_file({"x": torch.zeros(100)}, tmp_path / "a.safetensors")
    save_file({"x": torch.zeros(50)}, tmp_path / "b.safetensors")
    (tmp_path / "other.json").write_text("{}" * 1000)
    sizes = [(tmp_path / name).stat().st_size for name in ("a.safetensors", "b.safetensors")]
    assert speed.file_bytes(tmp_path) == sum(sizes) > 600
