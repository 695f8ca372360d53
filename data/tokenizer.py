"""Byte-level BPE tokenizers: trained here, kept as ordinary Hugging Face directories, loaded from disk only.

Byte level means that every text, any script or emoji, has an encoding and comes back unchanged.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from draftsmith.data.chat import SIMPLE_TEMPLATE
from draftsmith.inference.errors import InvalidValue

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
CHAT_TOKENS = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")  # those of chat.SIMPLE_TEMPLATE
SPECIAL_TOKENS = (BOS, EOS, PAD, *CHAT_TOKENS)
MIN_VOCAB = 256 + len(SPECIAL_TOKENS)  # the bytes and the special tokens: no merges


def train_bpe(texts: Iterable[str], vocab_size: int, max_length: int = 1 << 20) -> "PreTrainedTokenizerFast":
    """Train a byte-level BPE with BOS, EOS, PAD, chat tokens and the simple chat template.

    Args: vocab_size: at least MIN_VOCAB; fewer entries come out when the texts have no pair left to merge.
        max_length: `model_max_length` of the tokenizer.
    The same texts in the same order give the same tokenizer. Special tokens have the ids 0, 1, 2, ...
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    if vocab_size < MIN_VOCAB:
        raise InvalidValue(f"vocab_size must be at least {MIN_VOCAB} (bytes and special tokens), got {vocab_size}")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        additional_special_tokens=list(CHAT_TOKENS),
        clean_up_tokenization_spaces=False,
        model_max_length=max_length,
    )
    tokenizer.chat_template = SIMPLE_TEMPLATE
    return tokenizer


def load_tokenizer(path: str | Path) -> "PreTrainedTokenizerFast":
    """The tokenizer of a local directory (a model's or an export's will do); the network is never asked.

    Raises InvalidValue for a path that is no directory, holds no fast tokenizer, or has no end-of-text token.
    """
    from transformers import AutoTokenizer

    if not Path(path).is_dir():
        raise InvalidValue(
            f"no tokenizer directory {str(path)!r}: give one with a tokenizer.json, or bpe:N to train one"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, TypeError, KeyError) as e:
        reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise InvalidValue(f"cannot load a tokenizer from {str(path)!r}: {reason}") from e
    if not getattr(tokenizer, "is_fast", False):
        raise InvalidValue(f"the tokenizer in {str(path)!r} is not a fast one: it needs a tokenizer.json")
    if tokenizer.eos_token_id is None:
        raise InvalidValue(
            f"the tokenizer in {str(path)!r} has no eos_token, and documents are separated by it: set one"
        )
    return tokenizer


def encode_texts(tokenizer: "PreTrainedTokenizerFast", texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text as plain text: no BOS or EOS; a special token spelt out in a text is not taken for one."""
    if not texts:
        return []
    encoded = tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True, verbose=False)
    return [list(ids) for ids in encoded["input_ids"]]


def decode(tokenizer: "PreTrainedTokenizerFast", ids: Sequence[int]) -> str:
    """The text of token ids, special tokens spelt out, nothing tidied."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))
