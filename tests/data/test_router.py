"""Routing requests to drafts: the default and custom keys, the fall-back, and no mixing of classes."""

from pathlib import Path

import pytest
import torch

from draftsmith.data.online_buffer import BufferSettings, OnlineBuffer
from draftsmith.data.router import Centroids, DraftRouter, TextFunction
from draftsmith.inference.errors import InvalidType, InvalidValue, UnknownKey
from draftsmith.inference.laws import Record, TeacherLaw
from draftsmith.inference.requests import TokenRequest


class Letters:
    """A tokenizer of the letters a, b, c, ..."""

    def decode(self, token_ids: list[int], /) -> str:
        return "".join(chr(97 + i) for i in token_ids)


def request(*prompt: int, tag: str = "") -> TokenRequest:
    return TokenRequest(prompt=prompt, tag=tag)


def first_letter(text: str) -> str:
    return text[0]


not_a_function = 3


def test_by_tag() -> None:
    router = DraftRouter(["code", "prose"])
    assert [router(request(1, tag=t)) for t in ("prose", "code", "prose")] == [1, 0, 1]


def test_by_a_function_of_the_text() -> None:
    router = DraftRouter(["a", "b"], TextFunction(first_letter, Letters()))
    assert [router(request(*p)) for p in ((0, 3), (1, 0), (1, 1))] == [0, 1, 1]


def test_unknown_key_without_fallback_names_it_and_the_known_ones() -> None:
    router = DraftRouter(["code", "prose"])
    with pytest.raises(KeyError) as error:
        router(request(1, tag="poems"))
    assert isinstance(error.value, UnknownKey)
    assert "'poems'" in str(error.value) and "code, prose" in str(error.value) and "\n" not in str(error.value)


def test_unknown_keys_go_to_the_fallback_and_are_counted() -> None:
    router = DraftRouter(["code", "prose"], fallback="prose")
    assert router(request(1, tag="poems")) == 1
    assert router(request(1, tag="code")) == 0
    assert router.unknown == 1


def test_nearest_centroid() -> None:
    table = torch.tensor([[0.0, 0.0], [1.0, 0.0], [10.0, 10.0], [9.0, 9.0]])
    centroids = Centroids.fit({"low": [[0, 1], [1, 1]], "high": [[2], [2, 3]]}, table)
    assert torch.allclose(centroids.centroids, torch.tensor([[0.75, 0.0], [9.75, 9.75]]))  # by hand
    router = DraftRouter(["high", "low"], centroids)
    assert [router(request(*p)) for p in ((0,), (3, 3), (1, 0, 0, 2))] == [1, 0, 1]


def test_centroids_separate_domains_of_different_tokens() -> None:
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(32, 64, generator=generator)

    def prompts(low: int, n: int) -> list[list[int]]:
        return torch.randint(low, low + 16, (n, 12), generator=generator).tolist()

    router = DraftRouter(["a", "b"], Centroids.fit({"a": prompts(0, 20), "b": prompts(16, 20)}, table))
    right = [router(request(*p)) == 0 for p in prompts(0, 50)] + [router(request(*p)) == 1 for p in prompts(16, 50)]
    assert sum(right) >= 95


@pytest.mark.parametrize("routed", [True, False])
def test_no_prompt_of_one_class_enters_another_classes_buffer(routed: bool) -> None:
    router = DraftRouter(["a", "b"], TextFunction(first_letter, Letters()))
    buffers = [OnlineBuffer(BufferSettings(), draft=d) for d in range(2)]
    for number in range(40):
        served = request(number * 7 % 3 % 2, number % 5)
        draft = router(served) if routed else number % 2  # the negative control ignores the router
        ids = torch.tensor([*served.prompt, 1])
        law = TeacherLaw.from_logits(torch.zeros(1, 5), 2)
        buffers[draft].add(Record(ids, torch.tensor([2]), law, request=number), now=number)
    firsts = [{int(r.ids[0]) for r in buffer.take()} for buffer in buffers]
    assert (firsts == [{0}, {1}]) == routed


@pytest.mark.parametrize("kind", ["tag", "function", "centroid"])
def test_saved_routers_route_alike(tmp_path: Path, kind: str) -> None:
    table = torch.arange(12.0).reshape(6, 2)
    key_of = {
        "tag": None,
        "function": TextFunction(f"{__name__}:first_letter", Letters()) if kind == "function" else None,
        "centroid": Centroids.fit({"a": [[0]], "b": [[5]]}, table),
    }[kind]
    router = DraftRouter(["a", "b"], fallback="b") if key_of is None else DraftRouter(["a", "b"], key_of, fallback="b")
    router.save(tmp_path)
    loaded = DraftRouter.load(tmp_path, tokenizer=Letters(), table=table)
    requests = [request(i, tag=t) for i in range(6) for t in ("a", "b", "c")]
    assert [loaded(r) for r in requests] == [router(r) for r in requests]
    assert (loaded.keys, loaded.fallback) == (["a", "b"], "b")


def test_loading_says_what_it_needs(tmp_path: Path) -> None:
    table = torch.arange(4.0).reshape(2, 2)
    DraftRouter(["a", "b"], Centroids.fit({"a": [[0]], "b": [[1]]}, table)).save(tmp_path)
    with pytest.raises(InvalidValue, match="embedding rows"):
        DraftRouter.load(tmp_path)
    with pytest.raises(InvalidValue, match="fit them on this target"):
        DraftRouter.load(tmp_path, table=torch.zeros(2, 3))
    DraftRouter(["a", "b"], TextFunction("os.path:basename", Letters())).save(tmp_path)
    with pytest.raises(InvalidValue, match="tokenizer"):
        DraftRouter.load(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"keys": ["a"]}', '{"keys": ["a"], "fallback": null, "by": "magic"}'])
def test_a_damaged_router_file_is_one_clear_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "router.json").write_text(text)
    with pytest.raises(InvalidValue) as error:
        DraftRouter.load(tmp_path)
    assert "\n" not in str(error.value)


def test_a_missing_router_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidValue, match=r"router\.json"):
        DraftRouter.load(tmp_path)


def test_functions_without_a_name_are_not_exported(tmp_path: Path) -> None:
    with pytest.raises(InvalidValue, match="module:function"):
        DraftRouter(["a"], TextFunction(first_letter, Letters())).save(tmp_path)
    with pytest.raises(InvalidValue, match="custom callable"):
        DraftRouter(["a"], lambda r: "a").save(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("keys", [[], ["a", "a"], ["../up"], ["a/b"], [".hidden"], [""]])
def test_unusable_keys(keys: list[str]) -> None:
    with pytest.raises(InvalidValue, match="key"):
        DraftRouter(keys)


def test_a_fallback_must_be_a_draft() -> None:
    with pytest.raises(UnknownKey, match="'c' is named as the fall-back"):
        DraftRouter(["a", "b"], fallback="c")


def test_functions_that_cannot_be_imported() -> None:
    with pytest.raises(InvalidValue, match="cannot import"):
        TextFunction("no_such_module:f", Letters())
    with pytest.raises(InvalidValue, match="cannot import"):
        TextFunction("os:no_such_name", Letters())
    with pytest.raises(InvalidType, match="not a function"):
        TextFunction("math:pi", Letters())
    with pytest.raises(InvalidValue, match="cannot import"):
        TextFunction("", Letters())


def test_a_class_needs_examples() -> None:
    with pytest.raises(InvalidValue, match="'b'"):
        Centroids.fit({"a": [[0]], "b": []}, torch.zeros(1, 2))
