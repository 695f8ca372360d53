"""N-gram drafts: table, search, updates, retrieval store, their files, and the decoders that use them."""

import itertools
import json
import random
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from draftsmith.inference import registry
from draftsmith.inference.decoders.aded import EmptyTableWarning
from draftsmith.inference.drafters.ngram import NgramDrafter
from draftsmith.inference.drafters.rest import RestDrafter, build_store
from draftsmith.inference.errors import InvalidType, InvalidValue
from draftsmith.inference.load_ngram import read_ngram, write_ngram
from draftsmith.inference.loader import load
from draftsmith.inference.ngram_search import best_first, merged, monte_carlo, single_path
from draftsmith.inference.ngram_table import AdaptiveTable, NgramTable, TableBuilder, build_table, empty_table
from draftsmith.inference.requests import TokenRequest
from draftsmith.inference.sampling import SamplingParams
from tests.fakes import MarkovEngine, markov, requests_for, string_law

V = 7


def documents(seed: int, count: int = 20, vocab: int = V) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(vocab) for _ in range(rng.randint(0, 30))] for _ in range(count)]


def reference(docs: list[list[int]], k: int) -> dict[tuple[int, int], list[tuple[int, float]]]:
    counts: dict[tuple[int, int], Counter[int]] = defaultdict(Counter)
    for d in docs:
        for a, b, u in zip(d, d[1:], d[2:], strict=False):
            counts[a, b][u] += 1
    return {
        key: [(u, n / c.total()) for u, n in sorted(c.items(), key=lambda e: (-e[1], e[0]))[:k]]
        for key, c in counts.items()
    }


def check_row(tokens: list[int], weights: list[float], k: int) -> None:
    """Guarantee 2."""
    assert len(tokens) == len(weights) == len(set(tokens)) <= k
    assert all(w >= 0 for w in weights) and sum(weights) <= 1 + 1e-6
    assert sorted(zip([-w for w in weights], tokens, strict=True)) == list(
        zip([-w for w in weights], tokens, strict=True)
    )


@pytest.mark.parametrize("k", [1, 3, 12])
def test_a_table_holds_the_counts_of_its_corpus(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("draftsmith.inference.ngram_table._CHUNK", 50)  # merged several times
    docs = documents(k)
    table = build_table(docs, V, k)
    want = reference(docs, k)
    assert len(table) == len(want)
    for a, b in itertools.product(range(V), repeat=2):
        tokens, weights = table.lookup(a, b)
        assert tokens == [u for u, _ in want.get((a, b), [])]
        assert weights == pytest.approx([w for _, w in want.get((a, b), [])], abs=1e-6)
        check_row(tokens, weights, k)
    assert table.description["skipped"] == sum(len(d) < 3 for d in docs)


def test_no_tri_gram_crosses_documents() -> None:
    table = build_table([[1, 2, 3], [4, 5, 6]], V)
    assert [tuple(key) for key in table.keys.tolist()] == [(1, 2), (4, 5)]


def test_bad_corpora_and_damaged_arrays_are_named() -> None:
    with pytest.raises(InvalidValue, match=r"document 1, position 2: id 9 is outside the vocabulary 0\.\.6"):
        build_table([[1, 2, 3], [1, 2, 9]], V)
    with pytest.raises(InvalidValue, match="no tri-gram \\(2 documents of fewer than 3 tokens"):
        build_table([[1], [1, 2]], V)
    for wrong in ({"k": 0}, {"vocab_size": 0}):
        with pytest.raises(InvalidValue, match="at least 1"):
            TableBuilder(**{"vocab_size": V, "k": 3, **wrong})
    good = build_table(documents(0), V, 3)
    fields = {name: getattr(good, name) for name in ("vocab_size", "k", "keys", "offsets", "tokens", "weights")}
    bent = good.offsets.copy()
    bent[3] = bent[5]
    for name, value, match in (
        ("offsets", bent, "row [234]: its offsets are damaged"),
        ("tokens", good.tokens + 5, "outside the vocabulary"),
        ("keys", good.keys[::-1].copy(), "row 1: keys must rise"),
        ("weights", good.weights * 2, "row 0: weights"),
        ("weights", good.weights[:-1], r"wants keys \[E, 2\]"),
    ):
        with pytest.raises(InvalidValue, match=match):
            NgramTable(**{**fields, name: value})


def test_updates_keep_the_rows_sound_and_converge() -> None:
    """Guarantees 2 and 3; |w - p| <= (1 - eta)^t for a stationary law."""
    rng = np.random.default_rng(0)
    table = AdaptiveTable(build_table(documents(1), V, 3), eta=0.3)
    before = table.base.lookup(1, 2)
    for _ in range(300):
        p = rng.dirichlet([0.5] * V)
        top = sorted(range(V), key=lambda t: -p[t])[:3]
        a, b = rng.integers(0, V, 2).tolist()
        table.update(a, b, top, [float(p[t]) for t in top])
        check_row(*table.lookup(a, b), 3)
    assert table.base.lookup(1, 2) == before, "the base is never written"
    p = [0.5, 0.3, 0.1]
    table.update(6, 6, [2, 4, 1], [0.9, 0.05, 0.05])
    for t in range(1, 40):
        table.update(6, 6, [0, 1, 2], p)
        found = dict(zip(*table.lookup(6, 6), strict=True))
        assert all(abs(found.get(u, 0.0) - w) <= 0.7**t + 1e-9 for u, w in enumerate(p))
    table.forget()
    assert table.lookup(1, 2) == before and table.learned == 0
    with pytest.raises(InvalidValue, match="eta lies above 0 and is at most 1, got 0"):
        AdaptiveTable(table.base, eta=0)
    with pytest.raises(InvalidValue, match="at least 1 key"):
        AdaptiveTable(table.base, capacity=0)


def test_the_overlay_forgets_what_was_updated_longest_ago() -> None:
    table = AdaptiveTable(empty_table(V), capacity=2)
    for a in (1, 2, 1, 3):
        table.update(a, 0, [5], [1.0])
    assert [table.lookup(a, 0)[0] for a in (1, 2, 3)] == [[5], [], [5]] and table.learned == 2
    whole = table.merged()
    assert whole.keys.tolist() == [[1, 0], [3, 0]] and whole.lookup(3, 0) == ([5], [1.0])


def test_bigrams_answer_for_keys_never_seen(tmp_path: Path) -> None:
    """By hand: 1 2 3, 4 2 5, 4 2 5: behind (7, 2) stands 5 twice in three, 3 once; (9, 9) was never seen at all."""
    docs = [[1, 2, 3], [4, 2, 5], [4, 2, 5]]
    table = build_table(docs, V, 3, bigrams=True)
    assert table.lookup(1, 2) == ([3], [1.0]) and table.lookup(4, 2) == ([5], [1.0])
    assert table.lookup(6, 2) == ([5, 3], pytest.approx([2 / 3, 1 / 3])) and table.lookup(6, 6) == ([], [])
    assert table.row(6, 2) == ([], []) and table.keys.tolist()[-1] == [V, 2]
    assert build_table(docs, V, 3).lookup(6, 2) == ([], []), "counted where they are asked for"
    adaptive = AdaptiveTable(table, eta=0.5, bigrams=True)
    adaptive.update(6, 2, [4, 5], [0.6, 0.4])  # a new key takes the law as it is; the bi-gram is blended
    assert adaptive.row(6, 2) == ([4, 5], [0.6, 0.4])
    assert dict(zip(*adaptive.lookup(0, 2), strict=True)) == pytest.approx({5: 1 / 3 + 0.2, 4: 0.3, 3: 1 / 6})
    adaptive.update(V, 6, [1], [1.0])  # the token before is not known
    assert adaptive.lookup(3, 6) == ([1], [1.0]) and adaptive.row(3, 6) == ([], [])
    write_ngram(adaptive.merged(), tmp_path / "t", tokenizer=None, command="test")
    again = load(tmp_path / "t").part.table
    assert again.lookup(3, 6) == ([1], [1.0]) and again.lookup(0, 2)[0] == [5, 4, 3]
    without = AdaptiveTable(table)
    without.update(6, 2, [4], [1.0])
    assert without.lookup(0, 2) == ([], []) and without.learned == 1, "neither used nor learned"


# Search --------------------------------------------------------------------------------------------------------------


def sound(tokens: list[int], parent: list[int], nodes: int, depth: int) -> list[tuple[int, ...]]:
    """Guarantee 4; the path of each node."""
    paths: list[tuple[int, ...]] = []
    for i, (token, above) in enumerate(zip(tokens, parent, strict=True)):
        assert -1 <= above < i
        paths.append((*(paths[above] if above >= 0 else ()), token))
    assert len(set(paths)) == len(paths) <= nodes and all(len(p) <= depth for p in paths)
    return paths


def product(table: NgramTable, a: int, b: int, path: tuple[int, ...]) -> float:
    p = 1.0
    for token in path:
        p *= dict(zip(*table.lookup(a, b), strict=True)).get(token, 0.0)
        a, b = b, token
    return p


@pytest.mark.parametrize("seed", range(8))
def test_heap_is_the_best_subtree_and_all_searches_are_sound(seed: int) -> None:
    """Guarantee 6 by enumeration: K <= 3, depth <= 3, at most 6 nodes."""
    rng = random.Random(seed)
    table = build_table(documents(seed, 30, 4), 4, 3)
    for _ in range(10):
        a, b = rng.randrange(4), rng.randrange(4)
        nodes, depth = rng.randint(1, 6), rng.randint(1, 3)
        paths = sound(*best_first(table.lookup, a, b, nodes, depth), nodes, depth)
        every = sorted(
            (product(table, a, b, p) for n in range(1, depth + 1) for p in itertools.product(range(4), repeat=n)),
            reverse=True,
        )
        # the best nodes by product are a subtree already, so no other subtree has a larger sum
        assert sum(product(table, a, b, p) for p in paths) == pytest.approx(sum(every[:nodes]))
        sound(*monte_carlo(table.lookup, a, b, nodes, depth, iterations=60), nodes, depth)
        chain = sound(*single_path(table.lookup, a, b, nodes, depth), nodes, depth)
        assert [len(p) for p in chain] == list(range(1, len(chain) + 1))


def test_monte_carlo_favours_likely_paths_and_visits_others() -> None:
    rows = {(0, 1): ([2, 3], [0.9, 0.1]), (1, 2): ([4], [1.0]), (1, 3): ([5], [1.0])}
    tokens, parent = monte_carlo(lambda a, b: rows.get((a, b), ([], [])), 0, 1, 8, 4, iterations=150)
    assert list(zip(tokens, parent, strict=True)) == [(2, -1), (4, 0), (3, -1), (5, 2)]


def test_merging_a_chain_shares_its_prefix_and_keeps_the_bound() -> None:
    tree = ([1, 2, 3], [-1, 0, -1])
    assert merged(tree, [1, 2, 9], 8) == ([1, 2, 3, 9], [-1, 0, -1, 1])
    assert merged(tree, [7, 8], 3) == ([1, 7, 8], [-1, -1, 1])
    assert merged(tree, [1, 2, 9], 3) == ([1, 2, 9], [-1, 0, 1])
    assert merged(tree, [], 3) == tree and merged(([], []), [4, 5], 1) == ([4], [-1])
    rng = random.Random(0)
    table = build_table(documents(2, 60, 4), 4, 3)
    for _ in range(200):
        nodes = rng.randint(1, 8)
        chain = [rng.randrange(4) for _ in range(rng.randint(0, 5))]
        shape = best_first(table.lookup, rng.randrange(4), rng.randrange(4), nodes, 4)
        paths = sound(*merged(shape, chain, nodes), nodes, 5)
        assert tuple(chain[:nodes]) in paths or not chain


# Retrieval -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_retrieval_equals_a_scan(seed: int) -> None:
    docs = documents(seed, 12, 3)
    store = build_store(docs, 3, span=6)
    drafter = RestDrafter(store, length=4)
    rng = random.Random(seed)
    for _ in range(40):
        text = [rng.randrange(3) for _ in range(8)]
        want: Counter[tuple[int, ...]] = Counter()
        for span in range(6, 1, -1):
            for d in docs:
                for i in range(len(d) - span + 1):
                    if d[i : i + span] == text[-span:]:
                        want[()] += 1
                        follow = d[i + span : i + span + 4]
                        want.update(tuple(follow[:n]) for n in range(1, len(follow) + 1))
            if want:
                break
        del want[()]
        kept = sorted(want, key=lambda p: (-want[p], len(p), p))[:5]
        paths = sound(*drafter.shape(text, 5, 4), 5, 4)
        assert paths == kept
    with pytest.raises(InvalidValue, match="document 0, position 1: id 3"):
        build_store([[0, 3]], 3)
    with pytest.raises(InvalidValue, match="holds no token"):
        build_store([[]], 3)
    with pytest.raises(InvalidValue, match=r"shortest must lie in 1\.\.6"):
        RestDrafter(store, shortest=7)


# Files ---------------------------------------------------------------------------------------------------------------


def test_files_come_back_bit_equal(tmp_path: Path) -> None:
    """Guarantee 5: round trip, and 10k lookups with misses against a dictionary."""
    docs = documents(3, 400, 40)
    table = build_table(docs, 40, 5)
    manifest = write_ngram(table, tmp_path / "table", tokenizer=None, command="test")
    assert manifest.kind == "ngram-table" and manifest.seal is not None
    part = load(tmp_path / "table")
    assert isinstance(part.part, NgramDrafter)
    again = part.part.table
    assert isinstance(again, NgramTable) and again.description["documents"] == table.description["documents"]
    for name in ("keys", "offsets", "tokens", "weights"):
        assert np.array_equal(getattr(again, name), getattr(table, name))
    want = reference(docs, 5)
    rng = random.Random(0)
    for _ in range(10_000):
        a, b = rng.randrange(40), rng.randrange(40)
        assert again.lookup(a, b)[0] == [u for u, _ in want.get((a, b), [])]
    store = build_store(docs, 40)
    write_ngram(store, tmp_path / "store", tokenizer=None, command="test")
    mapped = load(tmp_path / "store").part
    assert isinstance(mapped, RestDrafter) and isinstance(mapped.store.text, np.memmap)
    assert mapped.shape(docs[0][:5] or [1, 2], 9, 4) == RestDrafter(store).shape(docs[0][:5] or [1, 2], 9, 4)
    with pytest.raises(InvalidValue, match="not empty"):
        write_ngram(table, tmp_path / "table", tokenizer=None, command="test")


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    write_ngram(build_table(documents(4), V), tmp_path / "t", tokenizer=None, command="test")
    config = tmp_path / "t" / "config.json"
    whole = json.loads(config.read_text())
    for change, match in (
        ({"version": 9}, "version 9, this draftsmith reads version 1"),
        ({"net": "Other"}, "unknown net"),
        ({"vocab_size": 3}, "outside the vocabulary"),
    ):
        config.write_text(json.dumps(whole | change))
        with pytest.raises(InvalidValue, match=match):
            read_ngram(tmp_path / "t")
    with pytest.raises(InvalidValue, match="damaged or was changed"):
        load(tmp_path / "t")
    del whole["k"]
    config.write_text(json.dumps(whole))
    with pytest.raises(InvalidValue, match="'k' is missing"):
        read_ngram(tmp_path / "t")


# Decoders ------------------------------------------------------------------------------------------------------------


def samples(target: MarkovEngine, count: int) -> list[list[int]]:
    plain = registry.build("autoregressive", {"target": target}, sampling=SamplingParams(temperature=1.0))
    return plain.decode([TokenRequest([i % 6], 30, row_id=i) for i in range(count)]).output


@pytest.mark.parametrize(
    "settings", [{}, {"search": "mcts", "iterations": 20}, {"search": "path"}, {"lookup_length": 4}]
)
def test_greedy_output_is_the_targets_and_the_table_learns(settings: dict[str, Any]) -> None:
    target = markov(16, 2, seed=3, scale=3.0)
    plain = registry.build("autoregressive", {"target": target})
    requests = requests_for(((1,), (2, 3), (4, 5, 6)), 3, 40)
    want = plain.decode(requests).output
    decoder = registry.build("aded", {"target": target}, settings=settings)
    first, second = decoder.decode(requests), decoder.decode(requests)
    assert first.output == second.output == want
    assert len(second.rounds) < 0.6 * len(first.rounds), "what was said once is drafted the second time"
    noted = second.notes["aded"]
    assert noted["updates"] > 0 and noted["learned_keys"] > 0 and noted["table_keys"] == 0 and noted["k"] == 12
    with pytest.warns(EmptyTableWarning, match="nothing will be drafted"):
        frozen = registry.build("aded", {"target": target}, settings={**settings, "adapt": "never"})
    assert frozen.decode(requests).output == want and frozen.table.learned == 0
    fresh = registry.build("aded", {"target": target}, settings={**settings, "adapt": "call"})
    rounds = [len(fresh.decode(requests).rounds) for _ in range(2)]
    assert rounds[0] == rounds[1] == len(first.rounds)


@pytest.mark.parametrize("kind", ["table", "adapted", "store"])
def test_sampled_law_with_a_table_or_a_store(kind: str) -> None:
    """Guarantee 1."""
    target = markov(6, 2, seed=1)
    params = SamplingParams(temperature=0.8)
    docs = samples(target, 40)
    if kind == "adapted":
        decoder = registry.build(
            "aded", {"target": target, "draft": build_table(docs, 6)}, sampling=params, settings={"nodes": 8}, seed=4
        )
    else:
        draft = NgramDrafter(build_table(docs, 6)) if kind == "table" else RestDrafter(build_store(docs, 6))
        decoder = registry.build(
            "tree", {"target": target, "draft": draft}, sampling=params, settings={"nodes": 8}, seed=4
        )
    result = decoder.decode(requests_for(((1, 2), (2, 3)), 4000, 6))
    assert sum(result.rounds.accepted) > 2000
    for i, prompt in enumerate(((1, 2), (2, 3))):
        test = string_law(target, prompt, 3, params).test(result.output[i::2], 3)
        assert test.p_value > 1e-4, str(test)


def test_rejected_branches_teach_too() -> None:
    target = markov(16, 2, seed=3, scale=3.0)
    requests = requests_for(((1,), (2, 3), (4, 5, 6)), 3, 40)
    rounds, updates = {}, {}
    for learn in ("committed", "verified"):
        result = registry.build("aded", {"target": target}, settings={"learn": learn}).decode(requests)
        rounds[learn], updates[learn] = len(result.rounds), result.notes["aded"]["updates"]
    assert rounds["verified"] <= rounds["committed"] and updates["verified"] > 1.5 * updates["committed"]
    # the row that a key holds is the target's own law there, whether it was committed or not
    one = markov(8, 1, seed=1)
    decoder = registry.build("aded", {"target": one}, settings={"learn": "verified", "eta": 1.0, "top": 3})
    decoder.decode([TokenRequest([1, 2], 30)])
    for (_, last), (tokens, weights) in decoder.table._overlay.items():
        p = one.table[last].softmax(-1)
        assert weights == pytest.approx(p[tokens].tolist(), abs=1e-6)
        assert sorted(tokens) == sorted(p.topk(3).indices.tolist())


def test_prompts_teach_too() -> None:
    """A ragged batch: every prompt position but the last token's holds the target's own law; bi-grams beside them."""
    target, prompts = markov(8, 1, seed=1), ((3,), (1, 2, 6), (4, 5, 0, 7, 3, 1))
    rows = {}
    for learned, last in ((512, 5), (2, 2), (0, 0)):
        settings = {"eta": 1.0, "top": 3, "learn_prompt": learned, "unseen_pair": "none"}
        decoder = registry.build("aded", {"target": target}, settings=settings)
        decoder.decode(requests_for(prompts, 3, 1))  # one round, which teaches the roots
        rows[last] = decoder.table._overlay
        for (_, b), (tokens, weights) in decoder.table._overlay.items():
            assert weights == pytest.approx(target.table[b].softmax(-1)[tokens].tolist(), abs=1e-6)
    roots = {(2, 6), (3, 1)}
    assert set(rows[0]) == roots
    assert set(rows[2]) == roots | {(1, 2), (0, 7), (7, 3)}, "the last two tokens before a root"
    assert set(rows[5]) == roots | {(1, 2), (4, 5), (5, 0), (0, 7), (7, 3)}
    decoder = registry.build("aded", {"target": target})
    decoder.decode(requests_for(prompts, 3, 1))
    assert {b for a, b in decoder.table._overlay if a == 8} == {0, 1, 2, 3, 4, 5, 6, 7}


def test_exported_tables_serve_through_the_loader(tmp_path: Path) -> None:
    target = markov(12, 1, seed=2, scale=4.0)
    write_ngram(build_table(samples(target, 60), 12), tmp_path / "t", tokenizer=None, command="test")
    part = load(tmp_path / "t")
    want = registry.build("autoregressive", {"target": target}).decode([TokenRequest([1, 2], 30)]).output
    for name, settings in (("aded", {"adapt": "never"}), ("tree", {})):
        result = registry.build(name, {"target": target, "draft": part}, settings=settings).decode(
            [TokenRequest([1, 2], 30)]
        )
        assert result.output == want and len(result.rounds) < 20


def test_what_aded_refuses() -> None:
    target = markov(6, 1)
    with pytest.raises(InvalidType, match="got a RestDrafter: build one with 'draftsmith ngram'"):
        registry.build("aded", {"target": target, "draft": RestDrafter(build_store([[1, 2]], 6))})
    with pytest.raises(InvalidValue, match="takes no part in the role 'filter'"):
        registry.build("aded", {"target": target, "filter": target})
    for settings, match in (
        ({"search": "widest"}, "unknown search"),
        ({"adapt": "always"}, "unknown adapt"),
        ({"learn": "all"}, "unknown learn"),
        ({"nodes": 0}, "nodes must be at least 1"),
        ({"depth": 0}, "depth must be at least 1"),
        ({"top": 0}, "top must be at least 1"),
        ({"iterations": 0}, "iterations must be at least 1"),
        ({"unseen_pair": "unigram"}, "unknown unseen_pair"),
        ({"learn_prompt": -1}, "learn_prompt must be at least 0"),
        ({"eta": 0.0}, "eta lies above 0"),
        ({"capacity": 0}, "at least 1 key"),
        ({"explore_c2": 0.0}, "explore_c2 above 0"),
        ({"lookup_length": -1}, "lookup_length must be at least 0"),
    ):
        with pytest.raises(InvalidValue, match=match):
            registry.make_settings("aded", settings)


def test_a_prompt_of_one_token_is_padded_with_bos_or_drafts_nothing() -> None:
    table = build_table([[0, 3, 4, 5]], V)

    class Tokenizer:
        bos_token_id = 0

        def get_vocab(self) -> dict[str, int]:
            return {str(i): i for i in range(V)}

        def __len__(self) -> int:
            return V

        def decode(self, ids: list[int], **_: Any) -> str:
            return " ".join(map(str, ids))

    logits = torch.full((V, V), -3.0)
    logits[torch.arange(V), (torch.arange(V) + 1) % V] = 3.0
    target = MarkovEngine(logits)
    for tokenizer, rounds in ((Tokenizer(), 1), (None, 2)):
        decoder = registry.build(
            "aded",
            {"target": target, "draft": table},
            settings={"adapt": "never", "depth": 2},
            tokenizer=tokenizer,
        )
        result = decoder.decode([TokenRequest([3], 3)])
        assert result.output == [[4, 5, 6]] and len(result.rounds) == rounds
