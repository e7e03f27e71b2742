"""Tokenizers: what we use of one, and loading it from a folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

from trimtab.errors import ModelError

# What the files of a tokenizer begin with, one of which its words are in.
FILES = ("tokenizer.", "vocab", "tekken", "spiece", "sentencepiece", "merges", "tokenization_", "qwen.tiktoken")


class Tokenizer(Protocol):
    """The part of a transformers tokenizer that data uses."""

    name_or_path: str
    chat_template: str | None
    split_special_tokens: bool

    @property
    def eos_token(self) -> str | None: ...
    @property
    def eos_token_id(self) -> int | None: ...
    @property
    def bos_token(self) -> str | None: ...
    @property
    def unk_token_id(self) -> int | None: ...
    @property
    def all_special_ids(self) -> list[int]: ...
    @property
    def added_tokens_decoder(self) -> Mapping[int, Any]: ...

    def __len__(self) -> int: ...
    def encode(self, text: str, *, add_special_tokens: bool, split_special_tokens: bool = False) -> list[int]: ...
    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str: ...
    def convert_tokens_to_ids(self, tokens: str) -> int | None: ...
    def convert_ids_to_tokens(self, ids: int) -> str | None: ...
    def apply_chat_template(self, conversation: Sequence[Mapping[str, str]], **kwargs: Any) -> str: ...


def load_tokenizer(path: str | Path, config: Any = None) -> Tokenizer:
    """The tokenizer of a model folder (or hub id), with a pad token.

    A tokenizer without a pad token pads with its end-of-text token. That cannot be confused with a stop token here:
    which tokens are trained and scored comes from positions (`TokenRow.scored`), never from comparing with the pad id.

    Args:
        config: where it has them, read are
            split_special_tokens: `<|im_end|>` and its like are plain text where they stand *inside messages*. Off, as
            users know it, they become the control token there: data from strangers should switch it on;
            use_fast_tokenizer (true); trust_remote_code: allow Python code that comes with the model (false).

    Raises:
        ModelError: there is no usable tokenizer at `path`.
    """
    from transformers import AutoTokenizer

    folder = Path(path)
    if folder.is_dir() and not any(file.name.startswith(FILES) for file in folder.iterdir()):
        raise ModelError(  # transformers would make one without words
            f"no tokenizer in {path}",
            where=str(path),
            why=f"none of its files is one ({', '.join(FILES)} ...)",
            remedy="copy the tokenizer's files of the model there too",
        )
    try:
        loaded = AutoTokenizer.from_pretrained(
            str(path),
            use_fast=getattr(config, "use_fast_tokenizer", True),
            split_special_tokens=getattr(config, "split_special_tokens", False),
            trust_remote_code=getattr(config, "trust_remote_code", False),
        )
    except Exception as error:  # broken files fail anywhere in the library, as anything
        told = (str(error).strip() or type(error).__name__).split("\n")[0]
        raise ModelError(
            f"no tokenizer could be loaded from {path}",
            where=str(path),
            why=told if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: {told}",
            remedy="model_name_or_path must be a folder with tokenizer files (tokenizer.json, tokenizer_config.json)",
        ) from error
    if loaded.pad_token is None:
        loaded.pad_token = loaded.eos_token if loaded.eos_token is not None else loaded.convert_ids_to_tokens(0)
    return cast(Tokenizer, loaded)


def encode_plain(tokenizer: Tokenizer, text: str, *, split_special_tokens: bool = False) -> list[int]:
    """Token ids of a piece of text, nothing added before or after it."""
    return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=split_special_tokens) if text else []


def token_id(tokenizer: Tokenizer, token: str) -> int | None:
    """The id of a text that is one token of this tokenizer; None when it is not."""
    found = tokenizer.convert_tokens_to_ids(token)
    if found is None or tokenizer.convert_ids_to_tokens(found) != token:
        return None
    return found if encode_plain(tokenizer, token) == [found] else None
