"""The typed config of each stage: every key that trimtab acts on, with its type, range, default and one line of help.

One frozen, flat model per stage. Attribute names are the YAML keys. A key that stands in `StageConfig` exists in every
stage; `stages` in its declaration says where it acts. Keys that are known but not acted on are in `keys.py`.
Defaults of LLaMA-Factory's keys are theirs; those of our own keys and of PPO are the ones the formulas are stated with.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, PrivateAttr, model_validator

from trimtab.types import Sampling

ONLINE = ("ppo", "rloo", "grpo", "reinforce_pp", "remax", "raft", "online_dpo")
"""The stages that learn from what the policy writes."""
STAGES = ("pt", "sft", "rm", "dpo", "kto", "orpo", "simpo", *ONLINE)
TRAINING = STAGES
EVERYWHERE = (*STAGES, "infer")

# ------------------------------------------------------------------------------------------------------- value types


def _number(value: object) -> object:
    """`1e-4` without a dot is a string in YAML 1.1, and so are many values from a program; a switch is not a number."""
    if isinstance(value, bool):
        raise ValueError("true and false are not numbers")
    if isinstance(value, str):
        try:
            return int(value)
        except ValueError:
            number = float(value)  # a ValueError here is reported as such
        return int(number) if number.is_integer() else number
    return value


def _text(value: object) -> object:
    """A name that looks like a number (`run_name: 2024`) is still a name."""
    return str(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else value


def _names(value: object) -> object:
    """`a, b` and `[a, b]` are the same list."""
    if value is None:
        return ()
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return value


def _numbers(value: object) -> object:
    """As `_names`; one number is a list of one."""
    return (value,) if isinstance(value, (int, float)) and not isinstance(value, bool) else _names(value)


def _functions(value: object) -> object:
    """As `_names`; a program may give functions themselves."""
    return (value,) if callable(value) else _names(value)


def function_name(function: Any) -> str:
    """A function as a file could name it: module:name."""
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}:{named.__qualname__}"


def _strategy(value: object) -> object:
    """`no` is false in YAML 1.1."""
    return "no" if value is False else value


def _resume(value: object) -> object:
    """true means the newest checkpoint in the run folder, as does auto."""
    word = str(value).lower()
    if word in ("true", "yes", "on", "auto"):
        return "auto"
    return None if word in ("false", "no", "off", "none", "") else value


def _bits(value: object) -> object:
    """0 and 16 bits mean weights as they are."""
    value = _number(value) if value is not None else None
    return None if value in (0, 16) else value


PackedBits = Annotated[Literal[4, 8] | None, BeforeValidator(_bits)]
Real = Annotated[float, Field(allow_inf_nan=False), BeforeValidator(_number)]
# The bounds are those of the numbers that torch and NumPy take; nothing useful is beyond them.
Whole = Annotated[int, Field(ge=0, lt=2**32), BeforeValidator(_number)]
Count = Annotated[int, Field(ge=1, lt=2**31), BeforeValidator(_number)]
AtLeastTwo = Annotated[int, Field(ge=2), BeforeValidator(_number)]
Integer = Annotated[int, Field(gt=-(2**31), lt=2**31), BeforeValidator(_number)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False), BeforeValidator(_number)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False), BeforeValidator(_number)]
Unit = Annotated[float, Field(ge=0, le=1), BeforeValidator(_number)]
BelowHalf = Annotated[float, Field(ge=0, lt=0.5), BeforeValidator(_number)]
AboveOne = Annotated[float, Field(gt=1, allow_inf_nan=False), BeforeValidator(_number)]
BelowOne = Annotated[float, Field(ge=0, lt=1), BeforeValidator(_number)]
TopP = Annotated[float, Field(gt=0, le=1), BeforeValidator(_number)]
TopK = Annotated[int, Field(ge=-1), BeforeValidator(_number)]
Text = Annotated[str, Field(min_length=1), BeforeValidator(_text)]
Names = Annotated[tuple[Text, ...], BeforeValidator(_names)]
Weights = Annotated[tuple[Positive, ...], BeforeValidator(_names)]
Reals = Annotated[tuple[Real, ...], BeforeValidator(_numbers)]
Function = Annotated[Callable[..., Any], PlainSerializer(function_name, return_type=str)]
Functions = Annotated[tuple[Text | Function, ...], BeforeValidator(_functions)]
Dialect = Literal["sqlite", "postgres", "mysql", "oracle", "tsql"]
Interval = Annotated[Literal["no", "steps", "epoch"], BeforeValidator(_strategy)]
Resume = Annotated[str | None, BeforeValidator(_resume)]


def key(section: str, default: Any, help: str, *, stages: tuple[str, ...] = EVERYWHERE, secret: bool = False) -> Any:
    """Declare a key: the section of the docs it belongs to, its default, a line of help, the stages where it acts."""
    extra: dict[str, Any] = {"section": section, "stages": stages, "secret": secret}
    if callable(default):
        return Field(default_factory=default, description=help, json_schema_extra=extra)
    return Field(default=default, description=help, json_schema_extra=extra)


# ------------------------------------------------------------------------------------------------------------- stages


class StageConfig(BaseModel):
    """What every stage has: model, adapters, data, optimisation, evaluation, generation. The stages below are final."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), validate_default=False)

    _origins: dict[str, str] = PrivateAttr(default_factory=dict)
    _notes: tuple[str, ...] = PrivateAttr(default=())
    _given: dict[str, Any] = PrivateAttr(default_factory=dict)

    stage: Literal[
        "pt",
        "sft",
        "rm",
        "dpo",
        "kto",
        "orpo",
        "simpo",
        "ppo",
        "rloo",
        "grpo",
        "reinforce_pp",
        "remax",
        "raft",
        "online_dpo",
    ] = key("Stage", "sft", "what to train")
    do_train: bool = key("Stage", False, "train; without it the file is for chat, predict and export")
    do_eval: bool = key("Stage", False, "evaluate the held-out rows, after training if there is any")
    do_predict: bool = key(
        "Stage", False, "answer (or, with stage rm, score) the rows of the evaluation set at the end"
    )
    predict_with_generate: bool = key("Stage", False, "predict by generating answers")
    output_dir: Text | None = key("Stage", None, "the run folder")
    overwrite_output_dir: bool = key(
        "Stage", False, "start anew in a folder that holds a run; the old one is moved aside"
    )
    resume_from_checkpoint: Resume = key(
        "Stage", None, "auto or true (newest checkpoint in the run folder), or a checkpoint folder", stages=TRAINING
    )
    run_name: Text | None = key("Stage", None, "a name for the run, kept in its manifest", stages=TRAINING)

    model_name_or_path: Text | None = key("Model", None, "a local folder, a hub id or the packaged default model")
    model_revision: Text = key("Model", "main", "branch, tag or commit of a hub model")
    cache_dir: Text | None = key("Model", None, "folder for downloaded models")
    hf_hub_token: Text | None = key("Model", None, "token for the Hugging Face hub", secret=True)
    ms_hub_token: Text | None = key("Model", None, "token for the ModelScope hub", secret=True)
    trust_remote_code: bool = key("Model", False, "allow a model folder to run its own Python code")
    compute_dtype: Literal["auto", "float32", "bfloat16", "float16"] = key(
        "Model",
        "auto",
        "type of the matrix products; trained weights always have float32 masters (bf16, fp16: aliases)",
    )
    quantization_bit: PackedBits = key(
        "Model", None, "CUDA: keep the frozen base in 4 or 8 bits, by bitsandbytes; 0 and 16: not"
    )
    quantization_type: Literal["nf4", "fp4"] = key("Model", "nf4", "the four-bit numbers of quantization_bit: 4")
    double_quantization: bool = key("Model", True, "quantization_bit: 4: pack the scales of the blocks too")
    use_cpu: bool = key("Model", False, "stay on the CPU even where there is a GPU")
    gradient_checkpointing: bool | None = key(
        "Model",
        None,
        "recompute activations in the backward pass: less memory, same gradients; null: if they would not fit",
        stages=TRAINING,
    )

    finetuning_type: Literal["lora", "full", "freeze"] = key(
        "LoRA", "lora", "what is trained: low-rank adapters, all weights, or those of some layers"
    )
    adapter_name_or_path: Names = key("LoRA", (), "adapter folders, stacked in this order on the base")
    create_new_adapter: bool = key("LoRA", False, "train a new adapter on top instead of the last one", stages=TRAINING)
    lora_rank: Count = key("LoRA", 8, "rank of the adapters", stages=TRAINING)
    lora_alpha: Count = key(
        "LoRA", lambda d: 2 * d["lora_rank"], "scale numerator; null: twice the rank", stages=TRAINING
    )
    use_rslora: bool = key("LoRA", False, "scale by alpha over the root of the rank", stages=TRAINING)
    use_dora: bool = key(
        "LoRA", False, "DoRA: train the lengths of the weight's rows beside their direction", stages=TRAINING
    )
    additional_target: Names = key(
        "LoRA", (), "layers trained whole beside the adapter (embed_tokens, lm_head, norm)", stages=TRAINING
    )
    lora_dropout: BelowOne = key("LoRA", 0.0, "dropout before the adapters", stages=("pt", "sft"))
    lora_target: Names = key(
        "LoRA", ("all",), "names of linear layers that get adapters; all: every one", stages=TRAINING
    )

    pure_bf16: bool = key(
        "Full and freeze",
        False,
        "full, freeze: bfloat16 without float32 masters; half the memory, coarse",
        stages=TRAINING,
    )
    freeze_trainable_layers: Integer = key(
        "Full and freeze", 2, "freeze: train the last so many layers; below 0 the first so many", stages=TRAINING
    )
    freeze_trainable_modules: Names = key(
        "Full and freeze",
        ("all",),
        "freeze: parts of those layers (self_attn, mlp ...); all: every part",
        stages=TRAINING,
    )
    freeze_extra_modules: Names = key(
        "Full and freeze", (), "freeze: parts outside the layers (embed_tokens, norm, lm_head)", stages=TRAINING
    )

    template: Text | None = key("Data", None, "chat template by name; null or auto: the tokenizer's own")
    default_system: Text | None = key("Data", None, "system message of rows that have none; null: the template's")
    enable_thinking: bool = key("Data", True, "qwen3: an empty thought before answers without one is trained on")
    tool_format: Literal["default", "qwen", "llama3", "glm4", "mistral"] | None = key(
        "Data", None, "how tools and their calls are written; null: the template's own way"
    )
    split_special_tokens: bool = key("Data", False, "special tokens written inside messages are plain text")
    dataset: Names = key("Data", (), "data sets to train on, by their names in dataset_info.json")
    eval_dataset: Names = key("Data", (), "held-out data sets, in place of val_size")
    dataset_dir: Text | dict[str, Any] = key(
        "Data", "data", "folder of dataset_info.json, ONLINE, or the mapping itself"
    )
    cutoff_len: Count = key("Data", 2048, "most tokens of a row; a longer one is cut, and counted")
    max_samples: Count | None = key("Data", None, "most rows taken from each data set")
    val_size: NonNegative = key("Data", 0.0, "held-out rows: a number if at least 1, a fraction below")
    mix_strategy: Literal["concat", "interleave_under", "interleave_over", "interleave_once"] = key(
        "Data", "concat", "how several data sets become one"
    )
    interleave_probs: Weights = key("Data", (), "share of each data set when interleaved")
    packing: bool | None = key(
        "Data",
        None,
        "join rows into sequences of cutoff_len tokens, in which they see each other",
        stages=("pt", "sft"),
    )
    neat_packing: bool = key(
        "Data", False, "a batch counts packs of cutoff_len tokens; no row sees another", stages=("pt", "sft")
    )
    streaming: bool = key(
        "Data", False, "read rows as they are needed, never all at once; needs max_steps", stages=("pt", "sft")
    )
    buffer_size: Count = key("Data", 16384, "rows among which a stream is shuffled", stages=("pt", "sft"))
    tokenized_path: Text | None = key(
        "Data",
        None,
        "folder of the encoded rows: loaded if it is there, else made; refused if made of anything else",
        stages=TRAINING,
    )
    preprocessing_num_workers: Count | None = key(
        "Data", None, "processes that encode rows, for sets of 2000 rows or more; same result"
    )
    neftune_noise_alpha: NonNegative | None = key(
        "Optimisation", None, "NEFTune: noise on the input embeddings in training", stages=("pt", "sft")
    )
    label_smoothing_factor: BelowOne = key(
        "Optimisation", 0.0, "share of each label that is spread over the vocabulary", stages=("pt", "sft")
    )
    train_on_prompt: bool = key("Data", False, "train on every token of the row", stages=("sft",))
    mask_history: bool = key("Data", False, "train on the last answer only", stages=("sft",))
    disable_shuffling: bool = key("Data", False, "keep the rows in file order", stages=TRAINING)

    per_device_train_batch_size: Count = key("Optimisation", 8, "rows of a batch before accumulation", stages=TRAINING)
    gradient_accumulation_steps: Count = key("Optimisation", 1, "batches per optimizer step", stages=TRAINING)
    layout: Literal["auto", "padded", "packed", "shared"] = key(
        "Training",
        "auto",
        "rows in memory: packed without padding, and what rows begin with in common computed once (shared); same results",
        stages=TRAINING,
    )
    micro_batch_tokens: Count | None = key(
        "Optimisation", None, "tokens per forward pass; null: from memory; no effect on results", stages=TRAINING
    )
    learning_rate: Positive = key("Optimisation", 5e-5, "peak learning rate", stages=TRAINING)
    num_train_epochs: Positive = key(
        "Optimisation", 3.0, "passes over the data, unless max_steps is set", stages=TRAINING
    )
    max_steps: Integer = key("Optimisation", -1, "steps in all; 0 or less: by num_train_epochs", stages=TRAINING)
    max_minutes: Positive | None = key(
        "Optimisation",
        None,
        "end at the first step after so many minutes in steps (set-up, evaluations and saves do not count)",
        stages=TRAINING,
    )
    lr_scheduler_type: Literal[
        "linear",
        "cosine",
        "cosine_with_restarts",
        "cosine_with_min_lr",
        "constant",
        "constant_with_warmup",
        "polynomial",
        "inverse_sqrt",
        "warmup_stable_decay",
    ] = key("Optimisation", "linear", "course of the learning rate after the warm-up", stages=TRAINING)
    lr_scheduler_kwargs: dict[str, Any] | None = key(
        "Optimisation", None, "settings of that course: num_cycles, min_lr, power ...", stages=TRAINING
    )
    warmup_ratio: BelowOne = key("Optimisation", 0.0, "warm-up as a share of all steps", stages=TRAINING)
    warmup_steps: NonNegative = key(
        "Optimisation", 0.0, "warm-up in steps; below 1 a share of all steps", stages=TRAINING
    )
    optim: Literal["adamw_torch", "adamw_torch_fused", "adamw_hf", "sgd", "adagrad", "rmsprop"] = key(
        "Optimisation", "adamw_torch", "AdamW under any of its names, or torch's SGD, Adagrad, RMSprop", stages=TRAINING
    )
    loraplus_lr_ratio: Positive | None = key(
        "Optimisation", None, "LoRA+: B matrices learn this many times as fast as A", stages=TRAINING
    )
    weight_decay: NonNegative = key("Optimisation", 0.0, "decoupled weight decay", stages=TRAINING)
    adam_beta1: BelowOne = key("Optimisation", 0.9, "decay of the first moment", stages=TRAINING)
    adam_beta2: BelowOne = key("Optimisation", 0.999, "decay of the second moment", stages=TRAINING)
    adam_epsilon: Positive = key("Optimisation", 1e-8, "added to the root of the second moment", stages=TRAINING)
    max_grad_norm: NonNegative = key(
        "Optimisation", 1.0, "gradient norm of a role is clipped to this; 0: not", stages=TRAINING
    )
    seed: Whole = key("Optimisation", 42, "seed of initial weights, data order and sampling")
    data_seed: Whole | None = key("Optimisation", None, "seed of the data order; null: seed", stages=TRAINING)
    full_determinism: bool = key(
        "Optimisation", False, "deterministic kernels on a GPU where torch has them", stages=TRAINING
    )

    logging_strategy: Interval = key("Logging and evaluation", "steps", "when to log", stages=TRAINING)
    logging_steps: Positive = key(
        "Logging and evaluation", 500.0, "steps between lines; below 1 a share of all", stages=TRAINING
    )
    save_strategy: Interval = key("Logging and evaluation", "steps", "when to save a checkpoint", stages=TRAINING)
    save_steps: Positive = key(
        "Logging and evaluation", 500.0, "steps between checkpoints; below 1 a share", stages=TRAINING
    )
    save_total_limit: Count | None = key("Logging and evaluation", None, "checkpoints kept; null: all", stages=TRAINING)
    save_only_model: bool = key(
        "Logging and evaluation", False, "checkpoints of the weights alone, which cannot be resumed", stages=TRAINING
    )
    eval_strategy: Interval = key("Logging and evaluation", "no", "when to evaluate the held-out rows", stages=TRAINING)
    eval_steps: Positive | None = key(
        "Logging and evaluation",
        None,
        "steps between evaluations; below 1 a share; null: logging_steps",
        stages=TRAINING,
    )
    eval_on_start: bool = key("Logging and evaluation", False, "evaluate before the first step", stages=TRAINING)
    per_device_eval_batch_size: Count = key(
        "Logging and evaluation", 8, "rows per evaluation batch; no effect on results"
    )
    eval_tasks: Names = key(
        "Logging and evaluation", (), "tasks run on held-out rows by generating (execution_accuracy, exact_match ...)"
    )
    eval_max_samples: Count | None = key(
        "Logging and evaluation", None, "most held-out rows that are evaluated or predicted"
    )
    load_best_model_at_end: bool = key("Logging and evaluation", False, "end with the best checkpoint", stages=TRAINING)
    metric_for_best_model: Text | None = key(
        "Logging and evaluation", None, "the metric that ranks checkpoints", stages=TRAINING
    )
    greater_is_better: bool | None = key(
        "Logging and evaluation", None, "direction of that metric; null: by its name", stages=TRAINING
    )
    early_stopping_steps: Count | None = key(
        "Logging and evaluation", None, "stop after so many evaluations without a better one", stages=TRAINING
    )
    plot_loss: bool = key("Logging and evaluation", False, "save the curves as PNG", stages=TRAINING)

    do_sample: bool | None = key("Generation", None, "sample (true) or take the likeliest token; null: sample in chat")
    temperature: NonNegative | None = key("Generation", None, "null: 0.95 in chat and predict, 1 in rollouts")
    top_p: TopP | None = key("Generation", None, "null: 0.7 in chat and predict; not applied in rollouts")
    top_k: TopK | None = key("Generation", None, "0 or -1: off; null: 50 in chat and predict; not applied in rollouts")
    min_p: Unit | None = key(
        "Generation",
        None,
        "keep tokens of at least this share of the likeliest one's probability; not applied in rollouts",
    )
    repetition_penalty: Positive | None = key("Generation", None, "null: 1; not applied in rollouts")
    max_new_tokens: Count | None = key("Generation", None, "most tokens of an answer; null: 1024")
    max_length: Count | None = key(
        "Generation", None, "most tokens of prompt and answer; only when max_new_tokens is not set"
    )
    skip_special_tokens: bool = key("Generation", True, "leave special tokens out of answers' text")

    export_dir: Text | None = key("Export", None, "folder for the merged model", stages=("infer",))
    export_size: Count = key("Export", 5, "largest shard, in GB", stages=("infer",))

    sql_database: Text | None = key(
        "SQL",
        None,
        "one database for all rows, in place of their column `database`: postgresql://... or an SQLite file",
    )
    sql_dialect: Dialect | None = key(
        "SQL", None, "what queries are written in, in rows without a column `dialect`; null: sqlite"
    )
    sql_workers: Count | None = key(
        "SQL", None, "processes that run queries; null: one per core, at most 4; no effect on results"
    )

    reward_readout: Literal["stop", "last"] = key(
        "Reward model",
        "stop",
        "token at which a reward is read: the end-of-turn token, or the last",
        stages=("rm", "infer"),
    )
    rm_loss: Literal["pairwise", "listwise", "pointwise"] = key(
        "Reward model",
        "pairwise",
        "pairwise: Bradley-Terry, averaged over the pairs of a ranking; listwise: Plackett-Luce; pointwise: squared error to a score",
        stages=("rm", "infer"),
    )

    # -------------------------------------------------------------------------------------------------- derived values

    @property
    def notes(self) -> tuple[str, ...]:
        """Lines to print at the start: ignored keys with the reason, differences that matter."""
        return self._notes

    def origin(self, name: str) -> str:
        """Where the value of a key comes from: `file:line: key`, `command line: key`, `argument: key`, or `default`."""
        return self._origins.get(name, "default")

    @property
    def given(self) -> Mapping[str, Any]:
        """Every key that the user wrote, under its canonical name, with the value as read; those not acted on too."""
        return self._given

    def written(self, name: str) -> bool:
        """Was this key given by the user?"""
        return name in self._origins

    @property
    def do_infer(self) -> bool:
        """No training asked for: a file for chat, predict, export or evaluation."""
        return not self.do_train

    @property
    def batch_size(self) -> int:
        """Rows (prompts, or pairs) per optimizer step, on one process."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps

    @property
    def order_seed(self) -> int:
        """Seed of the data order."""
        return self.seed if self.data_seed is None else self.data_seed

    def warmup(self, total_steps: int) -> int:
        """Warm-up steps of a run of `total_steps`; a share is rounded up. `warmup_steps` wins over `warmup_ratio`."""
        if self.warmup_steps >= 1:
            return int(self.warmup_steps)
        return math.ceil(total_steps * (self.warmup_steps or self.warmup_ratio))

    def interval(self, name: Literal["logging", "save", "eval"], total_steps: int) -> int | None:
        """Steps between two logs, checkpoints or evaluations; None when they follow epochs or never happen."""
        if getattr(self, f"{name}_strategy") != "steps":
            return None
        steps: float = getattr(self, f"{name}_steps") or self.logging_steps
        return max(1, math.ceil(total_steps * steps) if steps < 1 else int(steps))

    @property
    def chat_sampling(self) -> Sampling:
        """How chat and predict draw: 0.95 / 0.7 / 50 where the file says nothing; temperature 0 is greedy."""
        return Sampling(
            temperature=0.0 if self.do_sample is False else 0.95 if self.temperature is None else self.temperature,
            top_p=0.7 if self.top_p is None else self.top_p,
            top_k=50 if self.top_k is None else max(0, self.top_k),
            min_p=self.min_p or 0.0,
            repetition_penalty=1.0 if self.repetition_penalty is None else self.repetition_penalty,
            max_new_tokens=self.answer_limit,
            seed=self.seed,
        )

    @property
    def answer_limit(self) -> int:
        """Most new tokens of an answer; `max_length`, when it stands alone, before the prompt is taken off it."""
        return self.max_new_tokens or self.max_length or 1024


class PtConfig(StageConfig):
    """Continued pre-training on plain text: every token is a label."""

    stage: Literal["pt"] = key("Stage", "pt", "what to train")


class SftConfig(StageConfig):
    """Supervised fine-tuning."""

    stage: Literal["sft"] = key("Stage", "sft", "what to train")


class RmConfig(StageConfig):
    """Reward model: on pairs, rankings or scored answers."""

    stage: Literal["rm"] = key("Stage", "rm", "what to train")

    rm_label_smoothing: BelowHalf = key(
        "Reward model", 0.0, "pairwise: share of pairs taken to be the wrong way round", stages=("rm",)
    )

    center_rewards_coef: NonNegative = key(
        "Reward model", 0.0, "weight of the squared sum of a pair's rewards in the loss", stages=("rm",)
    )


_PAIRS = ("dpo", "orpo", "simpo")
_PREFERENCE = (*_PAIRS, "kto")
PAIR_LOSSES = ("sigmoid", "robust", "hinge", "ipo", "ipo_avg", "kto_pair", "nca", "exo")
"""Values of `pref_loss` that compare with a reference."""


_REFERENCED = ("dpo", "kto", *ONLINE)
_REF_MODEL = ("Reference", None, "reference model; null: the policy when the stage starts")
_REF_ADAPTERS = ("Reference", (), "adapters on the reference model (on the base, without ref_model)")


class PreferenceConfig(StageConfig):
    """What the stages that learn from judged answers have in common."""

    pref_beta: Positive = key(
        "Preferences",
        0.1,
        "weight of the KL to the reference; in orpo, of the odds ratio",
        stages=(*_PREFERENCE, "online_dpo"),
    )
    pref_ftx: NonNegative = key(
        "Preferences", 0.0, "weight of the chosen answer's NLL per token, added to the loss", stages=_PREFERENCE
    )


class DpoConfig(PreferenceConfig):
    """Preference optimisation on pairs, with any of its losses."""

    stage: Literal["dpo"] = key("Stage", "dpo", "what to train")

    ref_model: Text | None = key(*_REF_MODEL, stages=_REFERENCED)
    ref_model_adapters: Names = key(*_REF_ADAPTERS, stages=_REFERENCED)

    pref_loss: Literal["sigmoid", "robust", "hinge", "ipo", "ipo_avg", "kto_pair", "orpo", "simpo", "nca", "exo"] = key(
        "Preferences", "sigmoid", "the loss of stage dpo", stages=("dpo",)
    )
    dpo_label_smoothing: BelowHalf = key(
        "Preferences",
        0.0,
        "share of labels taken to be the wrong way round (sigmoid, robust, exo)",
        stages=("dpo", "online_dpo"),
    )
    pref_bco_weight: NonNegative = key(
        "Preferences", 0.0, "weight of the binary classifier's loss beside pref_loss", stages=("dpo",)
    )
    ld_alpha: Unit | None = key(
        "Preferences", None, "weight of tokens beyond the shorter answer's length; null: 1", stages=("dpo",)
    )
    pref_length_normalized: bool = key("Preferences", False, "log-ratios per token instead of summed", stages=("dpo",))
    simpo_gamma: NonNegative = key(
        "Preferences", 0.5, "the lead that simpo asks of the chosen answer", stages=("dpo", "simpo")
    )


class KtoConfig(PreferenceConfig):
    """Kahneman-Tversky optimisation on single answers with a label (kto_tag)."""

    stage: Literal["kto"] = key("Stage", "kto", "what to train")

    ref_model: Text | None = key(*_REF_MODEL, stages=_REFERENCED)
    ref_model_adapters: Names = key(*_REF_ADAPTERS, stages=_REFERENCED)

    kto_chosen_weight: NonNegative = key("Preferences", 1.0, "weight of wanted answers", stages=("kto",))
    kto_rejected_weight: NonNegative = key("Preferences", 1.0, "weight of unwanted answers", stages=("kto",))


class OrpoConfig(PreferenceConfig):
    """Odds-ratio preference optimisation on pairs, without a reference."""

    stage: Literal["orpo"] = key("Stage", "orpo", "what to train")


class SimpoConfig(PreferenceConfig):
    """Simple preference optimisation on pairs, without a reference."""

    stage: Literal["simpo"] = key("Stage", "simpo", "what to train")

    simpo_gamma: NonNegative = key(
        "Preferences", 0.5, "the lead that simpo asks of the chosen answer", stages=("dpo", "simpo")
    )


def _kl_start(values: Mapping[str, Any]) -> float:
    return 0.05 if values.get("kl_target") is None else 0.2


_PPO = ("ppo",)
_GROUPS = ("rloo", "grpo")
_GRPO = ("grpo",)
_RATIOS = ("ppo", "rloo", "grpo", "reinforce_pp")


class OnlineConfig(StageConfig):
    """What the stages that learn from the policy's own answers have in common."""

    reward_model: Names = key(
        "Online",
        (),
        "the reward model: an adapter's folder (several: an ensemble), a model's folder, or a server's URL",
        stages=ONLINE,
    )
    reward_ensemble: Literal["mean", "min", "mean_minus_std"] = key(
        "Online", "mean", "several reward models: how their scores become one", stages=ONLINE
    )
    reward_ensemble_coef: NonNegative = key(
        "Online", 1.0, "mean_minus_std: standard deviations of the members' scores that are taken off", stages=ONLINE
    )
    reward_model_type: Literal["lora", "full", "api", "sql"] = key(
        "Online",
        "lora",
        "lora: an adapter on the same base; full: a model with a value head; api: a server; sql: no model, queries are run",
        stages=ONLINE,
    )
    reward_model_adapters: Names = key(
        "Online", (), "adapters on a full reward model, stacked in this order", stages=ONLINE
    )
    reward_funcs: Functions = key(
        "Online",
        (),
        "Python functions that reward: FILE.py:NAME, MODULE:NAME or a ready-made one (docs/rewards.md)",
        stages=ONLINE,
    )
    reward_weights: Reals = key(
        "Online",
        (),
        "weight of the reward model (or sql), if there is one, then of each function; none: all 1",
        stages=ONLINE,
    )
    sql_reward_equal: Real = key(
        "SQL", 1.0, "reward_model_type sql: an answer whose query is right on every database of its row", stages=ONLINE
    )
    sql_reward_executes: Real = key(
        "SQL",
        0.1,
        "reward_model_type sql: one that runs, gives the right number of columns, and other rows",
        stages=ONLINE,
    )
    sql_reward_else: Real = key("SQL", 0.0, "reward_model_type sql: any other answer", stages=ONLINE)
    sql_partial_credit: bool = key(
        "SQL",
        False,
        "reward_model_type sql: grades for wrong answers, as sql_graded; policies have learnt to collect such credit",
        stages=ONLINE,
    )
    reward_length_penalty: NonNegative = key(
        "Online", 0.0, "taken off the reward for each token of an answer beyond reward_length_free", stages=ONLINE
    )
    reward_length_free: Whole = key("Online", 0, "tokens of an answer that cost nothing", stages=ONLINE)
    reward_timeout: Positive = key(
        "Online", 60.0, "seconds that a reward server or function has for an answer", stages=ONLINE
    )
    reward_retries: Whole = key(
        "Online", 4, "how often a reward server that does not answer is asked again", stages=ONLINE
    )
    ref_model: Text | None = key(*_REF_MODEL, stages=_REFERENCED)
    ref_model_adapters: Names = key(*_REF_ADAPTERS, stages=_REFERENCED)
    ppo_buffer_size: Count = key("Online", 1, "optimizer batches per rollout batch", stages=ONLINE)
    kl_target: Positive | None = key(
        "Online", None, "KL per answer that an adaptive coefficient steers to; null: fixed coefficient", stages=ONLINE
    )
    kl_horizon: Positive = key("Online", 10000.0, "answers over which the adaptive coefficient moves", stages=ONLINE)
    score_norm: bool = key(
        "Online", False, "scores less their running mean, divided by their running standard deviation", stages=ONLINE
    )
    reward_clip: Positive | None = key("Online", None, "scores clipped to plus or minus this; null: not", stages=ONLINE)
    missing_eos_mode: Literal["subtract", "replace"] = key(
        "Online", "subtract", "take it off, or score minus the penalty", stages=ONLINE
    )
    entropy_coef: NonNegative = key("Online", 0.0, "weight of an entropy bonus", stages=ONLINE)
    ppo_epochs: Count = key("Online", 1, "passes over each rollout batch", stages=ONLINE)
    group_size: Count = key("Online", 1, "answers per prompt", stages=ONLINE)
    eval_group_size: Count = key("Online", 1, "sampled answers per held-out prompt in an evaluation", stages=ONLINE)
    kl_coef: NonNegative = key(
        "Online", _kl_start, "weight of the KL to the reference; start value when adaptive (then 0.2)", stages=ONLINE
    )
    kl_placement: Literal["reward", "loss"] = key("Online", "reward", "where the KL enters", stages=ONLINE)
    kl_estimator: Literal["k1", "k2", "k3"] = key("Online", "k1", "estimator of the KL", stages=ONLINE)
    missing_eos_penalty: NonNegative = key(
        "Online", 1.0, "taken off the score of an answer that did not end by itself", stages=ONLINE
    )
    reward_baseline: Literal["none", "answer"] = key(
        "Online",
        "none",
        "answer: off each score that of the row's own answer; same optimum, less noise between prompts",
        stages=ONLINE,
    )
    overlong_buffer: Whole = key(
        "Online",
        0,
        "the last so many tokens before the limit cost up to overlong_penalty, evenly; 0: off",
        stages=ONLINE,
    )
    overlong_penalty: NonNegative = key("Online", 1.0, "what an answer at the limit costs then", stages=ONLINE)
    ref_update_every: Count | None = key(
        "Online", None, "the reference becomes the policy every so many steps; null: never", stages=ONLINE
    )

    @property
    def reward_sources(self) -> tuple[str, ...]:
        """What rewards an answer, as `reward_weights` counts it."""
        first = ("sql",) if self.reward_model_type == "sql" else ("the reward model",) if self.reward_model else ()
        return (*first, *map(str, self.reward_funcs))

    @property
    def rollout_size(self) -> int:
        """Prompts per rollout batch."""
        return self.batch_size * self.ppo_buffer_size

    @property
    def rollout_temperature(self) -> float:
        """1 unless the file writes `temperature`; it divides every log-probability too."""
        return 1.0 if self.temperature is None else self.temperature

    @property
    def rollout_sampling(self) -> Sampling:
        """How rollouts are drawn: temperature only, so that what samples is what is scored."""
        return Sampling(temperature=self.rollout_temperature, max_new_tokens=self.answer_limit, seed=self.seed)


class PpoConfig(OnlineConfig):
    """Proximal policy optimisation: a reward, with a critic."""

    stage: Literal["ppo"] = key("Stage", "ppo", "what to train")

    ppo_epochs: Count = key("Online", 4, "passes over each rollout batch", stages=ONLINE)
    clip_range: Positive = key("Online", 0.2, "the ratio is clipped to 1 plus or minus this", stages=_RATIOS)
    clip_range_low: BelowOne | None = key("Online", None, "lower clip range; null: clip_range", stages=_RATIOS)
    clip_range_high: NonNegative | None = key("Online", None, "upper clip range; null: clip_range", stages=_RATIOS)
    dual_clip: AboveOne | None = key(
        "Online", None, "bound of the loss where the advantage is negative, times its size; null: off", stages=_RATIOS
    )
    gamma: Unit = key("PPO", 1.0, "discount", stages=("ppo", "reinforce_pp"))
    gae_lambda: Unit = key("PPO", 0.95, "lambda of generalised advantage estimation", stages=_PPO)
    clip_range_value: Positive | None = key(
        "PPO", 0.2, "value clip, in units of the scores' running standard deviation; null: off", stages=_PPO
    )
    vf_coef: NonNegative = key("PPO", 0.1, "weight of the value loss", stages=_PPO)
    critic: Literal["adapter", "head"] = key(
        "PPO", "adapter", "an adapter and head of its own, or a head on the policy", stages=_PPO
    )
    critic_learning_rate: Positive | None = key("PPO", None, "null: learning_rate", stages=_PPO)
    critic_warmup_steps: Whole | None = key(
        "PPO",
        None,
        "rollouts that train only the critic; null: 0 if it starts from a reward model, else 5",
        stages=_PPO,
    )
    whiten_advantages: bool = key("PPO", True, "advantages to mean 0, variance 1 over the rollout batch", stages=_PPO)
    whiten_rewards: bool = key("PPO", False, "rewards to variance 1 over the rollout batch", stages=_PPO)


class RatioConfig(OnlineConfig):
    """Policy gradients without a critic whose ratio may be clipped when a rollout batch is used again."""

    clip_range: Positive = key("Online", 0.2, "the ratio is clipped to 1 plus or minus this", stages=_RATIOS)
    clip_range_low: BelowOne | None = key("Online", None, "lower clip range; null: clip_range", stages=_RATIOS)
    clip_range_high: NonNegative | None = key("Online", None, "upper clip range; null: clip_range", stages=_RATIOS)
    dual_clip: AboveOne | None = key(
        "Online", None, "bound of the loss where the advantage is negative, times its size; null: off", stages=_RATIOS
    )


class GroupConfig(RatioConfig):
    """Several answers to each prompt, each measured against the others."""

    baseline: Literal["leave_one_out", "mean", "none"] = key(
        "Groups",
        "leave_one_out",
        "what is taken off a score: the mean of the others, of the group, or nothing",
        stages=_GROUPS,
    )
    advantage_norm: Literal["group", "batch", "none"] = key(
        "Groups",
        "none",
        "advantages divided by the standard deviation of the group's scores, or of the batch's",
        stages=_GROUPS,
    )
    ratio_level: Literal["token", "sequence", "sequence_mean"] = key(
        "Groups", "sequence", "what has a ratio: each token, the answer, or the answer per token (GSPO)", stages=_GROUPS
    )
    loss_reduction: Literal["token", "sequence", "constant"] = key(
        "Groups", "token", "ratio_level token: the mean over tokens, over answers of their means, or over answers of sum / limit",
        stages=_GROUPS,
    )  # fmt: skip
    dynamic_sampling: bool = key(
        "Groups",
        False,
        "groups whose scores are all equal are left out and further prompts answered instead",
        stages=_GROUPS,
    )
    dynamic_sampling_rounds: Count = key(
        "Groups", 10, "dynamic_sampling: how often further prompts are taken in one step, at most", stages=_GROUPS
    )
    mask_truncated: bool = key("Groups", False, "answers cut by the limit are not trained on", stages=_GROUPS)


class RlooConfig(GroupConfig):
    """REINFORCE with a leave-one-out baseline."""

    stage: Literal["rloo"] = key("Stage", "rloo", "what to train")

    group_size: Count = key("Online", 4, "answers per prompt", stages=ONLINE)


PRESETS: dict[str, dict[str, Any]] = {
    "grpo": {},
    "dr_grpo": {"advantage_norm": "none", "loss_reduction": "constant", "kl_coef": 0.0},
    "dapo": {
        "clip_range_high": 0.28,
        "loss_reduction": "token",
        "kl_coef": 0.0,
        "dynamic_sampling": True,
        "mask_truncated": True,
        "missing_eos_penalty": 0.0,
        "overlong_buffer": 1024 // 5,  # a fifth of the longest answer
    },
    "gspo": {"ratio_level": "sequence_mean", "clip_range_low": 3e-4, "clip_range_high": 4e-4, "kl_coef": 0.0},
    "cispo": {"policy_objective": "cispo", "loss_reduction": "token", "kl_coef": 0.0},
}
"""What each name of `preset` sets apart from the defaults of stage grpo."""


class GrpoConfig(GroupConfig):
    """Group-relative policy optimisation and its kin."""

    preset: Literal["grpo", "dr_grpo", "dapo", "gspo", "cispo"] = key(
        "Groups", "grpo", "a named variant: sets the defaults of other keys; what the file writes wins", stages=_GRPO
    )
    stage: Literal["grpo"] = key("Stage", "grpo", "what to train")

    group_size: Count = key("Online", 8, "answers per prompt", stages=ONLINE)
    kl_coef: NonNegative = key(
        "Online",
        lambda d: 0.04 if d.get("kl_target") is None else 0.2,
        "weight of the KL to the reference; start value when adaptive (then 0.2)",
        stages=ONLINE,
    )
    kl_placement: Literal["reward", "loss"] = key("Online", "loss", "where the KL enters", stages=ONLINE)
    kl_estimator: Literal["k1", "k2", "k3"] = key("Online", "k3", "estimator of the KL", stages=ONLINE)
    baseline: Literal["leave_one_out", "mean", "none"] = key(
        "Groups", "mean", "what is taken off a score: the mean of the others, of the group, or nothing", stages=_GROUPS
    )
    advantage_norm: Literal["group", "batch", "none"] = key(
        "Groups", "group",
        "advantages divided by the standard deviation of the group's scores, or of the batch's", stages=_GROUPS,
    )  # fmt: skip
    ratio_level: Literal["token", "sequence", "sequence_mean"] = key(
        "Groups", "token", "what has a ratio: each token, the answer, or the answer per token (GSPO)",
        stages=_GROUPS,
    )  # fmt: skip
    loss_reduction: Literal["token", "sequence", "constant"] = key(
        "Groups", "sequence",
        "ratio_level token: the mean over tokens, over answers of their means, or over answers of sum / limit", stages=_GROUPS,
    )  # fmt: skip
    policy_objective: Literal["clip", "cispo"] = key(
        "Groups",
        "clip",
        "the clipped surrogate, or CISPO's clipped weight on log p",
        stages=_GRPO,
    )
    cispo_cap: Positive = key("Groups", 5.0, "cispo: the largest weight", stages=_GRPO)

    def origin(self, name: str) -> str:
        """As for every stage; what the file leaves to the preset is `preset: NAME`."""
        found = super().origin(name)
        steered = name == "kl_coef" and self.kl_target is not None  # its start is then not the preset's
        chosen = found == "default" and name in PRESETS[self.preset] and not steered
        return f"preset: {self.preset}" if chosen else found

    @model_validator(mode="before")
    @classmethod
    def _fill_preset(cls, values: Any) -> Any:
        """What the file does not write is the preset's."""
        if not isinstance(values, Mapping):
            return values
        chosen = PRESETS.get(str(values.get("preset") or "grpo"), {})
        limit = values.get("max_new_tokens") or values.get("max_length") or 1024
        filled = {name: value for name, value in chosen.items() if values.get(name) is None}
        if values.get("kl_target") is not None:
            filled.pop("kl_coef", None)
        if "overlong_buffer" in filled and str(limit).isdecimal():
            filled["overlong_buffer"] = int(limit) // 5
        return {**values, **filled}


class ReinforcePpConfig(RatioConfig):
    """REINFORCE++: rewards to go, normalised over the batch."""

    stage: Literal["reinforce_pp"] = key("Stage", "reinforce_pp", "what to train")

    gamma: Unit = key("PPO", 1.0, "discount", stages=("ppo", "reinforce_pp"))


class RemaxConfig(OnlineConfig):
    """ReMax: the score of the greedy answer is the baseline."""

    stage: Literal["remax"] = key("Stage", "remax", "what to train")


class RaftConfig(OnlineConfig):
    """RAFT: the best of the policy's own answers is imitated."""

    stage: Literal["raft"] = key("Stage", "raft", "what to train")

    group_size: AtLeastTwo = key("Online", 4, "answers per prompt", stages=ONLINE)


class OnlineDpoConfig(OnlineConfig):
    """DPO on the best and the worst of the policy's own answers."""

    stage: Literal["online_dpo"] = key("Stage", "online_dpo", "what to train")

    group_size: Count = key("Online", 4, "answers per prompt", stages=ONLINE)
    kl_coef: NonNegative = key("Online", 0.0, "refused here: pref_beta is the weight of the KL", stages=ONLINE)
    pref_beta: Positive = key(
        "Preferences", 0.1, "weight of the KL to the reference", stages=(*_PREFERENCE, "online_dpo")
    )
    dpo_label_smoothing: BelowHalf = key(
        "Preferences",
        0.0,
        "share of labels taken to be the wrong way round",
        stages=("dpo", "online_dpo"),
    )


class InferConfig(StageConfig):
    """Chat, predict, export and scoring: a file without `do_train`."""


MODELS: dict[str, type[StageConfig]] = {
    "pt": PtConfig,
    "sft": SftConfig,
    "rm": RmConfig,
    "dpo": DpoConfig,
    "kto": KtoConfig,
    "orpo": OrpoConfig,
    "simpo": SimpoConfig,
    "ppo": PpoConfig,
    "rloo": RlooConfig,
    "grpo": GrpoConfig,
    "reinforce_pp": ReinforcePpConfig,
    "remax": RemaxConfig,
    "raft": RaftConfig,
    "online_dpo": OnlineDpoConfig,
    "infer": InferConfig,
}
