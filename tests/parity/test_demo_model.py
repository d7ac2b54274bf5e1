"""The demo model, real weights and real text: what transformers writes, and what the paper says of GRIFFIN.

All tests of it that compute are here, so that one worker loads it, and what they compile is shared: prompts of the
passages in one batch, answers in another.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
from conftest import PASSAGES, first_and_slow
from reference import load_torch, oracle_squares, oracle_topk, torch_greedy, torch_intermediates

import griffin_jax as gj
from griffin_jax.cli import main as cli
from griffin_jax.evaluation import report
from griffin_jax.evaluation.batches import Item, batch_of
from griffin_jax.evaluation.forced import score_answers
from griffin_jax.evaluation.grid import grid
from griffin_jax.evaluation.prompts import summarization_prompt

NEW = 16


@pytest.fixture(scope="module", params=first_and_slow(1, PASSAGES[:1], PASSAGES[1:]), ids=["first", "others"])
def passages(request) -> list[str]:
    return request.param


@pytest.fixture(scope="module")
def pruned(demo_llm, passages) -> gj.Generation:
    """Answers with half of the neurons."""
    return demo_llm.generate(passages, max_new_tokens=NEW, density=0.5, ignore_eos=True)


@pytest.mark.thorough
def test_dense_answers_are_those_of_transformers(demo_llm, demo_torch, passages):
    out = demo_llm.generate(passages, max_new_tokens=NEW, density=1.0, ignore_eos=True)
    for passage, tokens in zip(passages, out.tokens, strict=True):
        assert tokens == torch_greedy(demo_torch, demo_llm.tokenizer.encode(passage), NEW)


@pytest.mark.slow
def test_long_answers_are_those_of_transformers(demo_llm, demo_torch):
    for passage in PASSAGES:
        out = demo_llm.generate(passage, max_new_tokens=64, density=1.0, ignore_eos=True)
        assert out.tokens[0] == torch_greedy(demo_torch, demo_llm.tokenizer.encode(passage), 64)


@pytest.mark.slow
def test_experts_are_the_oracles(demo_llm, demo_torch, passages, pruned):
    assert len(pruned.experts) == 30
    for row, passage in enumerate(passages):
        z = torch_intermediates(demo_torch, demo_llm.tokenizer.encode(passage))
        for got, layer in zip(pruned.experts, z, strict=True):
            np.testing.assert_array_equal(got[row], oracle_topk(np.sqrt(oracle_squares(layer)), 768))


@pytest.mark.slow
def test_pruned_answers_are_the_masked_models(demo_llm, demo_torch, passages, pruned):
    for row, passage in enumerate(passages):
        masks = [mask[row] for mask in pruned.experts.masks()]
        assert pruned.tokens[row] == torch_greedy(demo_torch, demo_llm.tokenizer.encode(passage), NEW, masks)


@pytest.mark.slow
def test_order_of_methods(demo_llm):
    """Dense before the oracle before GRIFFIN, far before what does not look at the prompt; and of each token's squares
    that choose neurons the sum is one."""
    texts = [demo_llm.tokenizer.encode(passage) for passage in PASSAGES]
    items = [Item(str(number), tokens[:30], tokens[30:44]) for number, tokens in enumerate(texts)]
    batch = batch_of(items, 5, 0)
    prefilled = batch.prefill(demo_llm.model, 16)
    for squares in prefilled.statistics.squares:
        np.testing.assert_allclose(squares.sum(axis=1), batch.prompt_lengths, rtol=1e-5)
    variants = grid(["topk"], [0.5])
    found = score_answers(
        demo_llm.model, variants, prefilled, batch.answers, batch.answer_lengths, batch.seeds, upto=[14]
    )
    kl, loss = (
        {variant.method: sum(scores[variant.name][name][0] for scores in found) / (5 * 14) for variant in variants}
        for name in ("kl", "loss")
    )
    assert 0 == kl["dense"] < kl["oracle"] < kl["topk"] < 0.5 * min(kl["random"], kl["magnitude"])
    assert loss["dense"] < loss["oracle"] < loss["topk"] < min(loss["random"], loss["magnitude"]) - 1


@pytest.mark.slow
def test_rouge_is_that_of_what_transformers_generates(demo_gguf, demo_torch, tmp_path, capsys):
    """20 prompts: every passage behind every other one with its summary."""
    from rouge_score.rouge_scorer import RougeScorer

    pairs = [(example, article) for example in PASSAGES for article in PASSAGES if article is not example]
    prompts = [summarization_prompt(a, [(e, e.partition(". ")[0] + ".")], "xsum") for e, a in pairs]
    records = [{"prompt": p, "summary": a.partition(". ")[0]} for p, (_, a) in zip(prompts, pairs, strict=True)]
    file = tmp_path / "t.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    arguments = ["eval", "summarize", file, "--model", demo_gguf, "--new-tokens", 32, "--output", tmp_path / "out"]
    assert cli.main([*map(str, arguments), "--json"]) == 0
    (ours,) = (f for f in json.loads(capsys.readouterr().out.splitlines()[-1])["figures"] if f["method"] == "dense")
    tokenizer = gj.load(demo_gguf).tokenizer
    scorer = RougeScorer(list(report.ROUGE))
    scores = []
    for record in records:
        prompt = tokenizer.encode(record["prompt"])
        whole = demo_torch.generate(load_torch().tensor([prompt]), max_new_tokens=32, do_sample=False)[0]
        text = tokenizer.decode(whole[len(prompt) :].tolist()).partition("###")[0]
        scores.append(scorer.score(record["summary"], text))
    for key in report.ROUGE:
        expected = 100 * np.mean([score[key].fmeasure for score in scores])
        assert ours[key]["value"] == pytest.approx(expected, abs=1e-9)
