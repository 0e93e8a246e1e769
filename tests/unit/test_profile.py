"""pipeline.profile: every shipped profile is valid, and a wrong one is refused by name."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pipeline.capacity import NodeCapacity, missing
from pipeline.engine_code import check_engine_code
from pipeline.errors import ConfigError
from pipeline.profile import (
    REPO_ROOT,
    EngineProfile,
    load_profile,
    locate_model,
    profile_names,
    vllm_argument_names,
)

EXPECTED = {
    "mini-maverick",
    "mini-maverick-tp1",
    "smollm2",
    "maverick-fp8-8xh100",
    "maverick-fp8-8xh200",
    "maverick-fp8-8xh200-1m",
    "maverick-fp8-2x8xh100",
    "maverick-fp8-2x8xh100-pp2",
    "maverick-w4a16-2xh200",
}
HEADS, KV_HEADS, EXPERTS = 40, 8, 128  # Llama 4 Maverick's text model


def test_the_profiles_the_docs_name_are_shipped() -> None:
    assert set(profile_names()) >= EXPECTED


@pytest.mark.parametrize("name", profile_names())
def test_every_shipped_profile_loads(name: str) -> None:
    assert load_profile(name).verified


@pytest.mark.parametrize("name", profile_names())
def test_every_argument_of_a_shipped_profile_is_vllms(name: str) -> None:
    known = vllm_argument_names()
    if known is None:
        pytest.skip("vLLM is not installed")
    assert set(load_profile(name).engine_args) <= known


def test_the_names_read_from_vllms_source_hold_both_classes() -> None:
    known = vllm_argument_names()
    if known is None:
        pytest.skip("vLLM is not installed")
    assert {"max_num_seqs", "data_parallel_backend", "enable_log_requests"} <= known
    assert len(known) > 100


@pytest.mark.parametrize("name", [name for name in profile_names() if name.startswith("maverick")])
def test_maverick_profiles_divide_its_heads_and_experts(name: str) -> None:
    profile = load_profile(name)
    assert HEADS % profile.tensor_parallel_size == 0
    assert KV_HEADS % profile.tensor_parallel_size == 0
    assert profile.experts == EXPERTS
    assert EXPERTS % profile.expert_parallel_size == 0


@pytest.mark.parametrize("name", [name for name in profile_names() if name.startswith("maverick")])
def test_contexts_beyond_32768_tokens_have_temperature_tuning_as_the_model_wants(name: str) -> None:
    arguments = load_profile(name).engine_args
    tuned = arguments["override_generation_config"]["attn_temperature_tuning"]
    assert tuned is (arguments["max_model_len"] > 32768)


def test_a_longer_context_without_its_tuning_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    load_profile("maverick-fp8-8xh100", overrides={"max_model_len": 32768})
    assert not caplog.records
    load_profile("maverick-fp8-8xh100", overrides={"max_model_len": 65536})
    assert "65536 with attn_temperature_tuning off: prompts beyond 32768 tokens" in caplog.text


@pytest.mark.parametrize("name", [name for name in profile_names() if name.startswith("maverick")])
def test_cuda_graphs_reach_as_far_as_a_step_of_decoding(name: str) -> None:
    arguments = load_profile(name).engine_args
    assert arguments.get("max_cudagraph_capture_size", 512) >= arguments["max_num_seqs"]


def test_experts_over_two_nodes_are_balanced_with_a_copy_for_each_gpu() -> None:
    arguments = load_profile("maverick-fp8-2x8xh100").engine_args
    assert arguments["enable_eplb"] is True
    assert arguments["eplb_config"]["num_redundant_experts"] == 16


def test_pipeline_stages_keep_their_experts_on_their_own_node() -> None:
    profile = load_profile("maverick-fp8-2x8xh100-pp2")
    assert (profile.pipeline_parallel_size, profile.ranks) == (2, 16)
    assert profile.expert_parallel_size == 8


def test_four_replicas_of_two_gpus_fill_a_node() -> None:
    profile = load_profile("maverick-w4a16-2xh200")
    assert profile.expert_parallel_size == profile.needs.gpus == 2
    node = NodeCapacity("a", cpus=208, gpus=8, memory_gib=1800, accelerator="H200")
    assert missing(profile, 4, [node]) == []
    assert missing(profile, 5, [node]) != []


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        (
            "maverick-fp8-2x8xh100",
            {"eplb_config": {"num_redundant_experts": 20}},
            "num_redundant_experts = 20: 128 experts and 20 copies .* over 16 ranks; take 16",
        ),
        (
            "maverick-fp8-2x8xh100",
            {"eplb_config": {"num_redundant_experts": 5}},
            "num_redundant_experts = 5: .*; take 0",
        ),
        (
            "maverick-fp8-2x8xh100",
            {"eplb_config": {"num_redundant_experts": "many"}},
            "num_redundant_experts = 'many': must be a whole number from 0",
        ),
        ("maverick-fp8-2x8xh100", {"eplb_config": "on"}, "eplb_config = 'on': must be a mapping"),
        (
            "maverick-w4a16-2xh200",
            {"enable_eplb": True, "enable_expert_parallel": False},
            "enable_eplb: .*set enable_expert_parallel",
        ),
        ("maverick-fp8-8xh100", {"block_size": 48}, "block_size = 48: must divide .* 8192 tokens"),
        ("maverick-fp8-8xh100", {"block_size": "16"}, "block_size = '16': must divide"),
    ],
)
def test_what_vllm_would_find_with_the_weights_loaded_is_refused_before(
    name: str, arguments: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load_profile(name, overrides=arguments)


def test_profile_over_two_nodes_is_one_engine_with_experts_over_all_gpus() -> None:
    profile = load_profile("maverick-fp8-2x8xh100")
    assert (profile.tensor_parallel_size, profile.data_parallel_size) == (8, 2)
    assert profile.expert_parallel_size == profile.ranks == 16


def test_mini_maverick_is_expert_parallel_and_its_reference_is_not() -> None:
    assert load_profile("mini-maverick").expert_parallel_size == 2
    assert load_profile("mini-maverick-tp1").expert_parallel_size == 1


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"max_num_seq": 8}, "did you mean 'max_num_seqs'"),
        ({"tensor_paralel_size": 2}, "did you mean 'tensor_parallel_size'"),
        ({"model": "other"}, "the profile's own key 'model'"),
    ],
)
def test_wrong_override_is_refused_with_its_name(
    overrides: dict[str, object], message: str
) -> None:
    if vllm_argument_names() is None:
        pytest.skip("vLLM is not installed")
    with pytest.raises(ConfigError, match=message):
        load_profile("mini-maverick-tp1", overrides=overrides)


def test_override_replaces_one_argument_and_leaves_the_others() -> None:
    before = load_profile("mini-maverick").engine_args
    after = load_profile("mini-maverick", overrides={"max_num_seqs": 7}).engine_args
    assert after == {**before, "max_num_seqs": 7}


def test_gpus_must_equal_the_ranks_of_the_engine() -> None:
    with pytest.raises(ConfigError, match="1 x 8 GPUs, but the engine has 4 ranks"):
        load_profile("maverick-fp8-8xh100", overrides={"tensor_parallel_size": 4})


def test_unknown_profile_names_the_nearest_and_all_known() -> None:
    with pytest.raises(ConfigError, match="did you mean 'mini-maverick'") as caught:
        load_profile("mini-mavrick")
    assert all(name in str(caught.value) for name in EXPECTED)


def write_profile(folder: Path, **changes: object) -> Path:
    document = {
        "description": "x",
        "model": "m",
        "engine_args": {"max_model_len": 8, "max_num_seqs": 1, "max_num_batched_tokens": 8},
        "needs": {"cpus_per_node": 1, "memory_gib_per_node": 1},
        "verified": "not yet run on hardware",
    }
    path = folder / "own.yaml"
    path.write_text(yaml.safe_dump({**document, **changes}))
    return path


def test_profile_can_be_a_path(tmp_path: Path) -> None:
    assert isinstance(load_profile(str(write_profile(tmp_path))), EngineProfile)


@pytest.mark.parametrize("dropped", ["max_model_len", "max_num_seqs", "max_num_batched_tokens"])
def test_sizes_must_be_stated(tmp_path: Path, dropped: str) -> None:
    sizes = {"max_model_len": 8, "max_num_seqs": 1, "max_num_batched_tokens": 8}
    del sizes[dropped]
    with pytest.raises(ConfigError, match=dropped):
        load_profile(str(write_profile(tmp_path, engine_args=sizes)))


def test_unknown_key_names_the_file_and_the_nearest_key(tmp_path: Path) -> None:
    path = write_profile(tmp_path, descripton="typo")
    with pytest.raises(ConfigError, match=r"own\.yaml.*'descripton'.*'description'"):
        load_profile(str(path))


def test_relative_model_is_found_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert locate_model("cluster/models") == str(REPO_ROOT / "cluster" / "models")
    assert locate_model("meta-llama/some-model") == "meta-llama/some-model"


def test_absent_cached_model_says_how_to_make_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(ConfigError, match=r"python -m cluster\.models\.smollm2"):
        locate_model(load_profile("smollm2").model)
    made = tmp_path / "maverick-batch" / "smollm2-135m-instruct"
    made.mkdir(parents=True)
    assert locate_model(load_profile("smollm2").model) == str(made)


def test_loading_a_profile_imports_no_heavy_package() -> None:
    code = (
        "import sys; from pipeline.profile import load_profile; load_profile('mini-maverick'); "
        "print([name for name in ('torch', 'ray', 'vllm') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=REPO_ROOT, check=True
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("value", ["two", 0, True, 1.5])
def test_a_size_that_is_no_whole_number_is_named(value: object) -> None:
    with pytest.raises(ConfigError, match=r"engine_args\.tensor_parallel_size = .*whole number"):
        load_profile("mini-maverick", overrides={"tensor_parallel_size": value})


@pytest.mark.parametrize(
    ("argument", "remedy"),
    [
        ({"trust_remote_code": True}, "trust_remote_code: models bring no code"),
        ({"trust_remote_code": "yes"}, "leave it out"),
        ({"load_format": "pt"}, "'pt' may run code.*convert them to safetensors"),
        ({"load_format": "npcache"}, "safetensors, fastsafetensors"),
        ({"load_format": "tensorizer"}, "load_format"),
        ({"load_format": "a-plugins-own"}, "load_format"),
        ({"load_format": None}, "load_format"),
        ({"worker_cls": "their.Worker"}, "worker_cls: models bring no code"),
        ({"worker_extension_cls": "their.Extension"}, "worker_extension_cls"),
        ({"scheduler_cls": "their.Scheduler"}, "scheduler_cls"),
        ({"logits_processors": ["their:Processor"]}, "logits_processors"),
        ({"distributed_executor_backend": "their.Executor"}, "distributed_executor_backend"),
        ({"model_class_overrides": {"Llama": "their:Model"}}, "model_class_overrides"),
        ({"reasoning_parser_plugin": "their.py"}, "reasoning_parser_plugin"),
        ({"io_processor_plugin": "theirs"}, "io_processor_plugin"),
        ({"log_config_file": "their.json"}, "log_config_file"),
        ({"hf_overrides": {"auto_map": {"AutoConfig": "x.Y"}}}, r"hf_overrides\.auto_map"),
        (
            {"kv_transfer_config": {"kv_connector_module_path": "their.module"}},
            "kv_transfer_config: models bring no code",
        ),
        ({"ec_manager_config": {"encoder_cache_manager_cls": "x.Y"}}, "encoder_cache_manager_cls"),
        ({"speculative_config": {"method": "custom_class", "model": "x.Y"}}, "config.method"),
        ({"speculative_config": {"draft": [{"load_format": "pt"}]}}, r"draft\[0\].load_format"),
        ({"compilation_config": {"backend": "their.backend"}}, "compilation_config.backend"),
        ({"compilation_config": {"inductor_passes": {"a": "x.y"}}}, "inductor_passes"),
        (
            {"structured_outputs_config": {"reasoning_parser_plugin": "their.py"}},
            r"structured_outputs_config\.reasoning_parser_plugin",
        ),
    ],
)
def test_an_argument_that_lets_a_model_bring_code_is_refused(
    argument: dict[str, object], remedy: str
) -> None:
    with pytest.raises(ConfigError, match=remedy):
        load_profile("mini-maverick", overrides=argument)


@pytest.mark.parametrize(
    ("argument", "remedy"),
    [
        ({"tokenizer": "elsewhere"}, "tokenizer: prompts and images are prepared by the files"),
        ({"tokenizer_mode": "slow"}, "tokenizer_mode"),
        ({"hf_config_path": "elsewhere"}, "hf_config_path"),
        ({"skip_tokenizer_init": True}, "skip_tokenizer_init"),
        ({"hf_overrides": {"vision_config": {"image_size": 9}}}, r"hf_overrides\.vision_config"),
        ({"allowed_local_media_path": "/"}, "allowed_local_media_path"),
        ({"mm_processor_kwargs": {"max_patches": 4, "size": {}}}, "kwargs.size: prepare counts"),
    ],
)
def test_an_argument_that_prepare_would_not_honour_is_refused(
    argument: dict[str, object], remedy: str
) -> None:
    with pytest.raises(ConfigError, match=remedy):
        load_profile("mini-maverick", overrides=argument)


def test_arguments_that_choose_among_vllms_own_are_taken() -> None:
    overrides = {
        "mm_processor_kwargs": {"max_patches": 4},
        "hf_overrides": {"text_config": {"attn_temperature_tuning": True}},
        "compilation_config": {"backend": "inductor", "cudagraph_mode": "FULL"},
        "speculative_config": {"method": "ngram", "num_speculative_tokens": 3},
        "tokenizer_mode": "hf",
        "worker_cls": "auto",
        "scheduler_cls": None,
        "trust_remote_code": False,
    }
    load_profile("mini-maverick", overrides=overrides)


def test_every_argument_of_vllm_with_a_name_that_imports_is_refused() -> None:
    """So that one which a newer vLLM adds is seen, here or by its name."""
    names = vllm_argument_names() or frozenset()
    words = ("cls", "class", "plugin", "module", "processors", "code", "transfer", "tokenizer")
    suspects = {name for name in names if any(word in name.split("_") for word in words)}
    harmless = {"mm_processor_cache_type", "max_lora_cls_labels", "load_format"}
    assert len(suspects) > 10
    for name in suspects - harmless:
        with pytest.raises(ValueError, match=f"engine_args.{name}"):
            check_engine_code({name: "their.module"})


@pytest.mark.parametrize(
    "argument",
    [
        {"additional_config": {}},
        {"logits_processors": []},
        {"worker_extension_cls": ""},
        {"allowed_local_media_path": ""},
        {"config_format": None},
    ],
)
def test_an_argument_that_states_vllms_own_default_is_taken(argument: dict[str, object]) -> None:
    assert load_profile("mini-maverick", overrides=argument).engine_args.items() >= argument.items()


@pytest.mark.parametrize("load_format", ["auto", "safetensors", "runai_streamer", "dummy"])
def test_load_formats_that_read_safetensors_or_nothing_are_taken(load_format: str) -> None:
    overrides = {"load_format": load_format, "trust_remote_code": False}
    assert load_profile("mini-maverick", overrides=overrides).engine_args["load_format"]


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth"])
def test_a_folder_whose_only_weights_are_pickled_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").touch()
    (tmp_path / name).touch()
    with pytest.raises(ConfigError, match=f"{name} is a pickle.*convert the weights"):
        locate_model(str(tmp_path))
    (tmp_path / "model.safetensors").touch()
    assert locate_model(str(tmp_path)) == str(tmp_path)


@pytest.mark.parametrize("name", profile_names())
def test_as_many_sequences_as_a_shipped_profile_runs_fit_its_kv_cache(name: str) -> None:
    profile = load_profile(name)
    assert profile.kv_cache is not None
    fitting = profile.sequences(profile.kv_cache.sequence_tokens)
    assert fitting is not None
    assert fitting >= profile.engine_args["max_num_seqs"]
    if profile.needs.gpus:  # what is left over would be wasted
        assert fitting < 1.25 * profile.engine_args["max_num_seqs"]


def test_what_the_long_context_leaves_for_concurrency() -> None:
    profile = load_profile("maverick-fp8-8xh200-1m")
    assert profile.engine_args["max_model_len"] == 2**20
    assert profile.engine_args["override_generation_config"] == {"attn_temperature_tuning": True}
    assert profile.sequences(2**20) == 24
    assert profile.sequences(2**17) == 171


def test_a_length_that_not_one_sequence_can_have_is_refused_before_the_weights_are_loaded() -> None:
    arguments = {"max_model_len": 2**20, "kv_cache_dtype": "auto", "max_num_batched_tokens": 2**17}
    assert load_profile("maverick-fp8-8xh100", overrides={"max_model_len": 2**20})
    with pytest.raises(
        ConfigError, match=r"max_model_len = 1048576: one such.* 91\.4 GB .* 60\.4 GB"
    ):
        load_profile("maverick-fp8-8xh100", overrides={**arguments, "gpu_memory_utilization": 0.75})


@pytest.mark.parametrize("share", [None, "much", True, 0, 1.2])
def test_a_share_of_the_gpus_that_is_none_is_refused_with_its_name(share: object) -> None:
    with pytest.raises(ConfigError, match=r"gpu_memory_utilization = .*above 0 and at most 1"):
        load_profile("maverick-fp8-8xh100", overrides={"gpu_memory_utilization": share})


def test_a_profile_that_does_not_tell_of_its_kv_cache_is_not_checked(tmp_path: Path) -> None:
    assert load_profile(str(write_profile(tmp_path))).sequences(1) is None
