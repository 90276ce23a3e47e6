"""From a model and a batch to the log-prob of every response token.

``ResponseScorer`` is the one module that DDP, FSDP and compile wrap: it runs the model's body, then the LM head at
the places that predict response tokens only, in chunks, with log-softmax in fp32.

Two layouts with the same numbers. ``packed``: the batch's flat row as it is; every example's prompt is computed once
and all its responses attend to it and to themselves. ``padded``: every response behind its own copy of the prompt,
one per row; slower, works with any causal LM, and is what the packed layout is tested against. A scorer checks on a
small batch that its way of computing gives the model's own numbers, and takes a slower way where it does not.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from dppo.attention import (
    BESIDE_COMPILED,
    SHARED_PROMPT,
    Kernel,
    SharedPromptLayout,
    register_shared_prompt_attention,
)
from dppo.batches import collate
from dppo.compiling import compile_layers, uncompiled
from dppo.processes import rank
from dppo.types import Batch, EncodedExample, EncodedResponse, ResponseLogps

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger("dppo")

# Logits of one head chunk take tokens * vocabulary * 4 bytes; 2^24 of them are 64 MiB in fp32.
_LOGITS_PER_CHUNK = 1 << 24
# So many are kept for the backward pass; beyond that they are computed a second time, a chunk at a time.
_LOGITS_KEPT = 1 << 26
# A row of logits is gone through several times. So many at once stay in a core's own memory; elsewhere calls are dear.
_LOGITS_AT_ONCE = {"cpu": 1 << 20}


@dataclass(frozen=True)
class _Inputs:
    """The model's inputs, and the row and place (N,) at which each response token is predicted."""

    model: dict[str, Any]
    row: Tensor
    place: Tensor


class ResponseScorer(nn.Module):
    """A causal LM that returns the log-prob of every response token of a ``Batch``.

    ``packing`` is the layout in use: ``padded`` also where ``packed`` was asked for and the model cannot take it.
    ``kernel`` computes the attention of packed rows: ``sdpa`` also where ``flex`` was asked for and cannot.
    ``compiled``: ``compile_layers`` was called.
    ``own_logits`` says that the model's logits are more than its head applied to its final states (it scales them,
    for instance), so that they come from its own forward pass, all of a batch at once.
    """

    def __init__(self, model: PreTrainedModel, packing: Literal["packed", "padded"], kernel: Kernel = "sdpa") -> None:
        super().__init__()
        self.model = model
        self.packing: Literal["packed", "padded"] = packing
        self.kernel: Kernel = kernel
        self.own_logits = False
        self.compiled = False
        register_shared_prompt_attention()
        self._own_attention = self._base.config._attn_implementation
        self._choose_way(packing, kernel)

    @property
    def _base(self) -> PreTrainedModel:
        """The causal LM itself; adapters of PEFT live inside its layers."""
        peft = getattr(self.model, "get_base_model", None)
        base: PreTrainedModel = self.model if peft is None else peft()
        return base

    @property
    def head(self) -> nn.Linear:
        """The LM head (vocabulary, hidden)."""
        head = self._base.get_output_embeddings()
        if head is None:
            raise TypeError(f"{type(self._base).__name__} has no LM head")
        return cast("nn.Linear", head)

    @property
    def _checkpoints_activations(self) -> bool:
        return any(getattr(module, "gradient_checkpointing", False) for module in self._base.modules())

    @property
    def logit_cap(self) -> float | None:
        """Gemma 2 squashes its logits to cap * tanh(logits / cap)."""
        return getattr(self._base.config, "final_logit_softcapping", None)

    def forward(self, batch: Batch) -> ResponseLogps:
        """Token log-probs (N,) in fp32 for a batch on the model's device."""
        inputs = self._inputs(batch)
        if self.own_logits:
            tokens = _pick(self._own_logits(inputs), batch.targets)
        else:
            tokens = self._log_probs(self._hidden(inputs), batch.targets)
        return ResponseLogps(
            tokens=tokens,
            lengths=batch.lengths,
            example=batch.example,
            roles=batch.roles,
            n_examples=batch.n_examples,
        )

    def logits(self, batch: Batch) -> Iterator[Tensor]:
        """fp32 logits at the places that predict the response tokens, a chunk (places, vocabulary) at a time."""
        yield from self._logits(self._inputs(batch))

    def _logits(self, inputs: _Inputs) -> Iterator[Tensor]:
        if self.own_logits:
            yield _at_least_fp32(self._own_logits(inputs))
            return
        for part in self._hidden(inputs).split(_places_per_chunk(self.head)):
            yield _at_least_fp32(_head_logits(part, self.head, self.logit_cap))

    def _inputs(self, batch: Batch) -> _Inputs:
        if self.packing == "padded":
            return _padded(batch)
        inputs = {
            "input_ids": batch.token_ids[None],
            "position_ids": batch.positions[None],
            # A 4-D mask is handed through as it is: it spares building a (T, T) mask that the layout makes needless.
            "attention_mask": torch.zeros(1, 1, 1, 1, device=batch.token_ids.device),
            "dppo_layout": SharedPromptLayout.of(batch, self.kernel),
        }
        return _Inputs(inputs, torch.zeros_like(batch.predict_from), batch.predict_from)

    def _hidden(self, inputs: _Inputs) -> Tensor:
        """(N, hidden) final states at the places that predict the response tokens."""
        hidden: Tensor = self._base.base_model(**inputs.model, use_cache=False).last_hidden_state
        return hidden[inputs.row, inputs.place]

    def _own_logits(self, inputs: _Inputs) -> Tensor:
        """(N, vocabulary) logits of the model's own forward pass at the same places, in its own precision."""
        logits: Tensor = cast("Any", self._base)(**inputs.model, use_cache=False).logits
        return logits[inputs.row, inputs.place]

    def _log_probs(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """(N,) log-probs of ``targets`` (N,) from hidden states (N, hidden), never all logits at once."""
        head, cap = self.head, self.logit_cap
        n_logits = hidden.shape[0] * head.weight.shape[0]
        kept = torch.is_grad_enabled() and n_logits <= _LOGITS_KEPT and not self._checkpoints_activations
        if kept or n_logits <= _LOGITS_PER_CHUNK:
            return _token_log_probs(hidden, targets, head, cap)
        chunk = _places_per_chunk(head)
        # Recomputing a chunk's logits in the backward pass costs one more head forward and saves the (N, V) tensor.
        parts = [
            checkpoint(_token_log_probs, part, wanted, head, cap, use_reentrant=False)
            for part, wanted in zip(hidden.split(chunk), targets.split(chunk), strict=True)
        ]
        return torch.cat(parts)

    # --- which way of computing ------------------------------------------------------------------------------------

    def _choose_way(self, asked: Literal["packed", "padded"], kernel: Kernel) -> None:
        """Take the fastest way of computing that gives the model's own log-probs on a small batch.

        The model's own forward pass over padded rows is the truth: what stands on the right of a token changes
        nothing in a causal model.
        """
        base = self._base
        device = next(base.parameters()).device
        batch = _small_batch(cast("nn.Embedding", base.get_input_embeddings()).num_embeddings).to(device)
        ways: list[tuple[Literal["packed", "padded"], Kernel, bool]] = [
            ("padded", "sdpa", False),
            ("padded", "sdpa", True),
        ]
        unpackable: str | None = None
        inflexible: str | None = None
        if asked == "packed" and base._supports_attention_backend:
            ways = [("packed", "sdpa", False), ("packed", "sdpa", True), *ways]
            if kernel == "flex":
                ways = [("packed", "flex", False), ("packed", "flex", True), *ways]
        elif asked == "packed":
            unpackable = "its attention cannot be replaced"
        training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad(), torch.autocast(device.type, enabled=False):
                self._use("padded", "sdpa", own_logits=True)
                truth = torch.cat(list(self.logits(batch))).log_softmax(-1)
                for packing, found, own_logits in ways:
                    self._use(packing, found, own_logits=own_logits)
                    fault = self._fault(batch, truth)
                    if fault is None:
                        break
                    if found == "flex":
                        inflexible = fault
                    elif packing == "packed":
                        unpackable = fault
        finally:
            self.model.train(training)
        said = []
        if self.packing != asked:
            said.append(f"{unpackable}, so every response is computed behind its own copy of the prompt")
        elif self.kernel != kernel:
            said.append(f"FlexAttention cannot be used ({inflexible}), so its attention is torch's own")
        if self.own_logits:
            said.append(
                "its logits are not its LM head's alone, so those of a micro-batch are all held in memory at once"
            )
        if said:
            _warn_once(f"warning: {type(base).__name__}: {'; '.join(said)}")

    def compile_layers(self) -> None:
        """Have the model's layers compiled at their next call, attention apart. Raises UserError."""
        compile_layers(self._base)
        self.compiled = True
        register_shared_prompt_attention(beside_compiled=True)
        self._use(self.packing, self.kernel, own_logits=self.own_logits)

    @contextmanager
    def own_attention(self) -> Iterator[None]:
        """The model with the attention it came with and nothing compiled, for decoding."""
        base = self._base
        changed = base._supports_attention_backend and self.packing == "packed"
        if changed:
            base.set_attn_implementation(self._own_attention)
        try:
            with uncompiled() if self.compiled else nullcontext():
                yield
        finally:
            if changed:
                base.set_attn_implementation(self._packed_attention)

    def _use(self, packing: Literal["packed", "padded"], kernel: Kernel, *, own_logits: bool) -> None:
        self.packing, self.kernel, self.own_logits = packing, kernel, own_logits
        if self._base._supports_attention_backend:
            self._base.set_attn_implementation(self._packed_attention if packing == "packed" else self._own_attention)

    @property
    def _packed_attention(self) -> str:
        return BESIDE_COMPILED if self.compiled else SHARED_PROMPT

    def _fault(self, batch: Batch, truth: Tensor) -> str | None:
        """What speaks against the way of computing in use, or None if nothing does.

        ``truth`` (N, vocabulary) are the model's own log-probs at the places that predict the response tokens.
        """
        try:
            inputs = self._inputs(batch)
            found = torch.cat(list(self._logits(inputs))).log_softmax(-1)
            if self.packing == "packed" and inputs.model["dppo_layout"].windows != self._windows(batch):
                return "it has local attention that the packed layout does not know"
            weights = [weight for weight in self._base.parameters() if weight.requires_grad]
            if self.kernel == "flex" and weights:  # its backward pass is another kernel, with needs of its own
                with torch.enable_grad():
                    torch.autograd.grad(next(self._logits(self._inputs(batch))).sum(), weights, allow_unused=True)
        except Exception as error:  # whatever a model that cannot take this way runs into
            return (str(error).splitlines() or [type(error).__name__])[0]
        off = float((found - truth).abs().max() / truth.std(-1).mean())
        return None if off < _tolerance(self._base) else f"the {self.packing} layout gives other log-probs than its own"

    def _windows(self, batch: Batch) -> set[int | None]:
        """The sizes of local attention in the masks that the model makes for itself; None stands for full attention.

        A small batch cannot show the effect of a window of thousands of tokens: what the attention function is told
        must be what the masks say.
        """
        from transformers import AttentionMaskInterface
        from transformers.masking_utils import sdpa_mask

        found: set[int | None] = set()

        def noting(local_size: int | None = None, **kwargs: Any) -> Tensor | None:
            found.add(local_size)
            return sdpa_mask(local_size=local_size, **kwargs)

        AttentionMaskInterface.register(SHARED_PROMPT, noting)
        try:
            self._base.base_model(input_ids=batch.token_ids[None, :2], use_cache=False)
        finally:
            AttentionMaskInterface.register(SHARED_PROMPT, sdpa_mask)
        return found


def _padded(batch: Batch) -> _Inputs:
    """One row per response behind its own copy of the prompt, padded on the right.

    Neither a mask nor position ids: what stands on the right of a token changes nothing in a causal model.
    """
    rows: list[Tensor] = []
    row: list[int] = []
    place: list[int] = []
    spans = zip(batch.example.tolist(), batch.response_start.tolist(), batch.lengths.tolist(), strict=True)
    for owner, start, n_tokens in spans:
        begin, n_prompt = int(batch.prompt_start[owner]), int(batch.prompt_length[owner])
        row += [len(rows)] * n_tokens
        place += range(n_prompt - 1, n_prompt + n_tokens - 1)
        rows.append(torch.cat([batch.token_ids[begin : begin + n_prompt], batch.token_ids[start : start + n_tokens]]))
    device = batch.token_ids.device
    return _Inputs(
        {"input_ids": nn.utils.rnn.pad_sequence(rows, batch_first=True)},
        torch.tensor(row, device=device),
        torch.tensor(place, device=device),
    )


def _small_batch(vocabulary: int) -> Batch:
    """Two examples that use prompts of 2 and 1 tokens, and responses beside and behind each other."""
    ids = [(1 + 7919 * number) % vocabulary for number in range(8)]

    def response(*token_ids: int) -> EncodedResponse:
        return EncodedResponse("", "ranked", token_ids)

    return collate(
        [
            EncodedExample("", "", tuple(ids[:2]), (response(*ids[2:4]), response(ids[4]))),
            EncodedExample("", "", (ids[5],), (response(*ids[6:]),)),
        ]
    )


def _tolerance(model: PreTrainedModel) -> float:
    """How far two ways of computing may be apart by rounding, as a share of the log-probs' spread."""
    whole = model.dtype in (torch.float32, torch.float64) and getattr(model, "hf_quantizer", None) is None
    return 1e-3 if whole else 0.05


@cache
def _warn_once(line: str) -> None:
    if rank() == 0:  # every process of a launcher comes to the same result
        logger.warning("%s", line)


def _places_per_chunk(head: nn.Linear) -> int:
    return max(1, _LOGITS_PER_CHUNK // head.weight.shape[0])


def _at_least_fp32(logits: Tensor) -> Tensor:
    """Logits in fp32, or fp64 of a model in fp64."""
    return logits if logits.dtype == torch.float64 else logits.float()


def _head_logits(hidden: Tensor, head: nn.Module, cap: float | None) -> Tensor:
    """(n, vocabulary) logits from hidden states (n, hidden), in the head's own precision or, capped, in fp32."""
    logits: Tensor = head(hidden)
    return logits if cap is None else torch.tanh(_at_least_fp32(logits) / cap) * cap


def _token_log_probs(hidden: Tensor, targets: Tensor, head: nn.Module, cap: float | None) -> Tensor:
    return _pick(_head_logits(hidden, head, cap), targets)


def _pick(logits: Tensor, targets: Tensor) -> Tensor:
    """(n,) log-probs of ``targets`` (n,) from logits (n, vocabulary)."""
    found: Tensor = cast("Any", _Pick).apply(logits, targets)
    return found


class _Pick(torch.autograd.Function):
    """Log-softmax at one target a row, in fp32 whatever the precision of the logits; fp64 stays.

    A few rows at a time, so that beside the logits only their gradient is as large, and in their own precision.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        parts = [torch.logsumexp(_at_least_fp32(rows), dim=-1) for rows in logits.split(_rows_at_once(logits))]
        normaliser = torch.cat(parts)
        ctx.save_for_backward(logits, targets, normaliser)
        return logits.gather(-1, targets[:, None]).squeeze(-1).to(normaliser.dtype) - normaliser

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        logits, targets, normaliser = ctx.saved_tensors
        slope = torch.empty_like(logits)
        together = (logits, slope, targets, normaliser, gradient)
        for rows, into, wanted, lse, own in zip(*(one.split(_rows_at_once(logits)) for one in together), strict=True):
            # d log p(y) / d logit(v) = [v = y] - p(v)
            whole = into if into.dtype == lse.dtype else torch.empty_like(rows, dtype=lse.dtype)
            torch.sub(rows, lse[:, None], out=whole).exp_().mul_(-own[:, None])
            whole.scatter_add_(-1, wanted[:, None], own[:, None])
            if whole is not into:
                into.copy_(whole)
        return slope, None


def _rows_at_once(logits: Tensor) -> int:
    return max(1, _LOGITS_AT_ONCE.get(logits.device.type, _LOGITS_KEPT) // logits.shape[-1])


def response_log_softmax(scorer: ResponseScorer, batch: Batch) -> Iterator[Tensor]:
    """fp32 log-probs of the whole vocabulary at every response position, a chunk (positions, vocabulary) at a time."""
    for logits in scorer.logits(batch):
        yield torch.log_softmax(logits, dim=-1)
