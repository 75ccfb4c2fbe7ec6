"""What an engine takes on a GPU beside weights and KV cache. Pure.

The constants are boots of vLLM 0.26 on an H200 (TP1) and on H100s (TP1, 2 and 4), and published boot logs of 3090s.
``docs/planner.md`` has the table.
"""

from __future__ import annotations

from apps.profiles.fit.inputs import CardMemory, EngineOptions, Layout, ModelFacts
from apps.profiles.fit.ranges import GIB, Range, no_wider

ELEMENT_BYTES = 2
# Inside the budget: persistent memory that is not the model. 0.22 GiB in every TP1 boot; 0.25 (vllm#13061) and
# 0.35 (vllm#10517) published. With TP some of NCCL's buffers grow only in the first passes: club-3090 fits
# 0.5 + utilisation + 0.3 x (TP - 1) GB to its 3090s for all but weights and activations. Less the context and CUDA
# graphs that leaves up to 1.0 GiB at TP2 and 1.4 at TP4, beside single boots that showed a third of it. (H100s on a
# switch showed 0.06, with 1.0 GiB before the first reading; the ranges stay with the 3090s.)
NON_TORCH = Range(int(0.15 * GIB), int(0.40 * GIB))
NON_TORCH_TP_LOW = int(0.30 * GIB)
NON_TORCH_TP_HIGH = (0.70 * GIB, 0.125 * GIB, 1.20 * GIB)  # plus per GPU, at most
# Outside the budget: CUDA context, and with TP NCCL's and the all-reduce's buffers, which exist before vLLM takes its
# first reading. 0.51 GiB measured at TP1. (H100s on a switch: 1.04 at TP2, 1.01 at TP4.)
CONTEXT = (Range(int(0.45 * GIB), int(0.60 * GIB)), Range(int(0.50 * GIB), int(0.80 * GIB)))
SLEEPER = Range(int(0.93 * GIB), int(1.10 * GIB))  # 0.93 eager, 1.05-1.10 with CUDA graphs
DISPLAY_IF_UNKNOWN = Range(int(0.1 * GIB), int(1.0 * GIB))  # an assumption; measure instead
PINNED_SHARE = (1.78, 1.90)  # of the weights: the pinned allocator rounds blocks up to powers of two
# Eager forward pass: 2 B x (3 x intermediate + 3.6 x hidden) per token gave 0.39 GiB for 0.38-0.42 measured at 2048
# tokens and 1.55 for 1.58 at 8192.
# With TP some more of hidden: 0.71 GiB of 0.60 at TP4 and 8192 tokens on H100s, which 5.05 x hidden would be.
HIDDEN_COPIES = ((3.6, 3.6), (3.6, 5.0))
FORWARD_SPREAD = (0.95, 1.10)
FORWARD_SLACK_BYTES = int(0.03 * GIB)
INTERMEDIATE_IF_UNKNOWN = (2.7, 5.6)  # times hidden; models of the catalogue with a known size lie at 3.5-5.4
LOGIT_COPIES = (1, 3)  # float32 logits of max_num_seqs requests, and copies while sampling
# The step of torch.compile on a first boot: one embedding table and two residual streams; three of three within 0.01.
COMPILE_SPREAD = (0.99, 1.02)
# Per CUDA graph size: 0.20 GiB for 11 sizes and 1.17 for 51 (64 layers), 0.15 for 11 (24 layers), all at TP1. With TP
# 0.49 GiB is published for two 3090s and an unknown number of sizes, hence the lower low. (0.52 for 11 sizes at TP2 on
# H100s lies above the range; vLLM 0.26 does not charge it to the budget.)
GRAPH_BYTES = (0.0105 * GIB, 0.00012 * GIB)  # plus per layer
GRAPH_SPREAD = ((0.75, 1.30), (0.50, 1.30))
LAYERS_IF_UNKNOWN = 48
WIDEST_ACTIVATION = int(0.9 * GIB)


def non_torch(layout: Layout) -> Range:
    if layout.gpus_per_replica == 1:
        return NON_TORCH
    base, each, most = NON_TORCH_TP_HIGH
    return Range(NON_TORCH_TP_LOW, int(min(most, base + each * layout.gpus_per_replica)))


def context(layout: Layout) -> Range:
    return CONTEXT[layout.gpus_per_replica > 1]


def used_by_others(card: CardMemory) -> Range:
    """Memory in use now that stays, and the residue of each sleeping neighbour."""
    if card.in_use_bytes is None:
        now = DISPLAY_IF_UNKNOWN if card.display else Range(0, 0)
    else:
        now = Range.exactly(card.in_use_bytes)
    return Range(now.low + card.sleeping_neighbours * SLEEPER.low, now.high + card.sleeping_neighbours * SLEEPER.high)


def pinned_host_bytes(weights_bytes: int, replicas: int) -> Range:
    """Host RAM that sleep mode pins for the weights, awake or asleep."""
    return Range(int(weights_bytes * replicas * PINNED_SHARE[0]), int(weights_bytes * replicas * PINNED_SHARE[1]))


def activation(model: ModelFacts, layout: Layout, options: EngineOptions, *, compiles: bool) -> Range:
    """The peak of the profiling run. ``compiles``: this boot runs torch.compile afresh, which lifts the peak.

    That spike does not return on an identical later boot: 1.49 GiB became 0.38, and 39 % more KV cache.
    """
    hidden, tokens = model.hidden_size or 0, options.max_num_batched_tokens
    copies = HIDDEN_COPIES[layout.tensor_parallel_size > 1]
    low, high = (
        ELEMENT_BYTES * (3 * width / layout.tensor_parallel_size + copied * hidden) * tokens
        for width, copied in zip(_widths(model), copies, strict=True)
    )
    logits = 4 * options.max_num_seqs * (model.vocab_size or 0)
    low = max(low * FORWARD_SPREAD[0], logits * LOGIT_COPIES[0])
    high = max(high * FORWARD_SPREAD[1] + FORWARD_SLACK_BYTES, logits * LOGIT_COPIES[1])
    if compiles and not options.enforce_eager:
        table = (model.vocab_size or 0) * hidden * ELEMENT_BYTES / layout.tensor_parallel_size
        spike = table + 2 * tokens * hidden * ELEMENT_BYTES
        low, high = max(low, spike * COMPILE_SPREAD[0]), max(high, spike * COMPILE_SPREAD[1])
    return no_wider(Range(int(low), int(high)), WIDEST_ACTIVATION)


def _widths(model: ModelFacts) -> tuple[float, float]:
    """Width of the feed-forward a token goes through: all its experts together."""
    if model.intermediate_size is not None:
        width = float(model.intermediate_size * (model.experts_per_token or 1))
        return width, width
    hidden = model.hidden_size or 0
    return hidden * INTERMEDIATE_IF_UNKNOWN[0], hidden * INTERMEDIATE_IF_UNKNOWN[1]


def cuda_graph_sizes(max_num_seqs: int, largest: int | None = None) -> int:
    """How many batch sizes vLLM captures: 1, 2, 4, 8 to 248 by 8, from 256 by 16, up to ``largest``, which is
    2 x max_num_seqs or 512 where not set."""
    if largest is None:
        largest = min(2 * max_num_seqs, 512)
    return sum(size <= largest for size in (1, 2, 4, *range(8, 256, 8), *range(256, 513, 16)))


def cuda_graphs(model: ModelFacts, layout: Layout, options: EngineOptions) -> Range:
    if options.enforce_eager:
        return Range(0, 0)
    each = GRAPH_BYTES[0] + GRAPH_BYTES[1] * (model.layers or LAYERS_IF_UNKNOWN)
    total = each * cuda_graph_sizes(options.max_num_seqs, options.max_cudagraph_capture_size)
    low, high = GRAPH_SPREAD[layout.gpus_per_replica > 1]
    return Range(int(total * low), int(total * high))
