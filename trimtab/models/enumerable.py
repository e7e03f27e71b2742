"""Two causal language models whose answers can all be written down: a table, and a transformer that knows a few tokens only.

On a problem small enough to enumerate, nothing stands between an algorithm and its optimum but the algorithm: `trimtab prove` measures how
far training ends from it. To the loops and engines they are models like others.

**The table** has no network. Its logits are one free row of numbers for every prefix of an answer, so it can be any distribution over
answers. The state of a position follows from the tokens that the mask lets it see (cached ones among them), in order: a digit chooses the
table, a letter goes one step down its tree, any other token goes back to the root. So the question chooses a table, and an answer starts at
the root behind the assistant's header.

**The transformer** is a tiny Qwen2 whose output head has a bias that rules out all but those tokens.

Shapes: b rows, n new tokens, m seen tokens, s states, a allowed tokens (letters and the end of turn).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

NEVER = -1e4
"""The logit of every token that is not allowed: its probability is 0 in float32."""


class PrefixTableConfig(PretrainedConfig):  # type: ignore[no-untyped-call]
    """Sizes and token ids.

    Attributes:
        letters: token ids that answers are made of.
        end: the token id that ends an answer.
        digits: token ids in a question that choose a table, one each.
        depth: letters of the longest answer.
    """

    model_type = "trimtab_prefix_table"

    def __init__(
        self,
        letters: tuple[int, ...] = (1, 2),
        end: int = 3,
        digits: tuple[int, ...] = (4,),
        depth: int = 2,
        vocab_size: int = 8,
        **more: Any,
    ) -> None:
        self.letters, self.end, self.digits, self.depth, self.vocab_size = (
            list(letters),
            end,
            list(digits),
            depth,
            vocab_size,
        )
        # what programs ask of any model's sizes: one number a letter or end, and one that is always 1
        self.hidden_size = len(self.letters) + 2
        self.num_hidden_layers = self.num_attention_heads = self.num_key_value_heads = self.head_dim = 1
        self.intermediate_size = self.hidden_size
        self.max_position_embeddings = 4096
        super().__init__(**{"tie_word_embeddings": False, **more})

    @property
    def nodes(self) -> int:
        """Prefixes of one table: 1 + m + m^2 + ... up to `depth` letters, the longest included."""
        return sum(len(self.letters) ** i for i in range(self.depth + 1))


class _FixedHead(nn.Module):
    """Logits of a hidden state `[..., a + 1]`: its own number for each allowed token, `NEVER` for all others. Not learnt."""

    def __init__(self, config: PrefixTableConfig) -> None:
        super().__init__()
        self.config = config
        self.made: Tensor | None = None

    @property
    def weight(self) -> Tensor:
        """`[vocab, a + 1]`."""
        if self.made is None:
            allowed = [*self.config.letters, self.config.end]
            made = torch.zeros(self.config.vocab_size, len(allowed) + 1)
            made[:, -1] = NEVER
            for place, token in enumerate(allowed):
                made[token] = 0.0
                made[token, place] = 1.0
            self.made = made
        return self.made

    def forward(self, hidden: Tensor) -> Tensor:
        return nn.functional.linear(hidden, self.weight)


class PrefixTableModel(PreTrainedModel):  # type: ignore[no-untyped-call]
    """From tokens to hidden states: the row of each position's prefix, and a 1."""

    config_class = PrefixTableConfig
    base_model_prefix = "model"
    _supports_sdpa = True

    def __init__(self, config: PrefixTableConfig) -> None:
        super().__init__(config)
        self.table = nn.Linear(len(config.digits) * config.nodes, len(config.letters) + 1, bias=False)
        self.post_init()  # type: ignore[no-untyped-call]

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        **_: Any,
    ) -> BaseModelOutputWithPast:
        seen = input_ids
        if past_key_values is not None:
            # the tokens themselves are what later positions look back at
            keys = input_ids[:, None, :, None].to(self.table.weight.dtype)
            seen = past_key_values.update(keys, keys, 0)[0][:, 0, :, 0].long()
        hidden = self.table(
            nn.functional.one_hot(self._states(input_ids, seen, attention_mask), self.table.in_features).to(
                self.table.weight.dtype
            )
        )
        hidden = torch.cat([hidden, torch.ones_like(hidden[..., :1])], dim=-1)
        return BaseModelOutputWithPast(last_hidden_state=hidden, past_key_values=past_key_values)

    def _states(self, new: Tensor, seen: Tensor, mask: Tensor | None) -> Tensor:
        """The state `[b n]` of each new position, from the tokens `[b m]` that it sees."""
        n, m = new.shape[1], seen.shape[1]
        if mask is None:
            visible = torch.ones(n, m, dtype=torch.bool, device=new.device).tril(m - n).expand(len(new), n, m)
        elif mask.ndim == 4:
            if mask.shape[-2:] != (n, m):
                raise ValueError("a prefix table takes who sees whom from its mask, and this one does not say")
            visible = (mask if mask.dtype == torch.bool else mask == 0)[:, 0].expand(len(new), n, m)
        else:  # [b m]: real tokens; causal among them
            causal = torch.ones(n, m, dtype=torch.bool, device=new.device).tril(m - n)
            visible = causal & mask.bool()[:, None]
        letter, digit = self._kinds(new.device)
        nodes, width = self.config.nodes, len(self.config.letters)
        table = torch.zeros_like(new)
        node = torch.zeros_like(new)
        for j in range(m):
            token = seen[:, j, None].expand_as(new)
            down = width * node + 1 + letter[token]
            # below the longest prefix there is nothing to predict: stay
            moved = torch.where(letter[token] >= 0, torch.where(down < nodes, down, node), 0)
            node = torch.where(visible[..., j], moved, node)
            table = torch.where(visible[..., j] & (digit[token] >= 0), digit[token], table)
        states: Tensor = table * nodes + node
        return states

    def _kinds(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """For every token id, which letter and which digit it is; -1 for none."""
        letter = torch.full((self.config.vocab_size,), -1)
        letter[self.config.letters] = torch.arange(len(self.config.letters))
        digit = torch.full((self.config.vocab_size,), -1)
        digit[self.config.digits] = torch.arange(len(self.config.digits))
        return letter.to(device), digit.to(device)


class PrefixTableForCausalLM(PreTrainedModel):  # type: ignore[no-untyped-call]
    """The table with its fixed output head."""

    config_class = PrefixTableConfig
    base_model_prefix = "model"
    _supports_sdpa = True

    def __init__(self, config: PrefixTableConfig) -> None:
        super().__init__(config)
        self.model = PrefixTableModel(config)
        self.lm_head = _FixedHead(config)
        self.post_init()  # type: ignore[no-untyped-call]

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight)

    def get_decoder(self) -> Any:
        return self.model

    def get_output_embeddings(self) -> Any:
        return self.lm_head

    def get_input_embeddings(self) -> Any:
        return self.model.table  # there is none: what a program that counts or moves embeddings may look at

    def forward(self, input_ids: Tensor, **keys: Any) -> CausalLMOutputWithPast:
        out = self.model(input_ids, **keys)
        return CausalLMOutputWithPast(logits=self.lm_head(out.last_hidden_state), past_key_values=out.past_key_values)


class FewTokensConfig(Qwen2Config):  # type: ignore[no-untyped-call]
    """That of Qwen2, for a head with a bias."""

    model_type = "trimtab_few_tokens"


class FewTokensForCausalLM(Qwen2ForCausalLM):  # type: ignore[no-untyped-call]
    """Qwen2 with a bias at its output head: `NEVER` for every token that is not allowed."""

    config_class = FewTokensConfig

    def __init__(self, config: FewTokensConfig) -> None:
        super().__init__(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=True)
        self.post_init()  # type: ignore[no-untyped-call]


def register() -> None:
    """Make transformers know folders of these models; once or often."""
    AutoConfig.register(PrefixTableConfig.model_type, PrefixTableConfig, exist_ok=True)
    AutoModelForCausalLM.register(PrefixTableConfig, PrefixTableForCausalLM, exist_ok=True)
    AutoConfig.register(FewTokensConfig.model_type, FewTokensConfig, exist_ok=True)
    AutoModelForCausalLM.register(FewTokensConfig, FewTokensForCausalLM, exist_ok=True)
