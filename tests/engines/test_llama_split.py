"""How llama.cpp's layers are split over the cards: the command line, and what the log shows afterwards."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from apps.engines.llama_cpp.adapter import LlamaCppAdapter
from apps.engines.llama_cpp.options import fit_flags, help_flags
from apps.engines.llama_cpp.split import intended_layers, memory_shares, read_split
from apps.engines.protocol import EngineKind, InvalidOptions, ReplicaSlot
from tests.engines.contexts import GEMMA, INSTALLS, context, slots

DATA = Path(__file__).parent / "data"
GIB = 1 << 30
LLAMA = INSTALLS[EngineKind.LLAMA_CPP]
BIG = replace(GEMMA, served_name="big", source="/models/big.gguf", chat_template=None)
adapter = LlamaCppAdapter()
# llama-server b10434 over two RPC devices, `--n-gpu-layers all --tensor-split 3,1 --verbosity 4`
LOG = (DATA / "llama-server-two-devices.log").read_text()
ARGV = ("llama-server", "--n-gpu-layers", "999", "--split-mode", "layer", "--tensor-split", "3,1")


def argv(options: dict[str, Any] | None = None, cards: int = 2, **slot: Any) -> tuple[str, ...]:
    given = context(BIG, LLAMA, options or {}, replicas=tuple(replace(s, **slot) for s in slots(cards)))
    return adapter.launch_specs(given)[0].argv


def value(arguments: tuple[str, ...], flag: str) -> str | None:
    return arguments[arguments.index(flag) + 1] if flag in arguments else None


def test_equal_cards_get_equal_shares_and_every_layer() -> None:
    line = argv()
    assert value(line, "--tensor-split") == "23.6,23.6"
    assert value(line, "--split-mode") == "layer"
    assert value(line, "--n-gpu-layers") == "999"  # never some of them, silently, on the CPU


def test_what_others_hold_of_a_card_is_not_counted_on() -> None:
    line = argv(gpu_memory_free_bytes=(23 * GIB, 11 * GIB + GIB // 2))
    assert value(line, "--tensor-split") == "23,11.5"


def test_a_card_that_does_not_say_counts_with_its_size() -> None:
    line = argv(gpu_memory_free_bytes=(None, 12 * GIB))
    assert value(line, "--tensor-split") == "23.6,12"
    assert value(argv(gpu_memory_total_bytes=(0, 0)), "--tensor-split") is None
    assert memory_shares((), ()) is None


def test_one_card_is_not_split_and_a_split_of_ones_own_is_kept() -> None:
    assert value(argv(cards=1), "--tensor-split") is None
    assert value(argv({"split_mode": "none"}), "--tensor-split") is None
    assert value(argv({"tensor_split": [3, 1]}), "--tensor-split") == "3,1"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tensor_split": [1, 1, 1]}, "It has 3 shares, the layout gives each replica 2"),
        ({"tensor_split": [0, 0]}, "above 0"),
        ({"main_gpu": 2}, "counts from 0"),
    ],
)
def test_a_split_that_does_not_match_the_cards_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidOptions, match=words):
        argv(options)


def test_context_can_be_given_per_slot() -> None:
    line = argv({"context_tokens_per_slot": 8192, "parallel": 4})
    assert (value(line, "--ctx-size"), value(line, "--parallel")) == ("32768", "4")
    line = argv({"context_tokens_per_slot": 8192})
    assert (value(line, "--ctx-size"), value(line, "--parallel")) == ("8192", "1")
    with pytest.raises(InvalidOptions, match="not both"):
        adapter.check({"context_tokens": 8192, "context_tokens_per_slot": 8192})


# -- flags of the build ---------------------------------------------------------------------------

HELP = """----- common params -----

-m,    --model FNAME                    model path to load
                                        (env: LLAMA_ARG_MODEL)
-ngl,  --gpu-layers, --n-gpu-layers N   max. number of layers to store in VRAM, either an exact number,
                                        'auto', or 'all' (default: auto) as with --tensor-splat
-sm,   --split-mode {none,layer,row}    how to split the model
-ts,   --tensor-split N0,N1,N2,...      fraction of the model to offload to each GPU
--ui,  --no-ui                          whether to enable the Web UI (default: enabled)
--alias STRING                          set alias
--host HOST                             ip address to listen
--port PORT                             port to listen
--metrics                               enable prometheus compatible metrics endpoint
--swa-full                              use full-size SWA cache
"""


def test_flags_are_read_from_the_help_and_only_from_where_they_are_defined() -> None:
    flags = help_flags(HELP)
    assert {"-ngl", "--gpu-layers", "--n-gpu-layers", "--tensor-split", "-ts", "--no-ui"} <= flags
    assert "--tensor-splat" not in flags
    assert "-----" not in flags


def test_the_line_is_written_in_the_builds_own_spelling() -> None:
    line = adapter.launch_specs(context(BIG, replace(LLAMA, flags=help_flags(HELP)), {}, replicas=slots(2)))[0].argv
    assert "--no-ui" in line
    assert "--no-webui" not in line
    assert "--verbosity" not in line  # it says so at its ordinary level


def test_what_a_build_does_not_have_is_named_with_the_nearest_it_has() -> None:
    install = replace(LLAMA, flags=help_flags(HELP))
    given = context(BIG, install, {"flash_attention": "on", "extra_args": ["--n-cpu-moe", "4"]}, replicas=slots(1))
    with pytest.raises(InvalidOptions) as caught:
        adapter.launch_specs(given)
    told = {e.field: e.message for e in caught.value.errors}
    assert "b11434 does not know --flash-attn" in told["flash_attention"]
    assert "--n-cpu-moe" in told["extra_args"]
    with pytest.raises(InvalidOptions, match="The nearest it knows is --swa-full"):
        fit_flags(("--swa-ful",), help_flags(HELP), "llama-server b1")


# -- what the log shows ---------------------------------------------------------------------------


def test_the_layers_of_each_device_are_read_back() -> None:
    seen = read_split(LOG)
    assert (seen.offloaded, seen.layers) == (19, 19)
    assert [(d.name, d.model_mib, d.cache_mib, d.cache_layers) for d in seen.devices] == [
        ("RPC0", 53.73, 15.0, 15.0),
        ("RPC1", 181.43, 3.0, 3.0),
    ]
    assert seen.host_model_mib == 170.0


def test_the_intended_split_is_llama_cpps_own_rule() -> None:
    assert intended_layers((3, 1), 19, 19) == [15, 4]  # the output layer is the last one's
    assert intended_layers((1, 1), 81, 81) == [41, 40]
    assert intended_layers((1, 0), 19, 19) == [19, 0]
    assert intended_layers((1, 1, 1, 1), 33, 33) == [9, 8, 8, 8]


def test_a_start_as_intended_has_nothing_to_say() -> None:
    found = adapter.check_start(LOG, ARGV)
    assert found.warnings == ()
    assert found.facts["layers_offloaded"] == 19
    assert [d["kv_layers"] for d in found.facts["devices"]] == [15.0, 3.0]


def test_layers_left_on_the_cpu_are_said() -> None:
    log = LOG.replace("offloaded 19/19", "offloaded 5/19")
    assert "Only 5 of 19 layers are on the GPUs" in adapter.check_start(log, ARGV).warnings[0]
    asked = ("--n-gpu-layers", "5", "--tensor-split", "3,1")
    assert "as gpu_layers = 5 asks" in adapter.check_start(log, asked).warnings[0]
    auto = ("--n-gpu-layers", "auto")
    assert "Only 5 of 19" in adapter.check_start(log, auto).warnings[0]


def test_another_split_than_the_intended_is_said() -> None:
    found = adapter.check_start(LOG, (*ARGV[:-1], "1,1"))
    assert found.warnings == (
        "The layers are not split as 1,1 asks: RPC0 has 15 instead of 10, RPC1 has 3 instead of 8.",
    )


def test_a_card_without_weights_is_said() -> None:
    log = "\n".join(line for line in LOG.splitlines() if "18151] model buffer" not in line)
    assert "RPC1 holds no weights" in adapter.check_start(log, ARGV).warnings[0]


def test_a_build_without_a_gpu_is_said() -> None:
    log = (
        "warning: no usable GPU found, --gpu-layers option will be ignored\nload_tensors: CPU model buffer size = 5 MiB"
    )
    assert "built without CUDA" in adapter.check_start(log, ARGV).warnings[0]
    assert "could not be checked" in adapter.check_start("nothing of use", ARGV).warnings[0]


def test_an_engine_on_the_cpu_has_no_split() -> None:
    slot = ReplicaSlot("x", "127.0.0.1", 1, "k")
    line = adapter.launch_specs(context(BIG, LLAMA, {}, replicas=(slot,)))[0].argv
    assert adapter.check_start("nothing of use", line).warnings == ()


def test_cuda_names_of_older_builds_are_understood() -> None:
    log = (
        "llama_model_load_from_file_impl: using device CUDA0 (NVIDIA GeForce RTX 3090) - 23904 MiB free\n"
        "llama_model_load_from_file_impl: using device CUDA1 (NVIDIA GeForce RTX 3090) - 23904 MiB free\n"
        "load_tensors: offloaded 33/33 layers to GPU\n"
        "load_tensors:        CUDA0 model buffer size =  2130.50 MiB\n"
        "load_tensors:        CUDA1 model buffer size =  2207.10 MiB\n"
        "load_tensors:   CPU_Mapped model buffer size =   281.81 MiB\n"
        "llama_kv_cache_unified:      CUDA0 KV buffer size =   544.00 MiB\n"
        "llama_kv_cache_unified:      CUDA1 KV buffer size =   480.00 MiB\n"
        "llama_kv_cache_unified: size = 1024.00 MiB (  8192 cells,  32 layers,  1 seqs), K (f16):  512.00 MiB\n"
        "llama_context:  CUDA_Host  output buffer size =     0.49 MiB\n"
    )
    line = ("--n-gpu-layers", "999", "--tensor-split", "23.6,23.6")
    assert adapter.check_start(log, line).warnings == ()
    assert [d.cache_layers for d in read_split(log).devices] == [17.0, 15.0]
