"""ParallelBench's generators, scores and limits: the spec's guarantees 1 to 6, its table A, and what is refused."""

import hashlib
import math
import random
import re
import string
from collections import Counter
from itertools import pairwise, permutations
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from draftsmith.data.parallelbench import forms, scoring, statistics, theory
from draftsmith.data.parallelbench.ideal import OPEN, Chooser, IdealLaw, simulate, threshold, top_k
from draftsmith.data.parallelbench.lists import Copy, RemoveRandom, ReplaceRandom, Shuffle
from draftsmith.data.parallelbench.numbers import Domino
from draftsmith.data.parallelbench.puzzles import latin_squares, sudoku_grids
from draftsmith.data.parallelbench.registry import TASKS, get
from draftsmith.data.parallelbench.tasks import Task, example, listed, standard_set, task_seed
from draftsmith.data.parallelbench.token_form import TokenForm
from draftsmith.data.parallelbench.words import FIELDS, LIGHT_VERBS, NAMES, PLACES
from draftsmith.inference.errors import InvalidValue, MissingExtra

SHUFFLE_ALL = Shuffle(exclude_identity=False)
NAMED = sorted(TASKS)
TABLE = {  # spec, guarantee 3: n -> shuffle, identity excluded, replace, insert, remove
    3: (2.1699, 2.2439, 1.1699, 2.6226, 0.2516),
    4: (3.4150, 3.4596, 1.2451, 3.3858, 0.6226),
    5: (4.7027, 4.7138, 1.2877, 4.1366, 1.0638),
    6: (6.0179, 6.0199, 1.3152, 4.8800, 1.5517),
}
COLUMNS: tuple[tuple[Task, str], ...] = (
    (SHUFFLE_ALL, "shuffle_all"),
    (TASKS["shuffle"], "shuffle"),
    (TASKS["replace_random"], "replace_random"),
    (TASKS["insert_random"], "insert_random"),
    (TASKS["remove_random"], "remove_random"),
)


def small(task: Task) -> int:
    """An n for which every task's right answers are few."""
    return task.lengths[0]


# --- samples ---


@pytest.mark.parametrize("name", NAMED)
def test_samples_are_pure_functions_of_seed_and_n(name: str) -> None:
    task = TASKS[name]
    first = standard_set(task, 12)
    assert first == standard_set(task, 12)
    assert len({(s.items, s.word, s.index) for s in first}) > 6  # and they differ from one another
    random.seed(3)  # the global generator has no part in it
    assert task.sample(7, small(task)) == task.sample(7, small(task))
    assert example(task, small(task)) not in first


@pytest.mark.parametrize("name", NAMED)
def test_references_are_right_and_lie_in_the_alphabet(name: str) -> None:
    task = TASKS[name]
    alphabet = set(task.alphabet())
    for sample in standard_set(task, 12):
        assert task.valid(sample, sample.reference)
        assert {*sample.items, *sample.reference, *([sample.word] if sample.word else [])} <= alphabet
        assert not task.valid(sample, (*sample.reference, sample.reference[0]))  # one token too many
        assert not task.valid(sample, sample.reference[:-1])


@pytest.mark.parametrize("name", NAMED)
def test_the_listing_is_the_valid_set(name: str) -> None:
    """Every listed answer is valid, none twice, as many as counted; random changes of one are valid iff listed."""
    task, rng = TASKS[name], random.Random(0)
    sample = task.sample(5, small(task))
    answers = listed(task, sample)
    assert len(set(answers)) == len(answers) == task.num_outcomes(sample)
    assert all(task.valid(sample, answer) for answer in answers[:200])
    pool = sorted({token for answer in answers for token in answer} | set(task.alphabet()[:3]))
    for _ in range(300):
        changed = list(rng.choice(answers))
        for _ in range(rng.choice((1, 2))):
            changed[rng.randrange(len(changed))] = rng.choice(pool)
        assert task.valid(sample, changed) == (tuple(changed) in set(answers))


@pytest.mark.parametrize("name", NAMED)
def test_marginals_are_those_of_the_listing(name: str) -> None:
    """Also the closed forms (shuffle, domino), for states along a right answer, and for the empty one."""
    task, rng = TASKS[name], random.Random(1)
    sample = task.sample(11, small(task))
    for count in range(len(sample.reference)):
        places = rng.sample(range(len(sample.reference)), count)
        answer = rng.choice(listed(task, sample))
        known = {i: answer[i] for i in places}
        laws = task.marginals(sample, known)
        assert set(laws) == set(range(len(answer))) - set(places)
        kept = [a for a in listed(task, sample) if all(a[i] == known[i] for i in known)]
        for i, law in laws.items():
            seen = Counter(a[i] for a in kept)
            assert {t: p for t, p in law.items() if p > 0} == pytest.approx({t: c / len(kept) for t, c in seen.items()})


def test_marginals_of_an_impossible_state_are_a_law_still() -> None:
    for task in (TASKS["shuffle"], TASKS["replace_random"], TASKS["domino"], TASKS["latin_square_n4"], Copy()):
        sample = task.sample(2, 4)
        wrong = {0: sample.reference[1], 1: sample.reference[1]}
        for law in task.marginals(sample, wrong).values():
            assert sum(law.values()) == pytest.approx(1.0)


def test_the_standard_set_has_equal_shares_and_the_reference_seed() -> None:
    assert Counter(len(s.items) for s in standard_set(Copy())) == {3: 25, 4: 25, 5: 25, 6: 25}
    assert task_seed("copy") == (int(hashlib.sha256(b"copy").hexdigest(), 16) + 42) % 65535
    long = standard_set(TASKS["shuffle"], 8, (21, 24))
    assert [len(s.items) for s in long] == [21] * 4 + [24] * 4


def test_latin_squares_and_sudoku_are_those_known() -> None:
    assert [len(latin_squares(n)) for n in (1, 2, 3, 4)] == [1, 2, 12, 576]
    assert len(sudoku_grids()) == 288
    task = TASKS["sudoku_n4_12"]
    for sample in standard_set(task, 30):
        clues = {i: int(c) - 1 for i, c in enumerate(sample.items) if c != "_"}
        assert len(clues) == 4
        assert sum(all(grid[i] == c for i, c in clues.items()) for grid in sudoku_grids()) == 1


def test_our_words_are_distinct() -> None:
    assert len(set(NAMES)) == len(NAMES) == 144
    assert not any(a != b and a in b for a in NAMES for b in NAMES)
    words = [w for f in FIELDS for w in (*f.nouns, *f.verbs, *f.adjectives)] + [*PLACES, *LIGHT_VERBS, "the"]
    assert len(set(words)) == len(words)


# --- guarantees 1 to 4 ---


@pytest.mark.parametrize("n", sorted(TABLE))
def test_table_of_total_correlation(n: int) -> None:
    """Acceptance A: enumeration and closed form both reproduce the spec's table."""
    for (task, name), wanted in zip(COLUMNS, TABLE[n], strict=True):
        assert theory.total_correlation(task, task.sample(n, n)) == pytest.approx(wanted, abs=1e-4)
        assert theory.closed_form(name, n) == pytest.approx(wanted, abs=1e-4)


def test_closed_forms_equal_the_listing_for_every_task() -> None:
    for name, task in TASKS.items():
        if name in theory.CLOSED_FORMS:
            n = small(task)
            found = theory.total_correlation(task, task.sample(3, n))
            assert theory.closed_form(name, n) == pytest.approx(found, abs=1e-9)
    assert theory.closed_form("replace_random", 10**6) == pytest.approx(math.log2(math.e), abs=1e-5)
    levels = [TASKS[f"words_to_sentence_{level}"] for level in ("easy", "medium", "hard")]
    correlations = [theory.total_correlation(task, task.sample(1, 4)) for task in levels]
    assert correlations == sorted(correlations)
    assert correlations == pytest.approx([theory.closed_form("shuffle_all", k) for k in (2, 3, 4)])


@pytest.mark.parametrize("name", ["shuffle", "replace_random", "insert_random", "remove_random", "domino"])
def test_the_bound_is_the_ideal_models_divergence(name: str) -> None:
    """Guarantee 1: KL(data || T-step ideal model) = L_T for every partition; L_1 = C; one at a time gives 0."""
    task = TASKS[name]
    sample = task.sample(1, 3)
    n, right = len(sample.reference), listed(task, sample)
    for passes in range(1, n + 1):
        for partition in theory.partitions(n, passes):
            law = theory.parallel_law(task, sample, partition)
            divergence = sum(-math.log2(len(right) * law[answer]) for answer in right) / len(right)
            assert theory.partition_loss(task, sample, partition) == pytest.approx(divergence, abs=1e-9)
            assert sum(law.values()) <= 1 + 1e-9
    assert theory.best_loss(task, sample, 1) == pytest.approx(theory.total_correlation(task, sample))
    assert theory.best_loss(task, sample, n) == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize("name", ["shuffle", "replace_random", "insert_random", "remove_random"])
@pytest.mark.parametrize("n", [3, 4])
def test_the_best_bound_falls_with_more_passes(name: str, n: int) -> None:
    """Guarantee 2, over all partitions; and splitting any one set of a partition never raises the loss."""
    task = TASKS[name]
    sample = task.sample(1, n)
    length = len(sample.reference)
    best = [theory.best_loss(task, sample, passes) for passes in range(1, min(length, 4) + 1)]
    assert all(a >= b - 1e-9 for a, b in pairwise(best))
    for partition in theory.partitions(length, 2):
        whole = theory.partition_loss(task, sample, partition)
        for t, together in enumerate(partition):
            for cut in range(1, len(together)):
                split = [*partition[:t], together[:cut], together[cut:], *partition[t + 1 :]]
                assert theory.partition_loss(task, sample, split) <= whole + 1e-9


def test_shuffle_loss_depends_on_sizes_alone() -> None:
    sample = SHUFFLE_ALL.sample(1, 4)
    for partition in theory.partitions(4, 2):
        sizes = [len(part) for part in partition]
        assert theory.partition_loss(SHUFFLE_ALL, sample, partition) == pytest.approx(
            theory.shuffle_partition_loss(sizes), abs=1e-9
        )
    double_even, double_odd = 6 * 4 * 2, 5 * 3
    assert theory.shuffle_partition_loss([2, 2, 2]) == pytest.approx(math.log2(double_even / double_odd))


def test_one_pass_accuracy_is_two_to_the_minus_correlation_where_the_product_is_constant() -> None:
    """Guarantee 4, both sides: shuffle and replace_random meet it, insert_random and remove_random exceed it."""
    for task, name in COLUMNS:
        if name == "shuffle":
            continue  # the identity is excluded: not constant
        sample = task.sample(1, 4)
        length = len(sample.reference)
        accuracy = sum(theory.parallel_law(task, sample, [list(range(length))]).values())
        bound = 2 ** -theory.total_correlation(task, sample)
        if name in ("shuffle_all", "replace_random"):
            assert accuracy == pytest.approx(bound, rel=1e-9)
        else:
            assert accuracy > bound * 1.01


def test_accuracies_of_an_ideal_model() -> None:
    assert [theory.shuffle_accuracy(6, k) for k in (1, 2, 3, 6)] == pytest.approx([1, 15 / 48, 0.12346, 0.015432], 1e-4)
    assert theory.replace_accuracy(6) == pytest.approx(0.40188, abs=1e-5)
    sample = SHUFFLE_ALL.sample(1, 4)
    pairs = [[0, 1], [2, 3]]
    assert sum(theory.parallel_law(SHUFFLE_ALL, sample, pairs).values()) == pytest.approx(theory.shuffle_accuracy(4, 2))


# --- scores (guarantee 6) ---


@pytest.mark.parametrize("name", NAMED)
def test_the_reference_answer_scores_one(name: str) -> None:
    task = TASKS[name]
    for sample in standard_set(task, 8):
        text = scoring.reference_text(task, sample)
        assert scoring.score(task, sample, text) == scoring.Score(True, True, False)
        chatty = scoring.score(task, sample, f"Here it is:\n{text}\n")
        if task.kind in ("list", "puzzle"):
            assert chatty.lenient
        assert scoring.score_tokens(task, sample, sample.reference).strict
        for nothing in (None, ""):
            assert scoring.score(task, sample, nothing) == scoring.Score(False, False, True)
        assert "{" not in forms.prompt_text(task, sample)
        assert forms.prompt_text(task, sample).count("Answer:") == (1 if task.kind == "text" else 2)


def test_every_permutation_but_the_identity_scores_one_on_shuffle() -> None:
    task = TASKS["shuffle"]
    sample = task.sample(4, 4)
    for order in permutations(sample.items):
        found = scoring.score(task, sample, forms.list_text(order))
        assert found.lenient == found.strict == (order != sample.items)


def test_hand_worked_scores() -> None:
    remove, replace = RemoveRandom(("a", "b", "c", "d", "e")), ReplaceRandom(("a", "b", "c", "d", "e"))
    sample = remove.sample(1, 4)
    p, q, r, s = sample.items
    assert scoring.score(remove, sample, forms.list_text([p, q, s])).strict
    assert not scoring.score(remove, sample, forms.list_text([q, p, s])).lenient  # order kept
    assert not scoring.score(remove, sample, forms.list_text([p, q, r, s])).lenient
    assert scoring.score(remove, sample, f"I remove {s}: [{p},{q},  '{r}']") == scoring.Score(True, False, False)
    sample = replace.sample(1, 3)
    twice = [sample.word or "", *sample.items[1:-1], sample.word or ""]
    assert not scoring.score(replace, sample, forms.list_text(twice)).lenient
    latin = TASKS["latin_square_n4"]
    square = latin.sample(1, 4)
    lines = scoring.reference_text(latin, square).split("\n")
    assert scoring.score(latin, square, "Sure:\n" + "\n".join(lines) + "\nDone.").lenient
    assert not scoring.score(latin, square, "\n".join([lines[0]] * 4)).lenient  # columns
    words = TASKS["words_to_sentence_easy"]
    sentence = words.sample(1, 4)
    text = scoring.reference_text(words, sentence)
    assert not scoring.score(words, sentence, text.replace(sentence.items[0], sentence.items[0] + "s")).lenient
    assert scoring.score(words, sentence, text.lower().rstrip(".")) == scoring.Score(True, False, False)
    assert not scoring.score(words, sentence, " ".join(sentence.items)).lenient  # all words, no grammar
    chain = Domino().sample(1, 3)
    numbers = ", ".join(chain.reference)
    assert scoring.score(Domino(), chain, numbers) == scoring.Score(True, False, False)


WORD = st.text(string.ascii_letters + " .-", min_size=1, max_size=8).map(str.strip).filter(bool)


@given(st.lists(WORD, max_size=6), st.text(string.ascii_letters + "\n:,", max_size=20))
def test_a_written_list_is_read_back(items: list[str], before: str) -> None:
    text = forms.list_text(items)
    assert scoring.parse_list(text, strict=True) == tuple(items)
    assert scoring.parse_list(before + text + " and so on") == tuple(items)


@given(st.text(max_size=60))
def test_parsers_take_any_text(text: str) -> None:
    """No exception, and strict accepts nothing that lenient refuses."""
    for task in TASKS.values():
        sample = task.sample(1, small(task))
        found = scoring.score(task, sample, text)
        assert found.lenient or not found.strict


def test_a_set_is_counted() -> None:
    task = TASKS["shuffle"]
    samples = standard_set(task, 4)
    texts = [scoring.reference_text(task, samples[0]), forms.list_text(samples[1].items), None, "nothing here"]
    assert scoring.score_set([task] * 4, samples, texts) == scoring.SetScore(4, 1, 1, 2)


# --- statistics ---


def test_intervals_and_slopes() -> None:
    low, high = statistics.binomial_interval(95, 100)
    z, p, n = 1.959964, 0.95, 100
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    assert (low, high) == pytest.approx(
        ((centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)), abs=1e-6
    )
    assert statistics.parallelizability({1: 1.0, 2: 1.0, 4: 0.0}) == pytest.approx(1.5)
    assert statistics.parallelizability({1: 0.0, 2: 0.0}) is None
    assert statistics.order_preference({1: 1.0, 2: 0.8, 3: 0.6}) == pytest.approx(0.2)


def test_the_oracle_takes_each_samples_fewest_passes_at_its_best_score() -> None:
    score, passes = statistics.oracle([[1, 0, 0], [1, 1, 0]], [[2, 2, 2], [4, 4, 4]])
    assert score == pytest.approx(2 / 3)
    assert passes == pytest.approx((2 + 4 + 2) / 3)


def test_order_correlation() -> None:
    assert statistics.order_correlation([0, 1, 2, 3]) == pytest.approx({"kendall": 1.0, "spearman": 1.0})
    assert statistics.order_correlation([3, 2, 1, 0]) == pytest.approx({"kendall": -1.0, "spearman": -1.0})
    assert statistics.order_correlation([2, 2, 2]) is None
    tied = statistics.order_correlation([0, 0, 1, 1])  # tau-b by hand: 4 / sqrt(6 * 4)
    assert tied is not None
    assert tied["kendall"] == pytest.approx(4 / math.sqrt(24))


# --- bad input ---


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match=r"shuffle needs n >= 2, got 1"):
        TASKS["shuffle"].sample(0, 1)
    with pytest.raises(ValueError, match=r"remove_random needs n >= 1, got 0"):
        TASKS["remove_random"].sample(0, 0)
    with pytest.raises(ValueError, match=r"copy: the word list has 3 words"):
        Copy(("a", "b", "c")).sample(0, 3)
    with pytest.raises(ValueError, match=r"shuffle: the word list has duplicates \(a\)"):
        Shuffle(("a", "b", "a", "c")).sample(0, 2)
    with pytest.raises(KeyError, match=r"unknown task 'shufle': choose one of copy, sort"):
        get("shufle")
    with pytest.raises(KeyError, match="unknown metric"):
        scoring.grammar_backend("bleurt")
    with pytest.raises(ImportError, match=re.escape("pip install language-tool-python")):
        scoring.grammar_backend("languagetool")
    task = TASKS["copy"]
    with pytest.raises(ValueError, match=r"1 predictions for 2 samples"):
        scoring.score_set([task] * 2, standard_set(task, 2), ["x"])
    for name in ("sort", "remove_random"):
        with pytest.raises(ValueError, match=f"{name} has no infilling form"):
            forms.infill_text(TASKS[name], TASKS[name].sample(1, 3))
    assert forms.infill_text(task, task.sample(1, 2)) == '["[MASK]", "[MASK]"]'
    with pytest.raises(ValueError, match=r"at most 1000000 are listed: use the closed form"):
        theory.total_correlation(TASKS["shuffle"], TASKS["shuffle"].sample(1, 10))
    with pytest.raises(KeyError, match="no closed form for 'latin_square_n4'"):
        theory.closed_form("latin_square_n4", 4)
    with pytest.raises(InvalidValue, match="each of the 3 positions once"):
        theory.partition_loss(task, task.sample(1, 3), [[0], [1]])
    with pytest.raises(InvalidValue, match="0 <= successes <= trials"):
        statistics.binomial_interval(3, 2)
    assert issubclass(MissingExtra, ImportError)


# --- the ideal model, and the token form ---


@pytest.mark.parametrize(
    ("task", "rule", "greedy", "wanted", "tolerance", "passes"),
    [
        (SHUFFLE_ALL, top_k(2, "random"), False, 15 / 48, 0.04, 3),
        (SHUFFLE_ALL, top_k(3, "left"), False, theory.shuffle_accuracy(6, 3), 0.03, 2),
        (SHUFFLE_ALL, top_k(2), True, 15 / 48, 0.04, 3),
        (SHUFFLE_ALL, threshold(0.6), True, 1.0, 0.0, 6),
        (ReplaceRandom(), top_k(6), False, theory.replace_accuracy(6), 0.03, 1),
        (ReplaceRandom(), top_k(2), True, 0.5, 0.03, 3),
        (ReplaceRandom(), threshold(0.80), True, 0.0, 0.0, 1),
        (ReplaceRandom(), threshold(0.85), True, 1.0, 0.0, 6),
        (TASKS["latin_square_n4"], top_k(1), False, 1.0, 0.0, 16),
        (TASKS["sudoku_n4_12"], top_k(16), False, 1.0, 0.0, 1),
    ],
)
def test_an_ideal_model_scores_as_computed(
    task: Task, rule: Chooser, greedy: bool, wanted: float, tolerance: float, passes: int
) -> None:
    """Guarantee 5 (acceptance B, fewer rows): no single threshold is good for both shuffle and replace_random."""
    n = 4 if task.kind == "puzzle" else 6
    found = simulate(IdealLaw(task, task.sample(0, n)), rule, 1500, greedy=greedy)
    assert abs(found.accuracy - wanted) <= tolerance
    assert set(found.passes.tolist()) == {passes}
    assert found.order.min() == 0


def test_ideal_marginals_of_many_rows_are_the_tasks() -> None:
    """Also of a task that is too large to list (shuffle of 15), one step behind a few commits."""
    for name, n in (("insert_random", 4), ("shuffle", 15)):
        task = TASKS[name]
        sample = task.sample(1, n)
        law = IdealLaw(task, sample)
        known = torch.full((2, len(sample.reference)), OPEN)
        known[1, 0] = law.index[sample.reference[0]]
        found = law(known)
        for row, state in enumerate(({}, {0: sample.reference[0]})):
            for i, marginal in task.marginals(sample, state).items():
                assert found[row, i].sum().item() == pytest.approx(1.0)
                for token, p in marginal.items():
                    assert found[row, i, law.index[token]].item() == pytest.approx(p)
        assert found[1, 0, known[1, 0]] == 1.0


def test_token_form_round_trip(tmp_path: Path) -> None:
    form = TokenForm(list(TASKS.values()))
    form.save_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(str(tmp_path))
    for name, task in TASKS.items():
        sample = task.sample(3, small(task))
        request = form.request(sample, 7)
        assert form.tokens(form.ids(sample.reference)) == sample.reference
        assert [request.tokens[i] for i in request.holes] == [form.mask_id] * len(sample.reference)
        assert request.tag == name
        text = " ".join(form.tokens(form.prompt(sample)))
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == form.prompt(sample)
    assert len(tokenizer) == form.mask_id == form.vocab_size - 1
    with pytest.raises(InvalidValue, match="no token 'Peter'"):
        form.ids(["Peter"])
    with pytest.raises(InvalidValue, match="none twice"):
        TokenForm([Copy(), Copy()])
