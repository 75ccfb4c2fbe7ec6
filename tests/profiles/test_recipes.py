"""Pasted recipes: each piece of the text is accounted for, nothing is run, no secret survives."""

from __future__ import annotations

import re
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apps.profiles.recipes.hidden import is_secret_name, redact
from apps.profiles.recipes.reading import read_recipe
from apps.profiles.recipes.result import Note, Reading, Recipe, RecipeError
from apps.profiles.recipes.shell import read_commands

SECRETS = ("hf_abcdefghijkl1234", "sk-proj-1234567890abc", "my-own-password")
VLLM = r"""
# the coder, on the first pair
export HF_TOKEN=hf_abcdefghijkl1234
MODEL=Qwen/Qwen2.5-Coder-32B-Instruct-AWQ
CUDA_VISIBLE_DEVICES=0,1 sudo -E vllm serve "$MODEL" \
   --tensor-parallel-size 2 -dp 2 --max-model-len 32k --gpu-memory-utilization=0.92 --swap-space 4 \
   --enable-auto-tool-choice --tool-call-parser hermes --api-key sk-proj-1234567890abc --host 0.0.0.0 --port 8000 \
   --hf-overrides '{"rope": {"a": 1}}' --served-model-name coder second --no-enable-prefix-caching --max-model-le 5 \
   2>&1 | tee log.txt   # a comment
"""
SWAP = """
healthCheckTimeout: 120
macros:
  server: llama-server -ngl 99 --flash-attn
models:
  qwen:
    cmd: |
      ${server} --port ${PORT}
      -m /models/qwen.gguf -c 8192 -np 2
    ttl: 300
    aliases: [q]
    env: ["CUDA_VISIBLE_DEVICES=0,1", "API_KEY=my-own-password"]
  vl:
    cmd: >
      docker run --rm --gpus all -e HF_TOKEN=hf_abcdefghijkl1234 vllm/vllm-openai:v0.32
      --model a/b --max-model-len 4096
  broken: {proxy: "http://x"}
"""
COMPOSE = """
x-common: &common
  restart: unless-stopped
services:
  chat:
    image: ghcr.io/open-webui/open-webui:main
  llm:
    <<: *common
    image: vllm/vllm-openai:v0.32
    command: ["--model", "a/b", "--max-model-len", "4096"]
    environment: {HUGGING_FACE_HUB_TOKEN: "${HF_TOKEN}", NCCL_DEBUG: INFO}
    ports: ["8000:8000"]
    privileged: true
"""


def only(text: str) -> Recipe:
    (recipe,) = read_recipe(text).recipes
    return recipe


def everything(reading: Reading) -> str:
    notes = [*reading.notes]
    for recipe in reading.recipes:
        notes += [*recipe.understood, *recipe.left_out, *recipe.not_understood]
    return repr((notes, reading.recipes))


def said(notes: list[Note], text: str) -> str:
    return next(note.sentence for note in notes if text in note.text)


def test_a_vllm_line_becomes_a_profile() -> None:
    recipe = only(VLLM)
    assert (recipe.engine, recipe.model, recipe.served_name) == ("vllm", "Qwen/Qwen2.5-Coder-32B-Instruct-AWQ", "coder")
    assert (recipe.replicas, recipe.tensor_parallel_size, recipe.pipeline_parallel_size) == (2, 2, 1)
    assert recipe.options == {
        "data_parallel": True,
        "max_model_len": 32000,
        "gpu_memory_utilization": 0.92,
        "tool_call_parser": "hermes",
        "hf_overrides": {"rope": {"a": 1}},
        "enable_prefix_caching": False,
    }


def test_what_was_not_understood_is_named_with_the_nearest_or_the_reason() -> None:
    recipe = only(VLLM)
    assert "--max-model-len" in said(recipe.not_understood, "--max-model-le 5")
    assert "no longer has --swap-space" in said(recipe.not_understood, "--swap-space 4")
    assert "aliases" in said(recipe.not_understood, "second")
    assert said(recipe.left_out, "--port 8000") == "The panel chooses a free port."
    assert said(recipe.left_out, "CUDA_VISIBLE_DEVICES").startswith("The panel chooses the cards")


def test_every_word_of_a_line_is_accounted_for() -> None:
    line = "vllm serve a/b --max-num-seqs 8 --made-up x --host h -tp 2 stray --no-such --seed 1 --enforce-eager"
    recipe = only(line)
    told = " ".join(n.text for n in (*recipe.understood, *recipe.left_out, *recipe.not_understood))
    for word in line.split()[2:]:
        assert word in told, word


@pytest.mark.parametrize("text", [VLLM, SWAP, COMPOSE])
def test_no_secret_is_kept_or_shown(text: str) -> None:
    told = everything(read_recipe(text)) + redact(text)
    for secret in SECRETS:
        assert secret not in told


@pytest.mark.parametrize(
    ("name", "secret"),
    [
        ("HF_TOKEN", True),
        ("--api-key", True),
        ("OPENAI_API_KEY", True),
        ("DB_PASSWORD", True),
        ("max_tokens", False),
        ("--api-key-file", False),
        ("kv_cache_dtype", False),
        ("MONKEY", False),
    ],
)
def test_secrets_are_known_by_their_names(name: str, secret: bool) -> None:
    assert is_secret_name(name) is secret


def test_redacting_keeps_the_rest_of_the_text() -> None:
    text = (
        'vllm serve a/b --api-key "my key" --port 8000\nHF_TOKEN=hf_abcdefghijkl1234 x\n'
        "token: abc\n# sk-proj-1234567890abc"
    )
    assert redact(text) == (
        "vllm serve a/b --api-key (hidden) --port 8000\nHF_TOKEN=(hidden) x\ntoken: (hidden)\n# (hidden)"
    )


@pytest.mark.parametrize(
    "text",
    [
        "export DB_PASSWORD=%s; vllm serve a/b",
        "docker run -e DB_PASSWORD=%s vllm/vllm-openai a/b",
        "bash -c 'A=1;DB_PASSWORD=%s vllm serve a/b'",
        "(DB_PASSWORD=%s vllm serve a/b)",
    ],
)
def test_a_secret_behind_another_word_is_redacted(text: str) -> None:
    assert redact(text % "my-own-password") == text % "(hidden)"


def test_a_llama_server_line_becomes_a_profile() -> None:
    recipe = only(
        "LLAMA_ARG_THREADS=8 /opt/llama/llama-server -m /m/big.gguf -ngl 999 -c 16384 -np 4 -fa -ts 3,1 --mlock "
        "-ctk q8_0 --lora x.gguf --api-key my-own-password --no-webui --n-cpu-moe 4"
    )
    assert (recipe.engine, recipe.model, recipe.device, recipe.tensor_parallel_size) == (
        "llama_cpp",
        "/m/big.gguf",
        "gpu",
        2,
    )
    assert recipe.options == {
        "threads": 8,
        "gpu_layers": "all",
        "context_tokens": 16384,
        "parallel": 4,
        "flash_attention": "on",
        "tensor_split": [3.0, 1.0],
        "cache_type_k": "q8_0",
        "extra_args": ["--load-mode", "mlock", "--n-cpu-moe", "4"],
    }
    assert [note.text for note in recipe.not_understood] == ["--lora x.gguf"]


def test_no_layers_on_the_gpu_is_a_profile_for_the_cpu() -> None:
    assert only("llama-server -m x.gguf -ngl 0").device == "cpu"


@pytest.mark.parametrize(
    "line",
    [
        "python -m vllm.entrypoints.openai.api_server --model a/b -tp 4",
        "python3.11 -u -m vllm.entrypoints.openai.api_server --model=a/b --tensor-parallel-size=4",
        "nohup uv run vllm serve a/b -tp 4 > log 2>&1 &",
        "numactl --cpunodebind=0 --membind=0 vllm serve a/b -tp 4",
        "docker run --gpus all --ipc=host -p 8000:8000 vllm/vllm-openai:latest --model a/b -tp 4",
        "podman run --rm --entrypoint vllm some/image serve a/b -tp 4",
        "cd /opt && source venv/bin/activate && vllm serve a/b -tp 4",
        "env A=1 /usr/bin/vllm serve a/b -tp 4",
    ],
)
def test_the_program_is_found_behind_what_stands_before_it(line: str) -> None:
    recipe = only(line)
    assert (recipe.engine, recipe.model, recipe.tensor_parallel_size) == ("vllm", "a/b", 4)


def test_a_llama_swap_file_gives_a_profile_for_each_model() -> None:
    reading = read_recipe(SWAP)
    qwen, vl = reading.recipes
    assert (qwen.engine, qwen.model, qwen.served_name, qwen.tensor_parallel_size) == (
        "llama_cpp",
        "/models/qwen.gguf",
        "qwen",
        2,
    )
    assert qwen.options == {"gpu_layers": "all", "flash_attention": "on", "context_tokens": 8192, "parallel": 2}
    assert "policy" in said(qwen.not_understood, "ttl: 300")
    assert (vl.engine, vl.model, vl.options) == ("vllm", "a/b", {"max_model_len": 4096})
    assert said(reading.notes, "broken")
    assert said(reading.notes, "healthCheckTimeout")


def test_a_compose_file_gives_a_profile_for_what_serves() -> None:
    reading = read_recipe(COMPOSE)
    (llm,) = reading.recipes
    assert (llm.name, llm.model, llm.options) == ("llm", "a/b", {"max_model_len": 4096})
    assert said(llm.not_understood, "privileged")
    assert said(llm.not_understood, "NCCL_DEBUG")
    assert "neither" in said(reading.notes, "chat")


@pytest.mark.parametrize(
    ("variable", "flag"),
    [
        ("LLAMA_ARG_N_PARALLEL=2", "-np 2"),
        ("LLAMA_ARG_BATCH=1024", "-b 1024"),
        ("LLAMA_ARG_UBATCH=256", "-ub 256"),
        ("LLAMA_ARG_ENDPOINT_METRICS=1", "--metrics"),
        ("LLAMA_ARG_ENDPOINT_SLOTS=0", "--no-slots"),
        ("LLAMA_ARG_THINK=deepseek", "--reasoning-format deepseek"),
        ("LLAMA_ARG_THINK_BUDGET=0", "--reasoning-budget 0"),
        ("LLAMA_ARG_ROPE_SCALING_TYPE=yarn", "--rope-scaling yarn"),
        ("LLAMA_ARG_LOG_VERBOSITY=1", "--log-verbosity 1"),
        ("LLAMA_ARG_UI=false", "--no-webui"),
        ("LLAMA_ARG_KV_OFFLOAD=off", "-nkvo"),
        ("LLAMA_ARG_KV_OFFLOAD=on", "-kvo"),
        ("LLAMA_ARG_MMAP=0", "--no-mmap"),
        ("LLAMA_ARG_HF_FILE=a.gguf", "-hff a.gguf"),
        ("LLAMA_ARG_CTX_SIZE=8192", "--ctx_size 8192"),
    ],
)
def test_a_variable_of_llama_cpp_means_its_flag(variable: str, flag: str) -> None:
    by_variable, by_flag = only(f"{variable} llama-server -m x.gguf"), only(f"llama-server -m x.gguf {flag}")
    assert by_variable.not_understood == by_flag.not_understood == []
    assert by_variable.options == by_flag.options
    assert [n.sentence for n in by_variable.left_out] == [n.sentence for n in by_flag.left_out]
    assert len(by_variable.understood) + len(by_variable.left_out) == 2


def test_a_variable_that_switches_nothing_off_is_named() -> None:
    assert [n.text for n in only("LLAMA_ARG_CPU_MOE=0 llama-server -m x.gguf").not_understood] == [
        "LLAMA_ARG_CPU_MOE=0"
    ]


@pytest.mark.parametrize(
    ("short", "long"),
    [
        ("-ot exps=CPU", "--override-tensor exps=CPU"),
        ("-ncmoe 30", "--n-cpu-moe 30"),
        ("-cmoe", "--cpu-moe"),
        ("-fit off", "--fit off"),
        ("-fitt 512", "--fit-target 512"),
        ("-fitc 8192", "--fit-ctx 8192"),
        ("-nkvo", "--no-kv-offload"),
        ("-lm mlock", "--load-mode mlock"),
        ("--temperature 0.7", "--temp 0.7"),
    ],
)
def test_short_flags_of_llama_cpp_are_known(short: str, long: str) -> None:
    recipe = only(f"llama-server {short} -m x.gguf")
    assert recipe.options == {"extra_args": long.split()}
    assert (recipe.model, recipe.not_understood) == ("x.gguf", [])


@pytest.mark.parametrize(
    ("line", "options"),
    [
        ("-ep", {"enable_expert_parallel": True}),
        ("--max-num-batched-tokens 8k", {"max_num_batched_tokens": 8000}),
        ("--max-num-batched-tokens=8K", {"max_num_batched_tokens": 8192}),
        ("--max-model-len 25.6k", {"max_model_len": 25600}),
        ("--max-model-len -1", {"max_model_len": "auto"}),
        ("--kv-cache-memory-bytes 2G", {"kv_cache_memory_bytes": 2 << 30}),
        ("--kv-cache-memory=3221225472", {"kv_cache_memory_bytes": 3 << 30}),
        ("-cc.cudagraph_mode=PIECEWISE -cc.mode 3", {"compilation_config": {"cudagraph_mode": "PIECEWISE", "mode": 3}}),
        (
            "--speculative-config.method ngram --speculative_config.num_speculative_tokens 5",
            {"speculative_config": {"method": "ngram", "num_speculative_tokens": 5}},
        ),
        ("-sc.a.b 1 -sc.a.c true -sc.l+ x,y -sc.l+=z",
         {"speculative_config": {"a": {"b": 1, "c": True}, "l": ["x", "y", "z"]}}),
        ("-sc.a 1 --speculative-config.b 2 -sc.c 3", {"speculative_config": {"b": 2}}),
        ("--hf-overrides.rope_scaling '{\"factor\": 2}' --hf-overrides.n 4k --hf-overrides.m -5",
         {"hf_overrides": {"rope_scaling": {"factor": 2}, "n": 4000, "m": -5}}),
        ("--hf-overrides.a 1 --hf-overrides '{\"b\": 2}'", {"hf_overrides": {"a": 1}}),  # as vLLM has it
    ],
)  # fmt: skip
def test_common_spellings_of_vllm_are_known(line: str, options: dict[str, Any]) -> None:
    recipe = only(f"vllm serve a/b {line}")
    assert (recipe.options, recipe.not_understood) == (options, [])
    told = " ".join(note.text for note in recipe.understood)
    assert all(word.strip("'") in told for word in re.split("[ =]", line))


def test_keys_of_what_is_no_object_are_named() -> None:
    recipe = only(
        "vllm serve a/b --max-model-len.x 5 --speculative-confi.method ngram --hf-overrides. 1 --hf-overrides"
        + ".a" * 2000
        + " 1 --profiler-config.dir /x --max-model-len 1.5K --hf-overrides.z"
    )
    assert recipe.options == {}
    assert "--speculative-config" in said(recipe.not_understood, "--speculative-confi.method ngram")
    assert {"--max-model-len.x 5", "--hf-overrides. 1", "--max-model-len 1.5K"} <= {
        n.text for n in recipe.not_understood
    }
    assert said(recipe.not_understood, "--hf-overrides.z") == "--hf-overrides.z is missing its value."
    assert said(recipe.left_out, "--profiler-config.dir /x")


def test_secrets_within_an_object_are_dropped_and_named() -> None:
    text = (
        """vllm serve a/b --kv-transfer-config '{"kv_role": "kv_both", "x": [{"api_key": "my-own-password"}]}' """
        """--additional-config.remote '{"password": "my-own-password", "port": 1}'"""
    )
    reading = read_recipe(text)
    assert "my-own-password" not in everything(reading) + redact(text)
    (recipe,) = reading.recipes
    assert recipe.options["kv_transfer_config"] == {"kv_role": "kv_both", "x": [{}]}
    assert recipe.options["additional_config"] == {"remote": {"port": 1}}
    assert [note.text for note in recipe.left_out] == ["api_key (hidden)", "password (hidden)"]


def test_words_of_a_model_are_no_secrets() -> None:
    text = """vllm serve a/b --hf-overrides '{"image_token_index": 5, "eos_token": "</s>", "pad_token_id": 0}'"""
    assert redact(text) == text
    recipe = only(text + " --hf-overrides.image_token_index 7 --hf-overrides.secret 5")
    assert recipe.options["hf_overrides"] == {"image_token_index": 7, "secret": 5}


def test_objects_that_are_nested_without_end_are_named() -> None:
    deep = "[" * 900 + "]" * 900
    recipe = only(f"""vllm serve a/b --seed 1 --hf-overrides '{{"a": {deep}}}' --speculative-config.a '{deep}'""")
    assert recipe.options == {"seed": 1}
    assert [note.sentence for note in recipe.not_understood] == ["It is nested more than 30 deep."] * 2


def test_a_secret_key_of_an_object_is_dropped() -> None:
    text = "vllm serve a/b --kv-transfer-config.token my-own-password --kv-transfer-config.kv_role=kv_both"
    reading = read_recipe(text)
    assert "my-own-password" not in everything(reading) + redact(text)
    assert reading.recipes[0].options == {"kv_transfer_config": {"kv_role": "kv_both"}}


@pytest.mark.parametrize(
    "flags",
    [
        "--health-interval 30s --memory-reservation 8g --userns host --pids-limit -1",
        "-dp 8000:8000",
        "-itv/models:/models -m8g",
        "-d -c 512 --network-alias llm --stop-signal SIGINT",
        "-it --rm --init --privileged --health-retries=3",
    ],
)
def test_flags_of_docker_do_not_hide_the_image(flags: str) -> None:
    recipe = only(f"docker run {flags} -eHF_HUB_OFFLINE=1 -e=TZ=UTC vllm/vllm-openai:latest --model a/b -tp 4")
    assert (recipe.engine, recipe.model, recipe.tensor_parallel_size) == ("vllm", "a/b", 4)
    assert recipe.not_understood == []
    told = " ".join(note.text for note in recipe.left_out)
    assert all(word.lstrip("-ditvm") in told for word in re.split("[ =]", flags))
    assert "HF_HUB_OFFLINE=1" in told
    assert "TZ=UTC" in told


COMMENTED = """
macros:
  latest-llama: |
    # the build of today
    llama-server
    --port ${PORT}
models:
  whole-line:
    cmd: |
      # ${latest-llama} is a macro that is defined above
      ${latest-llama}
      --model /models/qwen.gguf
      # keep the cache small
      --ctx-size 8192
      --parallel 4
  continued:
    cmd: |
      llama-server --port ${PORT} \\
        --model /models/qwen.gguf --jinja\\
      # keep the cache small \\
      --ctx-size 8192
      --parallel 4
  behind:
    cmd: |
      llama-server --model /models/qwen.gguf --ctx-size 8192 # small
      --parallel 4
"""


def test_comments_in_a_llama_swap_command_take_nothing_with_them() -> None:
    whole, continued, behind = read_recipe(COMMENTED).recipes
    for recipe in (whole, continued, behind):
        assert (recipe.model, recipe.options) == ("/models/qwen.gguf", {"context_tokens": 8192, "parallel": 4})
    assert (whole.not_understood, continued.not_understood) == ([], [])
    # llama-swap takes out whole lines only; the engine is given these two words and refuses them.
    assert [note.text for note in behind.not_understood] == ["#", "small"]


def test_a_line_break_in_a_compose_command_is_a_blank() -> None:
    recipe = only(
        """
services:
  llm:
    image: vllm/vllm-openai:v0.32
    command: |
      --model a/b
      --tensor-parallel-size 2 \\
      --max-model-len 4096
      --hf-overrides '{"a":
      1}'
"""
    )
    assert (recipe.model, recipe.tensor_parallel_size) == ("a/b", 2)
    assert recipe.options == {"max_model_len": 4096, "hf_overrides": {"a": 1}}
    assert recipe.not_understood == []


def test_what_follows_the_first_program_of_a_compose_command_is_named() -> None:
    recipe = only("services: {llm: {image: x, command: 'A=1 vllm serve a/b > log; touch /x && B=2'}}")
    assert recipe.model == "a/b"
    assert {"A=1", "touch /x", "B=2"} <= {note.text for note in recipe.not_understood}
    assert said(recipe.left_out, "> log") == "The panel keeps the log."


IN_A_SHELL = [
    "bash -c 'vllm serve a/b -tp 4'",
    "bash -lc 'cd /opt && exec vllm serve a/b -tp 4'",
    "/usr/bin/env bash -euo pipefail -c 'export SIZE=4; vllm serve a/b -tp $SIZE'",
    """sudo sh -c "bash -c 'vllm serve a/b -tp 4'" """,
    "export SIZE=4; bash -c 'vllm serve a/b -tp $SIZE'",
    "docker run --gpus all vllm/vllm-openai:latest bash -c 'pip install x && vllm serve a/b -tp 4'",
    "docker run --entrypoint /bin/bash vllm/vllm-openai:latest -c 'vllm serve a/b -tp 4'",
    "services: {s: {image: vllm/vllm-openai, entrypoint: [/bin/bash, -c], command: ['vllm serve a/b -tp 4']}}",
    'services: {s: {image: vllm/vllm-openai, command: bash -c "vllm serve a/b -tp 4"}}',
    "services: {s: {image: my/own, command: [sh, -c, 'sleep 5; vllm serve a/b -tp $$N'], environment: {N: 4}}}",
    "models: {m: {cmd: \"sh -c 'vllm serve a/b -tp 4'\"}}",
]


@pytest.mark.parametrize("text", IN_A_SHELL)
def test_what_a_shell_is_given_is_read(text: str) -> None:
    recipe = only(text)
    assert (recipe.engine, recipe.model, recipe.tensor_parallel_size) == ("vllm", "a/b", 4)
    assert not [note for note in recipe.understood if "sh" in note.text and "engine" in note.sentence]


def test_everything_that_a_shell_is_given_is_accounted_for() -> None:
    reading = read_recipe(
        "services: {s: {image: my/own, command: [sh, -c, 'W=8; cd /w && vllm serve a/b --odd $X; echo end', zero]}}"
    )
    (recipe,) = reading.recipes
    told = {note.text for note in (*recipe.not_understood, *reading.notes)}
    assert {"W=8", "cd /w", "--odd ${X}", "${X}", "echo end", "zero"} <= told


def test_secrets_in_a_line_for_a_shell_are_dropped_and_take_no_flag_with_them() -> None:
    text = (
        "export OPENAI_API_KEY=my-own-password; "
        "bash -c 'HF_TOKEN=hf_abcdefghijkl1234 vllm serve a/b --api-key $OPENAI_API_KEY -tp 4'"
    )
    reading = read_recipe(text)
    assert not [secret for secret in SECRETS if secret in everything(reading) + redact(text)]
    assert reading.recipes[0].tensor_parallel_size == 4
    # The page shows the text with (hidden) in it, and takes it again.
    (again,) = read_recipe(redact("vllm serve a/b --api-key my-own-password -tp 4")).recipes
    assert (again.tensor_parallel_size, again.not_understood) == (4, [])


def test_shells_within_shells_come_to_an_end() -> None:
    reading = read_recipe("""export A='bash -c "$A"'; bash -c "$A"; vllm serve a/b""")
    assert [recipe.model for recipe in reading.recipes] == ["a/b"]
    assert said(reading.notes, "bash -c")
    with pytest.raises(RecipeError, match="too long"):
        read_recipe("export A='" + 'bash -c "$A"; ' * 60 + '\'; bash -c "$A"')


def test_what_only_a_shell_could_know_is_said() -> None:
    recipe = only("vllm serve $(cat model) --max-model-len $LENGTH --seed `date`")
    assert {"$(cat model)", "${LENGTH}", "`date`"} <= {note.text for note in recipe.not_understood}
    assert recipe.options == {}


def test_nothing_dangerous_becomes_anything() -> None:
    reading = read_recipe("rm -rf / ; vllm serve 'a; touch x' --chat-template '--evil' | sh")
    (recipe,) = reading.recipes
    assert recipe.model == "a; touch x"
    assert "chat_template" not in recipe.options
    assert said(reading.notes, "rm -rf /")


HOSTILE = [
    ("", "nothing to read"),
    ("x" * 70_000, "too long"),
    ("\x00\x01\x02", "control characters"),
    ("vllm serve 'a", "never closed"),
    ("word " * 5000, "words"),
    ("a: &a [*a]", "contains itself"),
    ("services: " + "[" * 40 + "]" * 40, "nested"),
    ("services: !!python/object/apply:os.system ['id']", "not YAML"),
    ("a: 1\nb: [", "not YAML"),
    ("a: 1\nb: 2", "neither a compose file"),
    ("rigpanel_profile: 99\nmodel: x", "format 99"),
    ("rigpanel_profile: 1\nmodel: x\nreplicas: many", "must be a number"),
    ("A=" + "x" * 9000 + "\nB=$A$A$A\nvllm serve $B", "too long"),
    ("# only a comment", "Only comments"),
]


@pytest.mark.parametrize(("text", "words"), HOSTILE)
def test_hostile_text_is_answered_in_a_sentence(text: str, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        read_recipe(text)


def test_a_yaml_bomb_is_refused_before_it_unfolds() -> None:
    lines = ["a0: &a0 [x,x,x,x,x,x,x,x,x,x]"]
    lines += [f"a{n}: &a{n} [{','.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]
    with pytest.raises(RecipeError, match="unfolds"):
        read_recipe("\n".join(lines))
    merges = ["services:", "  s0: &s0 {k: v}"] + [
        f"  s{n}: &s{n} {{<<: [{','.join([f'*s{n - 1}'] * 10)}]}}" for n in range(1, 9)
    ]
    with pytest.raises(RecipeError, match="unfolds"):
        read_recipe("\n".join(merges))


@settings(max_examples=150, deadline=None)
@given(st.text(alphabet=st.sampled_from("ab -=$'\"\\`(){}\n;&|<>#:*&!%[],\t0" + "é\u2028"), max_size=120))
def test_any_text_is_read_or_refused_in_words(text: str) -> None:
    starts = ("", "vllm serve ", "llama-server -m x ", "bash -c ", "services:\n  a: ", "models:\n  a:\n    cmd: ")
    for start in starts:
        refused = ""
        try:
            read_recipe(start + text)
        except RecipeError as error:
            refused = str(error)
        assert not refused or refused.endswith(".")


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=12), min_size=1, max_size=6))
def test_words_are_cut_as_a_shell_cuts_them(words: list[str]) -> None:
    import shlex

    (command,) = read_commands("run " + shlex.join(words))
    assert command.argv[1:] == words


def test_a_large_but_allowed_text_is_read_at_once() -> None:
    models = "\n".join(f"  m{n}: {{cmd: 'llama-server -m /m/{n}.gguf -c 4096 -ngl 99'}}" for n in range(40))
    begun = time.process_time()
    assert len(read_recipe("models:\n" + models).recipes) == 40
    assert time.process_time() - begun < 30  # a limit for runaway work, not a measure


def test_too_many_models_are_refused() -> None:
    models: Any = "\n".join(f"  m{n}: {{cmd: 'llama-server -m /m/{n}.gguf'}}" for n in range(41))
    with pytest.raises(RecipeError, match="more than 40"):
        read_recipe("models:\n" + models)
