"""The key table: every key that a config may hold, and what becomes of it.

States:
- acted on: a field of a stage's model (`stages.py`), where its type, default and help stand.
- alias: another name of such a field, or of a value of one.
- ignored: cannot change weights or results, whatever its value; the reason is its help.
- refused: fine at its off value; any other asks for another loss, optimizer, adapter, precision or data than we have.
- removed: a key that its owners took away; accepted with a note.

The rows below are data: (name, kind, default, reason) for what is ignored, (name, kind, default, why, instead) for what is
refused. `kind` is the type its value must have; a default of `HF` is the one in `training_arguments.py`.
"""

from __future__ import annotations

import types
import typing
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic_core import PydanticUndefined

from trimtab.config.stages import MODELS, STAGES, StageConfig
from trimtab.config.training_arguments import TRAINING_ARGUMENTS

State = Literal["acted on", "alias", "ignored", "refused", "removed"]
HF = object()


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """One row of the table.

    Attributes:
        kind: the type as a reader would write it, "float" or "no | steps | epoch".
        off: further values, beside the default and null, at which a refused key does nothing.
        instead: the nearest thing we do (refused), or the key that an alias stands for.
        stages: where it acts; empty for what does not act.
        secret: never written to a run folder or a screen.
    """

    name: str
    kind: str
    default: Any
    state: State
    help: str
    section: str
    off: tuple[Any, ...] = ()
    instead: str = ""
    stages: tuple[str, ...] = ()
    secret: bool = False


# name -> (key it stands for, help). Those in SETTERS set a value of that key; the others are other spellings of it.
ALIASES = {
    "evaluation_strategy": ("eval_strategy", "its name in older files"),
    "ppo_target": ("kl_target", "adaptive KL with this target, only when written; its default there (6) is not ours"),
    "ppo_whiten_rewards": ("whiten_rewards", "its name in older files"),
    "ppo_score_norm": ("score_norm", "its name in older files"),
    "no_cuda": ("use_cpu", "its name in older files"),
    "per_gpu_train_batch_size": ("per_device_train_batch_size", "its name in older files"),
    "per_gpu_eval_batch_size": ("per_device_eval_batch_size", "its name in older files"),
    "activation_checkpointing": ("gradient_checkpointing", "its new name in transformers"),
    "bf16": ("compute_dtype", "true: bfloat16"),
    "fp16": ("compute_dtype", "true: float16 where the device has it, else what auto chooses"),
    "infer_dtype": ("compute_dtype", "the type in chat and predict; not read when training"),
    "disable_gradient_checkpointing": ("gradient_checkpointing", "true: false"),
}
SETTERS = {"bf16": "bool", "fp16": "bool", "disable_gradient_checkpointing": "bool", "infer_dtype": "str"}

_ONE_PROCESS = "there is one process"
_SPEED = "changes speed or memory only; trimtab chooses its own kernels"
_NO_MEDIA = "read for images, video and sound only, and rows hold text"
_LOGS = "changes what is printed, not what is trained"
_ENGINE = "setting of another inference engine; answers come from trimtab's own"
_TRACKER = "trackers are not connected yet; metrics.jsonl in the run folder holds every number"
_LOADER = "rows are read and batched in the process itself, in a fixed order"


def _only_with(switch: str) -> str:
    return f"read only together with {switch}, which is refused"


IGNORED: list[tuple[str, str, Any, str]] = [
    # model
    ("use_fast_tokenizer", "bool", True, "transformers has one tokenizer per model now, the fast one"),
    ("init_special_tokens", "str", "noise_init", _only_with("add_tokens")),
    ("low_cpu_mem_usage", "bool", True, "weights are always loaded without a second copy"),
    ("flash_attn", "any", "auto", _SPEED),
    ("use_unsloth", "bool", False, _SPEED),
    ("use_unsloth_gc", "bool", False, _SPEED),
    ("enable_liger_kernel", "bool", False, _SPEED),
    ("use_liger_kernel", "bool", HF, _SPEED),
    ("liger_kernel_config", "any", HF, _SPEED),
    ("use_v1_kernels", "bool", False, _SPEED),
    ("use_reentrant_gc", "bool", True, "one kind of checkpointing, the one with right gradients"),
    ("gradient_checkpointing_kwargs", "any", HF, "one kind of checkpointing, the one with right gradients"),
    ("activation_checkpointing_kwargs", "any", HF, "one kind of checkpointing, the one with right gradients"),
    ("upcast_layernorm", "bool", False, "norms are always computed in float32"),
    ("upcast_lmhead_output", "bool", False, "log-probabilities are always computed in float32"),
    ("infer_backend", "str", "huggingface", "answers come from trimtab's own engine"),
    ("offload_folder", "str", "offload", "weights are not offloaded to disk"),
    ("use_kv_cache", "bool", True, "the cache is always used; it does not change a text"),
    ("om_hub_token", "str", None, "the Modelers hub is not used"),
    ("print_param_status", "bool", False, _LOGS),
    ("quantization_device_map", "str", None, "a model lies on one device"),
    # export
    ("export_device", "str", "cpu", "merging gives the same weights on any device"),
    ("export_quantization_dataset", "str", None, _only_with("export_quantization_bit")),
    ("export_quantization_nsamples", "int", 128, _only_with("export_quantization_bit")),
    ("export_quantization_maxlen", "int", 1024, _only_with("export_quantization_bit")),
    # data
    ("media_dir", "str", None, _NO_MEDIA),
    ("overwrite_cache", "bool", False, "rows are tokenised anew at every start; there is no cache to overwrite"),
    ("preprocessing_batch_size", "int", 1000, _LOADER),
    ("data_shared_file_system", "bool", False, _ONE_PROCESS),
    # freeze, lora
    ("loraplus_lr_embedding", "float", 1e-6, "embeddings get no low-rank adapter; additional_target trains them whole"),
    ("pissa_iter", "int", 16, _only_with("pissa_init")),
    ("hyper_parallel_args", "any", None, _only_with("use_hyper_parallel")),
    ("asft_alpha", "float", 0.1, _only_with("use_asft_loss")),
    ("eaft_alpha", "float", 1.0, _only_with("use_eaft_loss")),
    ("freeze_vision_tower", "bool", True, _NO_MEDIA),
    ("freeze_multi_modal_projector", "bool", True, _NO_MEDIA),
    ("compute_accuracy", "bool", False, "adds a metric there; what each stage measures is fixed here"),
    ("include_effective_tokens_per_second", "bool", False, "always logged"),
    ("length_penalty", "float", 1.0, "read by beam search only, and there is none"),
    # several processes
    ("ray_init_kwargs", "any", None, _ONE_PROCESS),
    ("master_addr", "str", None, _ONE_PROCESS),
    ("master_port", "any", None, _ONE_PROCESS),
    ("deepspeed", "any", HF, "there is one process, where it shards nothing and changes no result"),
    ("fsdp", "any", HF, "there is one process, where it shards nothing and changes no result"),
    ("fsdp_config", "any", HF, "there is one process, where it shards nothing and changes no result"),
    ("fsdp_min_num_params", "int", 0, _ONE_PROCESS),
    ("fsdp_transformer_layer_cls_to_wrap", "str", None, _ONE_PROCESS),
    ("ddp_timeout", "int", HF, _ONE_PROCESS),
    ("ddp_find_unused_parameters", "bool", HF, _ONE_PROCESS),
    ("ddp_bucket_cap_mb", "int", HF, _ONE_PROCESS),
    ("ddp_broadcast_buffers", "bool", HF, _ONE_PROCESS),
    ("ddp_static_graph", "bool", HF, _ONE_PROCESS),
    ("ddp_backend", "str", HF, _ONE_PROCESS),
    ("local_rank", "int", HF, _ONE_PROCESS),
    ("average_tokens_across_devices", "bool", HF, _ONE_PROCESS),
    ("log_on_each_node", "bool", HF, _ONE_PROCESS),
    ("save_on_each_node", "bool", HF, _ONE_PROCESS),
    ("eval_use_gather_object", "bool", HF, _ONE_PROCESS),
    # speed
    ("torch_compile", "bool", HF, _SPEED),
    ("torch_compile_backend", "str", HF, _SPEED),
    ("torch_compile_mode", "str", HF, _SPEED),
    ("torch_empty_cache_steps", "int", HF, _SPEED),
    ("auto_find_batch_size", "bool", HF, "micro-batches are always cut to fit memory, at the same results"),
    ("eval_accumulation_steps", "int", HF, _SPEED),
    ("dataloader_num_workers", "int", HF, _LOADER),
    ("dataloader_pin_memory", "bool", HF, _LOADER),
    ("dataloader_persistent_workers", "bool", HF, _LOADER),
    ("dataloader_prefetch_factor", "int", HF, _LOADER),
    ("dataloader_multiprocessing_context", "str", HF, _LOADER),
    ("dataloader_in_order", "bool", HF, _LOADER),
    ("remove_unused_columns", "bool", HF, "a row's other columns are kept for rewards, and never reach the model"),
    ("label_names", "any", HF, "labels are made from the template"),
    ("length_column_name", "str", HF, "read only when rows are grouped by length, which is refused"),
    # logging and saving
    ("logging_dir", "str", None, "all logs are in the run folder (output_dir)"),
    ("logging_first_step", "bool", HF, _LOGS),
    ("logging_nan_inf_filter", "bool", HF, "a loss that is not finite stops the run"),
    ("include_num_input_tokens_seen", "any", HF, "always counted"),
    ("include_tokens_per_second", "bool", False, "always logged"),
    ("log_level", "str", HF, _LOGS),
    ("log_level_replica", "str", HF, _LOGS),
    ("disable_tqdm", "bool", HF, _LOGS),
    ("report_to", "any", HF, _TRACKER),
    ("project", "str", HF, _TRACKER),
    ("trackio_space_id", "str", HF, _TRACKER),
    ("trackio_bucket_id", "str", HF, _TRACKER),
    ("trackio_static_space_id", "any", HF, _TRACKER),
    ("prediction_loss_only", "bool", HF, _LOGS),
    ("eval_do_concat_batches", "bool", HF, _LOGS),
    ("include_for_metrics", "any", HF, _LOGS),
    ("batch_eval_metrics", "bool", HF, _LOGS),
    ("save_safetensors", "bool", True, "weights are always written as safetensors"),
    ("enable_jit_checkpoint", "bool", HF, "a killed run resumes from its newest checkpoint"),
    ("restore_callback_states_from_checkpoint", "bool", HF, "a resume always restores all of the state"),
    ("hub_token", "str", HF, _only_with("push_to_hub")),
    ("hub_private_repo", "bool", HF, _only_with("push_to_hub")),
    ("hub_model_id", "str", HF, _only_with("push_to_hub")),
    ("hub_strategy", "str", HF, _only_with("push_to_hub")),
    ("hub_always_push", "bool", HF, _only_with("push_to_hub")),
    ("hub_revision", "str", HF, _only_with("push_to_hub")),
    ("debug", "any", HF, _LOGS),
    ("skip_memory_metrics", "bool", HF, "peak memory is always logged"),
    *((name, "any", None, _NO_MEDIA) for name in (
        "image_max_pixels", "image_min_pixels", "image_do_pan_and_scan", "crop_to_patches", "video_max_pixels",
        "video_min_pixels", "video_fps", "video_maxlen", "use_audio_in_video", "audio_sampling_rate",
    )),
    *((name, "any", None, _ENGINE) for name in (
        "vllm_maxlen", "vllm_gpu_util", "vllm_enforce_eager", "vllm_max_lora_rank", "vllm_config",
        "sglang_maxlen", "sglang_mem_fraction", "sglang_tp_size", "sglang_config", "sglang_lora_backend",
    )),
    *((name, "any", None, _only_with("use_kt")) for name in (
        "kt_cpu_activation", "kt_weight_path", "kt_non_expert_weight_path", "kt_expert_checkpoint_path",
        "kt_use_lora_experts", "kt_lora_expert_num", "kt_lora_expert_intermediate_size",
    )),
    *((name, "any", None, _only_with("use_galore")) for name in (
        "galore_target", "galore_rank", "galore_update_interval", "galore_scale", "galore_proj_type",
        "galore_layerwise",
    )),
    *((name, "any", None, _only_with("use_apollo")) for name in (
        "apollo_target", "apollo_rank", "apollo_update_interval", "apollo_scale", "apollo_proj", "apollo_proj_type",
        "apollo_scale_type", "apollo_layerwise", "apollo_scale_front",
    )),
    *((name, "any", None, _only_with("use_badam")) for name in (
        "badam_mode", "badam_start_block", "badam_switch_mode", "badam_switch_interval", "badam_update_ratio",
        "badam_mask_mode", "badam_verbose",
    )),
    *((name, "any", None, _TRACKER) for name in (
        "use_swanlab", "swanlab_project", "swanlab_workspace", "swanlab_run_name", "swanlab_mode", "swanlab_api_key",
        "swanlab_logdir", "swanlab_lark_webhook_url", "swanlab_lark_secret",
    )),
    *((name, "any", None, "it measures and does not train; metrics.jsonl holds times and tokens/s") for name in (
        "enable_torch_profiler", "profiler_output_dir", "profiler_wait_steps", "profiler_warmup_steps",
        "profiler_active_steps", "profiler_repeat", "profiler_record_shapes", "profiler_profile_memory",
        "profiler_with_stack", "profile_modules",
    )),
    ("fp8_backend", "any", None, _only_with("fp8")),
    ("fp8_enable_fsdp_float8_all_gather", "any", None, _only_with("fp8")),
]  # fmt: skip

_ADAMW = "AdamW (optim: adamw_torch)"
_LORA = "plain LoRA (finetuning_type: lora, lora_rank)"
_REFERENCE = "the policy as it was when the stage started, the default"
_TOKENS = "it changes the tokens that the base model was trained with"
_LOSS = "it is another loss than the stage's"
_OPTIMIZER = "it is another optimizer"

REFUSED: list[tuple[str, str, Any, str, str]] = [
    ("adapter_folder", "str", None, "adapters are named by their whole path", "adapter_name_or_path: FOLDER/SUBFOLDER"),
    ("resize_vocab", "bool", False, "the base is never changed, its embeddings neither", "resize_vocab: false"),
    ("add_tokens", "any", None, _TOKENS, "leave it out"),
    ("add_special_tokens", "any", None, _TOKENS, "leave it out"),
    ("new_special_tokens_config", "any", None, _TOKENS, "leave it out"),
    ("rope_scaling", "any", None, "it changes the base model's positions",
     "the positions of the model's own config.json"),
    ("shift_attn", "bool", False, "S2-attention changes what is computed",
     "full attention; lower cutoff_len if memory is short"),
    ("mixture_of_depths", "any", None, "it changes the architecture that is trained", _LORA),
    ("moe_aux_loss_coef", "float", None, "it adds a term to the loss", "leave it out"),
    ("train_from_scratch", "bool", False, "adapters need a trained base under them", _LORA),
    ("quantization_method", "str", "bnb", "bitsandbytes is the one quantiser", "quantization_method: bnb"),
    ("export_quantization_bit", "int", None, "quantising is not supported", "full weights, with export_dir"),
    ("export_legacy_format", "bool", False, "pickled weights are not written", "safetensors, the default"),
    ("export_hub_model_id", "str", None, "nothing is uploaded", "export_dir, and upload it yourself"),
    ("eval_num_beams", "int", None, "there is no beam search", "do_sample: false for the likeliest token"),
    ("ignore_pad_token_for_loss", "bool", True, "padding is never trained on", "leave it out"),
    ("eval_on_each_dataset", "bool", False, "held-out rows are evaluated as one set",
     "one run of do_eval per data set"),
    ("preserve_thinking", "bool", False, "thoughts of earlier turns are stripped, as the model was trained",
     "leave it out"),
    ("pissa_init", "bool", False, "it changes the base, which is never changed here", _LORA),
    ("pissa_convert", "bool", False, "it belongs to pissa_init", _LORA),
    ("reward_model_quantization_bit", "int", None, "quantised bases are not supported yet", "leave it out"),
    ("ref_model_quantization_bit", "int", None, "quantised bases are not supported yet", "leave it out"),
    ("use_llama_pro", "bool", False, "it trains added layers", _LORA),
    *((name, "bool", False, _OPTIMIZER, _ADAMW) for name in (
        "use_adam_mini", "use_muon", "use_galore", "use_apollo", "use_badam", "adafactor")),
    *((name, "bool", False, "it is another training back end", "leave it out: one process trains here") for name in (
        "use_mca", "use_megatron_bridge", "use_hyper_parallel", "use_kt")),
    ("hyper_parallel_cp_size", "int", 1, "there is one process", "hyper_parallel_cp_size: 1"),
    *((name, "bool", False, _LOSS, "the cross-entropy of stage sft") for name in (
        "use_dft_loss", "use_asft_loss", "use_eaft_loss")),
    ("freeze_language_model", "bool", False, "nothing else is there to train", "freeze_language_model: false"),
    ("num_beams", "int", 1, "there is no beam search", "do_sample: false for the likeliest token"),
    ("ray_num_workers", "int", 1, "there is one process; more would make the batch larger",
     "gradient_accumulation_steps"),
    ("fp8", "bool", False, "there is no fp8 training", "compute_dtype: bfloat16"),
    # transformers
    ("optim_args", "str", HF, "AdamW takes adam_beta1, adam_beta2, adam_epsilon and weight_decay", "those keys"),
    ("optim_target_modules", "any", HF, _OPTIMIZER, _ADAMW),
    ("bf16_full_eval", "bool", HF, "evaluation runs in the type of training", "compute_dtype"),
    ("fp16_full_eval", "bool", HF, "evaluation runs in the type of training", "compute_dtype"),
    ("tf32", "bool", HF, "it changes the precision of float32 products", "compute_dtype: bfloat16"),
    ("eval_delay", "float", HF, "evaluations start with the first interval", "eval_steps"),
    ("push_to_hub", "bool", HF, "nothing is uploaded", "output_dir, and upload it yourself"),
    ("ignore_data_skip", "bool", HF, "a resumed run goes on at the row where it stopped", "leave it out"),
    ("accelerator_config", "any", HF, "there is one process, and batches are trimtab's own", "leave it out"),
    ("parallelism_config", "any", HF, "there is one process", "leave it out"),
    ("dataloader_drop_last", "bool", HF, "the last partial batch is used", "leave it out"),
    ("train_sampling_strategy", "str", HF, "rows are shuffled, or kept in order",
     "disable_shuffling: true to keep the order"),
    ("group_by_length", "bool", False, "it changes the order of rows",
     "leave it out: forwards are batched by tokens anyway"),
    ("sortish_sampler", "bool", HF, "it changes the order of rows",
     "leave it out: forwards are batched by tokens anyway"),
    ("generation_max_length", "int", HF, "the length of answers has one name here", "max_new_tokens, or max_length"),
    ("generation_num_beams", "int", HF, "there is no beam search", "do_sample: false"),
    ("generation_config", "any", HF, "generation is set key by key",
     "do_sample, temperature, top_p, top_k, max_new_tokens"),
]  # fmt: skip

# Values beside the default and null at which a refused key does nothing.
OFF: dict[str, tuple[Any, ...]] = {
    "moe_aux_loss_coef": (0,),
    "eval_num_beams": (0, 1),
    "generation_num_beams": (1,),
    "tf32": (False,),
    "ray_num_workers": (0,),
    "mixture_of_depths": (False,),
}

REMOVED = {
    "use_cache": "the cache is always used when generating and never when training",
    "ray_run_name": _ONE_PROCESS,
    "ray_storage_path": _ONE_PROCESS,
    "placement_strategy": _ONE_PROCESS,
    "resources_per_worker": _ONE_PROCESS,
}

SECRETS = {"hub_token", "om_hub_token", "swanlab_api_key", "swanlab_lark_secret", "swanlab_lark_webhook_url"}

# Values of keys that are acted on, refused with more to say than "not in the list": (key, value) -> (why, instead).
REFUSED_VALUES: dict[tuple[str, str], tuple[str, str]] = {
    **{
        ("stage", name): ("it is a variant of stage grpo", f"stage: grpo with preset: {name}")
        for name in ("dr_grpo", "dapo", "gspo", "cispo")
    },
    **{
        ("stage", name): ("it has another name here", "stage: reinforce_pp")
        for name in ("reinforce_plus_plus", "reinforce++")
    },
    ("finetuning_type", "oft"): ("orthogonal fine-tuning is not supported", _LORA),
    **{
        ("optim", name): ("it is another optimizer, or rounds the state of this one", _ADAMW)
        for name in (
            *(
                "adamw_8bit",
                "adamw_bnb_8bit",
                "paged_adamw",
                "paged_adamw_8bit",
                "paged_adamw_32bit",
                "adamw_torch_8bit",
            ),
            *(
                "adafactor",
                "lion_32bit",
                "lion_8bit",
                "adamw_apex_fused",
                "schedule_free_adamw",
            ),
        )
    },
    **{
        ("lr_scheduler_type", name): ("it is another course of the learning rate", "cosine, or linear")
        for name in (
            "cosine_warmup_with_min_lr",
            "reduce_lr_on_plateau",
            "greedy",
        )
    },
}


# ---------------------------------------------------------------------------------------------------------- the table


def kind_of(annotation: Any) -> str:
    """A field's type as a reader would write it."""
    if get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " | ".join(map(str, arguments))
    if origin is tuple:
        return f"list of {kind_of(arguments[0])}"
    if origin is dict:
        return "mapping"
    if origin in (types.UnionType, typing.Union):
        return " | ".join(kind_of(part) for part in arguments if part is not type(None))
    return str(annotation.__name__)


def nullable(annotation: Any) -> bool:
    """May the value be null?"""
    return type(None) in get_args(annotation) or (
        get_origin(annotation) is Annotated and nullable(get_args(annotation)[0])
    )


_BASE = StageConfig.model_fields


def _acted_on() -> dict[str, Key]:
    rows: dict[str, Key] = {}
    for model in MODELS.values():
        for name, field in model.model_fields.items():
            extra = field.json_schema_extra
            assert isinstance(extra, dict)  # every field is declared through `stages.key`
            if name in rows:
                continue
            rows[name] = Key(
                name=name,
                kind=" | ".join(STAGES) if name == "stage" else kind_of(field.annotation),
                default=None if field.default is PydanticUndefined else _BASE.get(name, field).default,
                state="acted on",
                help=field.description or "",
                section=str(extra["section"]),
                stages=tuple(typing.cast("tuple[str, ...]", extra["stages"])),
                secret=bool(extra["secret"]),
            )
    return rows


def _default(name: str, default: Any) -> Any:
    return TRAINING_ARGUMENTS[name] if default is HF else default


def _table() -> dict[str, Key]:
    rows = _acted_on()
    for name, (target, help) in ALIASES.items():
        kind = SETTERS.get(name, rows[target].kind)
        rows[name] = Key(
            name=name, kind=kind, default=None, state="alias", help=help, section=rows[target].section, instead=target,
            stages=rows[target].stages,
        )  # fmt: skip
    for name, kind, default, reason in IGNORED:
        rows[name] = Key(
            name=name, kind=kind, default=_default(name, default), state="ignored", help=reason, section="Ignored",
            secret=name in SECRETS,
        )  # fmt: skip
    for name, kind, default, why, instead in REFUSED:
        rows[name] = Key(
            name=name, kind=kind, default=_default(name, default), state="refused", help=why, section="Refused",
            off=OFF.get(name, ()), instead=instead,
        )  # fmt: skip
    for name, reason in REMOVED.items():
        rows[name] = Key(name=name, kind="any", default=None, state="removed", help=reason, section="Removed")
    return rows


KEYS: dict[str, Key] = _table()
