"""Switch Transformers. Fedus et al. 2021, arXiv:2101.03961. T5's wiring with one expert a token for the feed-forward part of some layers.

The weight of the chosen expert is its probability. An expert takes up to `capacity` tokens of a sequence, the first ones, and the
others pass by; with a cache each call counts anew, so a decoder that goes token by token drops nothing. What the reference does:
padding after a text takes no place from it, padding before it does.

    source -> embedding -> [ x += attention(norm(x)); x += mlp(norm(x)) or moe(norm(x)) ] * n_encoder_layer -> norm -> memory
    ids -> embedding -> [ x += attention(norm(x)); x += cross_attention(norm(x), memory); x += mlp or moe ] * n_layer -> norm -> head
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastlm import ops
from fastlm.models import t5
from fastlm.models.base import Id, Weight, check_config
from fastlm.models.experts import WithExperts
from fastlm.nn import Context, Embedding, Linear, Module, MoE


@dataclass(frozen=True)
class SwitchConfig(t5.T5Config):
    d_model: int = 768
    n_layer: int = 12
    n_encoder_layer: int = 12
    n_head: int = 12
    n_expert: int = 8
    capacity: int = 64  # the most tokens of a sequence that an expert takes
    n_sparse: Id = 3  # layers of the decoder with experts, see `sparse`
    n_encoder_sparse: Id = 3
    router_losses: bool = False  # whether `loss` adds the two of the routers, times these
    balance_weight: Weight = 0.001
    z_weight: Weight = 0.001

    @property
    def n_expert_used(self) -> int:
        return 1


def _published(d_model: int, d_ff: int, n_layer: int, n_head: int, n_sparse: int, n_expert: int, **changes: Any) -> SwitchConfig:
    sizes: dict[str, Any] = {"d_model": d_model, "d_ff": d_ff, "n_layer": n_layer, "n_encoder_layer": n_layer, "n_head": n_head}
    experts: dict[str, Any] = {"n_sparse": n_sparse, "n_encoder_sparse": n_sparse, "n_expert": n_expert, "router_losses": True}
    return SwitchConfig(**sizes, **experts, **changes)


PRESETS = {
    **{f"switch-base-{n}": _published(768, 3072, 12, 12, 6, n) for n in (8, 16, 32, 64, 128, 256)},
    "switch-large-128": _published(1024, 4096, 24, 16, 12, 128),
    "switch-xxl-128": _published(4096, 10240, 24, 64, 12, 128, activation="gated-gelu_tanh"),
    "switch-c-2048": _published(2080, 6144, 15, 32, 15, 2048),
}
NOTES = {
    "switch-xxl-128": "the paper prints 64 experts, with which its 395B do not come out; the published file has 128. Gated feed-forward "
    "parts, for which transformers has no class",
}


def sparse(n_layer: int, count: int) -> list[bool]:
    """Which layers have experts: every n_layer // count-th, beginning with the second; the reference's rule, which gives layer 1 to
    a count of 0 (it says that it does not) and none to more than there are layers."""
    step = n_layer // count if count else n_layer
    return [step == 1 or (step > 0 and i % step == 1) for i in range(n_layer)]


def moe(c: SwitchConfig) -> MoE:
    """With the reference's distribution, like T5's parts."""
    experts = [t5.mlp(c, out_std=c.d_model**-0.5) for _ in range(c.n_expert)]
    return MoE(c.d_model, experts, 1, renormalise=False, capacity=c.capacity, std=1.0)


class SparseEncoderBlock(t5.EncoderBlock):
    def feed_forward(self, x: Any, context: Context) -> Any:
        return self.mlp(self.mlp_norm(x), context, residual=x)


class SparseDecoderBlock(t5.DecoderBlock):
    def feed_forward(self, x: Any, context: Context) -> Any:
        return self.mlp(self.mlp_norm(x), context, residual=x)


class Switch(WithExperts, t5.T5):
    def __init__(self, config: SwitchConfig) -> None:
        c = self.config = check_config(config)
        if c.scaled != c.tied:
            raise ValueError(
                f"[config] scaled must be what tied is, {c.tied}: states are scaled before a tied head, and only there."
            )
        self.token_embedding = Embedding(c.vocab_size, c.d_model, std=1.0)
        encoder: list[Module] = [
            SparseEncoderBlock(c, moe(c)) if s else t5.EncoderBlock(c) for s in sparse(c.n_encoder_layer, c.n_encoder_sparse)
        ]
        decoder: list[Module] = [SparseDecoderBlock(c, moe(c)) if s else t5.DecoderBlock(c) for s in sparse(c.n_layer, c.n_sparse)]
        self.encoder = t5.Stack(c, encoder, both=True)
        self.decoder = t5.Stack(c, decoder, both=False)
        self.head = None if c.tied else Linear(c.d_model, c.vocab_size, bias=False)

    def auxiliary_loss(self, encoder: Context, decoder: Context) -> Any:
        """The two losses of each stack's routers: balance over the layers of a sequence together, z over all of them. Added where
        the config says so. (The reference leaves them out of a stack that has experts in every layer.)"""
        c, total = self.config, None
        assert decoder.memory is not None
        batch = decoder.memory.batch
        self.count_experts([*encoder.routings, *decoder.routings])
        for context in (encoder, decoder):
            if c.router_losses and context.routings:
                balance = ops.switch_load_balancing_loss(context.routings, groups=batch)
                z = ops.router_z_loss(context.routings)
                both = ops.add(ops.scale(balance, c.balance_weight), ops.scale(z, c.z_weight))
                total = both if total is None else ops.add(total, both)
        return total


Config, Model = SwitchConfig, Switch

HF_TYPE, HF_CLASS = "switch_transformers", "SwitchTransformersForConditionalGeneration"
HF_CONFIG = {k: v for k, v in t5.HF_CONFIG.items() if k != "feed_forward_proj"} | {
    "dense_act_fn": "activation",
    "num_experts": "n_expert",
    "expert_capacity": "capacity",
    "num_sparse_decoder_layers": "n_sparse",
    "num_sparse_encoder_layers": "n_encoder_sparse",
    "output_router_logits": "router_losses",
    "router_aux_loss_coef": "balance_weight",
    "router_z_loss_coef": "z_weight",
}
HF_VALUES = {
    "activation": {"relu": "relu", "gelu": "gelu", "gelu_new": "gelu_tanh", "silu": "silu", "gated-gelu": "gated-gelu_tanh"}
}
HF_FIXED = {"is_encoder_decoder": True, "router_bias": False, "router_dtype": "float32"}
# fmt: off
HF_IGNORED = (
    *t5.HF_IGNORED, "feed_forward_proj", "router_jitter_noise", "router_ignore_padding_tokens", "router_type", "add_router_probs",
    "encoder_sparse_step", "decoder_sparse_step", "add_cross_attention",
)
# fmt: on
HF_NAMES = {ours: theirs.replace("DenseReluDense", "mlp") for ours, theirs in t5.HF_NAMES.items()}
for _stack, _number in {"encoder": 1, "decoder": 2}.items():
    _ours, _theirs = f"{_stack}.blocks.{{}}.mlp", f"{_stack}.block.{{}}.layer.{_number}.mlp"
    HF_NAMES[f"{_ours}.router"] = f"{_theirs}.router.classifier"
    for _name, _wi in {"gate": "wi_0", "up": "wi", "down": "wo"}.items():
        HF_NAMES[f"{_ours}.experts.{{}}.{_name}"] = f"{_theirs}.experts.expert_{{}}.{_wi}"
HF_TRANSPOSED = t5.HF_TRANSPOSED
HF_IGNORED_TENSORS = t5.HF_IGNORED_TENSORS
HF_PREFIX = t5.HF_PREFIX
HF_TIED = t5.HF_TIED
hf_read = t5.hf_read


def hf_defaults(raw: dict[str, Any]) -> dict[str, Any]:
    """With the number of decoder layers where it is left out, and the scale that goes with a tied head."""
    raw = {"num_layers": 12, "decoder_start_token_id": 0} | {k: v for k, v in raw.items() if v is not None}
    raw.setdefault("num_decoder_layers", raw["num_layers"])
    return raw | {"scale_decoder_outputs": raw.get("tie_word_embeddings", True)}


def hf_write(tensors: Mapping[str, Any], model: Switch) -> dict[str, Any]:
    """The embedding once more for each stack where the head is not tied: transformers ties all three or none."""
    shared = {} if model.head is None else dict.fromkeys(list(HF_TIED)[:2], tensors["shared.weight"])
    return t5.hf_write(tensors, model) | shared
