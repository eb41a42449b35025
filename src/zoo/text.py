"""A transformer text encoder: token ids and their mask to one embedding per text.

The layers are written out instead of taken from `torch.nn.TransformerEncoder`, whose fast path and nested
tensors choose another computation while a trace is recorded. Every size is read from the input that is
served: no length is frozen. `pooling` decides by the data, so it has to be scripted inside a trace (`trace:
{script: [pooling]}`).

Source: A. Vaswani et al., "Attention Is All You Need", NeurIPS 2017, section 3; J. Devlin et al., "BERT",
NAACL 2019, section 3 and appendix A.2, for learned positions, GELU and the vocabulary; N. Reimers, I.
Gurevych, "Sentence-BERT", EMNLP 2019, section 3, for the masked mean. Layers normalise their input (R. Xiong
et al., "On Layer Normalization in the Transformer Architecture", ICML 2020), which needs no warm-up to train.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own name for it)
from torch import Tensor, nn


def build(
    layers: int = 2, hidden: int = 128, heads: int = 4, vocabulary: int = 30522, longest: int = 512
) -> TextEncoder:
    """Return a text encoder.

    Args:
        layers: Transformer layers.
        hidden: Dimensions of a token and of the embedding; a multiple of `heads`.
        heads: Attention heads of a layer.
        vocabulary: Token ids are 0 to vocabulary - 1.
        longest: Tokens of a text at most.
    """
    if hidden % heads:
        raise ValueError(f"hidden {hidden} must be a multiple of heads {heads}")
    return TextEncoder(layers, hidden, heads, vocabulary, longest)


class TextEncoder(nn.Module):
    """Text embedding.

    Args (forward):
        input_ids: int64 [batch, tokens], token ids; tokens from 1 to `longest`.
        attention_mask: int64 [batch, tokens], 1 for a token, 0 for padding; a row may be all 0.

    Returns (forward):
        float32 [batch, hidden], rows of length 1. A row does not depend on the other rows, nor on its
        padding.
    """

    def __init__(self, layers: int, hidden: int, heads: int, vocabulary: int, longest: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, hidden)
        self.positions = nn.Embedding(longest, hidden)
        self.layers = nn.ModuleList(Layer(hidden, heads) for _ in range(layers))
        self.normalisation = nn.LayerNorm(hidden)
        self.pooling = Pooling()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        # A slice of the table, not torch.arange: a trace would write the device of the example into the
        # program.
        features = self.tokens(input_ids) + self.positions.weight[: input_ids.shape[1]]
        # The lowest finite number, not minus infinity: a row without any token then attends to all of its
        # places alike, where minus infinity gives 0 / 0.
        absent = (attention_mask == 0).to(features.dtype) * torch.finfo(features.dtype).min
        bias = absent[:, None, None, :]
        for layer in self.layers:
            features = layer(features, bias)
        return F.normalize(self.pooling(self.normalisation(features), attention_mask), dim=1)


class Layer(nn.Module):
    """One transformer layer: attention, then a feed-forward network, each added to what came in.

    Args (forward):
        features: float32 [batch, tokens, hidden].
        bias: float32 [batch, 1, 1, tokens], added to every query's scores: 0 for a token, very low for
            padding.

    Returns (forward):
        float32 [batch, tokens, hidden].
    """

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_normalisation = nn.LayerNorm(hidden)
        self.queries_keys_values = nn.Linear(hidden, 3 * hidden)
        self.attention_output = nn.Linear(hidden, hidden)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(hidden), nn.Linear(hidden, 4 * hidden), nn.GELU(), nn.Linear(4 * hidden, hidden)
        )

    def forward(self, features: Tensor, bias: Tensor) -> Tensor:
        projected = self.queries_keys_values(self.attention_normalisation(features))
        # [batch, tokens, 3 * hidden] -> three times [batch, heads, tokens, hidden / heads]
        queries, keys, values = projected.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        attended = F.scaled_dot_product_attention(queries, keys, values, attn_mask=bias)
        features = features + self.attention_output(attended.transpose(1, 2).flatten(2))
        result: Tensor = features + self.feed_forward(features)
        return result


class Pooling(nn.Module):
    """The mean over a text's tokens; the first place of a text that has none.

    Args (forward):
        features: float32 [batch, tokens, hidden]; mask: int64 [batch, tokens], 1 for a token, 0 for padding.

    Returns (forward):
        float32 [batch, hidden].
    """

    def forward(self, features: Tensor, mask: Tensor) -> Tensor:
        counts = mask.sum(dim=1, keepdim=True)
        totals = (features * mask.unsqueeze(2)).sum(dim=1)
        if bool((counts > 0).all()):
            return totals / counts
        return torch.where(counts > 0, totals / counts.clamp(min=1), features[:, 0])
