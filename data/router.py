"""Which draft serves a request: a key per request, a draft per key, a fall-back for unknown keys.

Source: "Online Speculative Decoding" (arXiv 2310.07177), customised drafts by language or topic. Their topic classifier
came ready-made; here a key is the request's tag, the answer of a user's function on the prompt text, or the nearest
centroid of mean prompt embeddings.
Shape letters: C classes, D width, V vocabulary.
"""

import importlib
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from draftsmith.inference.errors import InvalidType, InvalidValue, UnknownKey, unknown_choice
from draftsmith.inference.requests import TokenRequest

ROUTER_FILE = "router.json"
CENTROID_FILE = "router.safetensors"
KINDS = ("tag", "function", "centroid")
_FOLDER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")  # a key names its draft's folder in an export


class TextDecoder(Protocol):
    """What a router needs of a tokenizer."""

    def decode(self, token_ids: Sequence[int], /) -> str: ...


def tag_of(request: TokenRequest) -> str:
    """The key that the request already carries."""
    return request.tag


class TextFunction:
    """A user's function from prompt text to key, given as itself or as "package.module:function"."""

    def __init__(self, function: Callable[[str], str] | str, tokenizer: TextDecoder) -> None:
        self.name = function if isinstance(function, str) else ""
        self.function = _import(function) if isinstance(function, str) else function
        self.tokenizer = tokenizer

    def __call__(self, request: TokenRequest) -> str:
        return self.function(self.tokenizer.decode(list(request.prompt)))


class Centroids:
    """The class whose mean prompt embedding is nearest (Euclidean).

    Args: keys: C names. centroids: [C, D]. table: [V, D], the target's embedding rows.
    """

    def __init__(self, keys: Sequence[str], centroids: Tensor, table: Tensor) -> None:
        if centroids.shape != (len(keys), table.shape[1]):
            raise InvalidValue(
                f"{len(keys)} keys and embeddings of width {table.shape[1]} want centroids of shape "
                f"{[len(keys), table.shape[1]]}, got {list(centroids.shape)}: fit them on this target"
            )
        self.keys = list(keys)
        self.centroids = centroids.float().cpu()
        self.table = table.detach()

    @staticmethod
    def fit(prompts: Mapping[str, Sequence[Sequence[int]]], table: Tensor) -> "Centroids":
        """Centroids of labelled prompts (token ids by key). Raises InvalidValue for a key without prompts."""
        for key, examples in prompts.items():
            if not examples:
                raise InvalidValue(
                    f"no prompts for the class {key!r}: give at least one example, or leave the class out"
                )
        means = [torch.stack([embed(prompt, table) for prompt in examples]).mean(0) for examples in prompts.values()]
        return Centroids(list(prompts), torch.stack(means), table)

    def __call__(self, request: TokenRequest) -> str:
        distance = (self.centroids - embed(request.prompt, self.table)).square().sum(1)
        return self.keys[int(distance.argmin())]


def embed(prompt: Sequence[int], table: Tensor) -> Tensor:
    """Mean embedding of a prompt, float32 [D] on the CPU."""
    rows = table[torch.tensor(list(prompt), device=table.device)]
    return rows.float().mean(0).cpu()


class DraftRouter:
    """Maps a request to the number of its draft.

    Raises InvalidValue for no, repeated or unusable keys, UnknownKey for a fall-back outside `keys`.
    """

    def __init__(
        self, keys: Sequence[str], key_of: Callable[[TokenRequest], str] = tag_of, *, fallback: str | None = None
    ) -> None:
        if not keys or len(set(keys)) != len(keys):
            raise InvalidValue(f"a router needs different keys, one per draft; got {list(keys)}")
        for key in keys:
            if not _FOLDER_NAME.fullmatch(key):
                raise InvalidValue(f"draft key {key!r} cannot name a folder: use letters, digits, '.', '_' and '-'")
        self.keys = list(keys)
        self.key_of = key_of
        self.fallback = fallback
        self.unknown = 0  # requests that went to the fall-back
        if fallback is not None and fallback not in keys:
            raise self._unknown(fallback, "is named as the fall-back but")

    def __call__(self, request: TokenRequest) -> int:
        """The draft of this request. Raises UnknownKey for an unknown key when there is no fall-back."""
        key = self.key_of(request)
        if key in self.keys:
            return self.keys.index(key)
        if self.fallback is None:
            raise self._unknown(key, "came from the router but")
        self.unknown += 1
        return self.keys.index(self.fallback)

    def _unknown(self, key: object, how: str) -> UnknownKey:
        known = ", ".join(self.keys)
        return UnknownKey(f"key {key!r} {how} has no draft: known keys are {known}; add a draft or set a fallback")

    def state_dict(self) -> dict[str, Any]:
        """Everything that `write_router` writes: plain values, and the centroids as a tensor.

        Raises InvalidValue for a function that has no importable name.
        """
        state: dict[str, Any] = {"schema": 1, "keys": self.keys, "fallback": self.fallback}
        if isinstance(self.key_of, Centroids):
            state |= {"by": "centroid", "centroid_keys": self.key_of.keys, "centroids": self.key_of.centroids}
        elif isinstance(self.key_of, TextFunction):
            if not self.key_of.name:
                raise InvalidValue("a router function without a name cannot be exported: give it as 'module:function'")
            state["by"], state["function"] = "function", self.key_of.name
        elif self.key_of is tag_of:
            state["by"] = "tag"
        else:
            raise InvalidValue("only routers by tag, function or centroid can be exported; got a custom callable")
        return state

    def save(self, folder: Path) -> None:
        """Write router.json (and the centroids) into the folder that holds one draft folder per key."""
        write_router(self.state_dict(), folder)

    @staticmethod
    def load(folder: Path, *, tokenizer: TextDecoder | None = None, table: Tensor | None = None) -> "DraftRouter":
        """Read what `save` wrote; a function router wants the tokenizer, a centroid router the target's embeddings.

        Raises InvalidValue naming the file when it is missing or damaged.
        """
        path = folder / ROUTER_FILE
        try:
            state = json.loads(path.read_text(encoding="utf-8"))
            keys, fallback, by = state["keys"], state["fallback"], state["by"]
            if by == "centroid" and table is not None:
                stored = load_file(folder / CENTROID_FILE)["centroids"]
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            raise InvalidValue(f"cannot read the router {path}: {error}") from error
        if by not in KINDS:
            raise unknown_choice("router kind", by, KINDS)
        if by == "tag":
            return DraftRouter(keys, fallback=fallback)
        if by == "function":
            if tokenizer is None:
                raise InvalidValue(f"the router {path} reads prompt text: load it with the target's tokenizer")
            return DraftRouter(keys, TextFunction(state["function"], tokenizer), fallback=fallback)
        if table is None:
            raise InvalidValue(f"the router {path} compares embeddings: load it with the target's embedding rows")
        return DraftRouter(keys, Centroids(state["centroid_keys"], stored, table), fallback=fallback)


def write_router(state: Mapping[str, Any], folder: Path) -> None:
    """Write a router's `state_dict`: router.json, and the centroids beside it."""
    plain = dict(state)
    centroids = plain.pop("centroids", None)
    if centroids is not None:
        save_file({"centroids": centroids.contiguous()}, folder / CENTROID_FILE)
    unfinished = folder / (ROUTER_FILE + ".tmp")
    unfinished.write_text(json.dumps(plain, indent=2) + "\n", encoding="utf-8")
    os.replace(unfinished, folder / ROUTER_FILE)


def _import(name: str) -> Callable[[str], str]:
    """The function "package.module:function".

    Raises InvalidValue if it cannot be imported, InvalidType if it is no function.
    """
    module, _, attribute = name.partition(":")
    try:
        function = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise InvalidValue(f"cannot import the router function {name!r}: {error}; write 'module:function'") from error
    if not callable(function):
        raise InvalidType(f"router function {name!r} is a {type(function).__name__}, not a function of the prompt text")
    result: Callable[[str], str] = function
    return result
