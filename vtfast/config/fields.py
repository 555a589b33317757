"""The settings of a run, section by section. The docstring under a field is its help; `{choices}` in it stands for the
values that its type allows."""

from __future__ import annotations

import re
from typing import Literal, get_args

from pydantic import Field, field_validator
from vtfast_kernels.loss_types import LossType, SamplerMode

from vtfast.config.section import Section
from vtfast.config.values import BadValue

Freezable = Literal["vision", "merger", "language", "embeddings"]
Schedule = Literal["linear", "cosine", "constant", "constant_with_warmup"]
Attention = Literal["auto", "flash_attn_3", "flash_attn_4", "flash_attn", "varlen", "sdpa"]
DecodeAttention = Literal["auto", "flash_attn_3", "flash_attn", "triton", "varlen", "torch"]

FREEZABLE: tuple[str, ...] = get_args(Freezable)


class Task(Section):
    """The model, and the data that it is trained on."""

    recipe: str = "tiny-spatial"
    """Name of the recipe that these settings started from."""

    @field_validator("recipe")
    @classmethod
    def _names_a_run_folder(cls, name: str) -> str:
        if not re.fullmatch(r"\w[\w.-]*", name):
            raise BadValue(
                name, "must be a plain name: a run folder is named after it, so it must not hold slashes or spaces"
            )
        return name

    # The model
    model: str = "tiny-spatial-base"
    """Folder or hub id of a Qwen2-VL, Qwen2.5-VL, or (for questions without images) Qwen2, Qwen2.5 or Qwen3;
    `tiny-spatial-base` ships with vtfast."""
    freeze: list[Freezable] = Field(default=[])
    """Parts that get no gradient: any of {choices}."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """float32, bfloat16, or auto: bfloat16 on CUDA and float32 on the CPU."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """cpu, cuda, or auto: cuda if there is a GPU."""
    ddp_timeout: int = Field(default=1800, ge=1)
    """Seconds that a rank waits for the others in a collective before the run fails."""
    rank_timeout: float = Field(default=600.0, ge=0)
    """Seconds without progress after which a rank counts as hung: the run ends and names it. 0 disables the watchdog
    for hung and dead ranks. Progress is a decode step, a reward's score or a micro-batch of the update; loading, saving
    and vLLM's rollouts have no limit. Lower it to what your slowest reward needs."""
    cpu_threads: int | None = Field(default=None, ge=1)
    """Threads of each rank on the CPU; none divides the cores among the ranks."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: a third of their memory, a fifth more time (`bench update`, CPU)."""
    attn_implementation: Attention = "auto"
    """Attention over packed rows: {choices}. auto takes the first usable one; varlen is PyTorch's own."""
    use_liger_kernel: bool = True
    """Liger's norms, SwiGLU and rotation in place of Hugging Face's. On CUDA only; the CPU uses Hugging Face's."""
    use_peft: bool = False
    """Train LoRA adapters instead of the weights; the model without them is the reference."""
    lora_r: int = Field(default=16, ge=1)
    """Rank of the adapters."""
    lora_alpha: int = Field(default=32, ge=1)
    """Scale of the adapters: their output is multiplied by lora_alpha / lora_r."""
    lora_target_modules: list[str] = Field(
        default=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
    """Names of the linear layers that get an adapter."""

    # The data
    data: str = "synthetic"
    """Training data: a parquet, JSONL or JSON file, a folder, or a hub id; `synthetic` renders its own questions."""
    split: str | None = None
    """Split to train on, if `data` has several; none means train."""
    eval_data: str | None = None
    """Held-out data in the same formats, evaluated before and after training; none skips the evaluation."""
    eval_split: str | None = "val"
    """Split of `eval_data`, if it has several; a single file is used whatever its name."""
    first_n: int | None = Field(default=None, ge=1)
    """Use only the first N valid rows of `data`; none means all."""
    first_rows: int | None = Field(default=None, ge=1)
    """Read only the first N rows of `data`, valid or not; none means all. VisualThinker counts its 15,000 this way."""
    static: bool = False
    """Use only rows with exactly one image: VisualThinker's rule for SAT's static questions."""
    question_types: list[str] | None = Field(default=None, min_length=1)
    """Use only rows whose column `question_type` is one of these; none means all. SAT's static rows are `other`."""

    question_column: str | None = None
    """Column of the question, in `data` and `eval_data`. none (here and below) recognises published data sets."""
    answer_column: str | None = None
    """Column of the right answer: text or a number, bare or inside `<answer> </answer>`."""
    options_column: str | None = None
    """Column of the list of options; a data set or a row without it has open questions."""
    image_column: str | None = None
    """Column of the image or images: paths, encoded bytes, or both; a data set or a row without it is text only."""
    eval_samples: int = Field(default=400, ge=1)
    """Number of held-out questions."""
    template: str = "r1-zero"
    """Prompt template: a name in vtfast/data/templates, or the path of a text file."""
    literal_image: bool = False
    """Write the text `<image>` after the images, as VisualThinker's prompts do by mistake (for parity)."""
    min_pixels: int = Field(default=3136, ge=1)
    """Smallest image area in pixels; smaller images are enlarged."""
    max_pixels: int = 12845056
    """Largest image area in pixels; larger images are shrunk. One merged token covers 28 x 28 pixels."""
    max_prompt_length: int = Field(default=1024, ge=1)
    """Longest prompt in tokens, image tokens included. Longer ones are bad samples and never truncated."""
    on_bad_sample: Literal["skip", "error"] = "skip"
    """skip (report and count it, then continue) or error (stop at the first)."""


class GRPO(Section):
    """Settings of GRPO alone: sampling, rewards and the loss."""

    # Sampling
    num_generations: int = Field(default=8, ge=1)
    """G, completions sampled per prompt; their rewards are compared with each other."""

    @field_validator("num_generations")
    @classmethod
    def _is_a_group(cls, number: int) -> int:
        if number == 1:
            raise BadValue(number, "a group of one completion has no advantage; use 2 or more")
        return number

    max_completion_length: int = Field(default=256, ge=1)
    """Maximum number of tokens in a completion."""
    temperature: float = Field(default=1.0, gt=0)
    """Sampling temperature; the loss uses the same one."""
    top_k: int = Field(default=0, ge=0)
    """Sample among the k most probable tokens; 0 means all. This and the next three settings use a slower path that
    keeps the logits. They change the sampling, not the loss. The original used 50, transformers' default then."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Sample among the most probable tokens that together reach this probability."""
    min_p: float = Field(default=0.0, ge=0, le=1)
    """Sample among tokens with at least this share of the most probable one's probability."""
    repetition_penalty: float = Field(default=1.0, gt=0)
    """Above 1, tokens of the prompt and of the completion so far become less likely."""
    sampler_drift_warning: float = Field(default=0.1, ge=0)
    """Warn when the sampler's and the trainer's log-probs of a step differ by more than this on average. This warning
    and the next two appear once, when a step leaves the bound, and again only after a step within it."""
    kl_warning: float = Field(default=1.0, ge=0)
    """Warn when the policy is further than this from the reference model, in nats per token (beta > 0)."""
    entropy_warning: float = Field(default=0.01, ge=0)
    """Warn when the mean entropy of a token falls below this, in nats: all completions of a prompt are then alike."""

    # Rewards
    reward_funcs: list[str] = Field(default=["accuracy", "format"], min_length=1)
    """Rewards, by name (accuracy, format, length) or as `module:function`; the total is their weighted sum."""

    @field_validator("reward_funcs")
    @classmethod
    def _names_each_reward_once(cls, names: list[str]) -> list[str]:
        twice = [name for name in dict.fromkeys(names) if names.count(name) > 1]
        if twice:
            raise BadValue(", ".join(twice), "is named twice; name it once, with a weight in --reward_weights")
        return names

    reward_weights: list[float] | None = None
    """One weight per reward; none means 1 each."""
    reward_mode: Literal["strict", "recipe"] = "strict"
    """strict, or recipe: the same decisions as VisualThinker's code, including its mistakes
    (vtfast/rewards/visualthinker.py)."""
    reward_timeout: float = Field(default=10.0, gt=0)
    """Time limit in seconds for one call of a reward in a worker process; a call that takes longer scores 0."""
    reward_workers: int = Field(default=4, ge=0)
    """Maximum number of these processes per rank, for user functions and math-verify; 0 runs them in the trainer,
    without a time limit."""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """Divide advantages by the standard deviation of the group's rewards, of the batch's rewards, or not (none)."""

    # The loss
    loss_type: LossType = "grpo"
    """The loss: {choices}."""
    importance_sampling_level: Literal["token", "sequence"] = "token"
    """token, or sequence (GSPO)."""
    beta: float = Field(default=0.0, ge=0)
    """Weight of the KL divergence from the starting model; 0 loads no reference model."""
    epsilon: float = Field(default=0.2, ge=0)
    """Lower clip range of the importance ratio."""
    epsilon_high: float | None = Field(default=None, ge=0)
    """Upper clip range; none means epsilon."""
    delta: float | None = Field(default=None, gt=0)
    """Upper bound of the ratio for negative advantages (two-sided clip); none means no bound."""
    num_iterations: int = Field(default=1, ge=1)
    """Optimizer steps per rollout. Above 1 the policy's log-probs at the time of the rollout are scored once."""
    sparse_tau: float = Field(default=0.0, ge=0, lt=1)
    """Above 0, tokens with at most this probability outside a few columns of the vocabulary leave the other columns out
    of the gradient: it is then approximate, with a certified bound; what that gains on real models is unmeasured."""
    offload_reference: bool = False
    """Keep the reference model in CPU memory between uses."""
    vllm_importance_sampling_correction: bool = False
    """Weigh tokens by exp(policy's - sampler's own log-prob). TRL's name; here both come from the same weights."""
    vllm_importance_sampling_mode: SamplerMode = "sequence_mask"
    """How that weight is bounded: {choices}. token_truncate is TIS."""
    vllm_importance_sampling_clip_max: float | None = 3.0
    """Upper bound of that weight; none means no bound."""
    vllm_importance_sampling_clip_min: float | None = None
    """Lower bound of that weight; none means no bound."""

    # Logged speed
    roofline_steps: int = Field(default=10, ge=0)
    """Log every N steps how near to the device's limits each phase runs (vtfast/cost/roofline.py); 0 means never."""
    roofline_rates: Literal["data_sheet", "measured"] = "data_sheet"
    """The limits: data_sheet (A100, H100 and H200, no other device) or measured (a matmul and a copy
    on the device in use, before the first step)."""


class Rollout(Section):
    """The engine that samples completions."""

    rollout_max_rows: int = Field(default=512, ge=1)
    """Maximum number of completions decoded at once on a rank; the others wait. Another value changes memory and
    speed; the result is the same up to floating-point rounding."""
    rollout_cache_tokens: int | None = Field(default=None, ge=1)
    """Size of the key-value cache; none means what a rollout needs, up to what the rest of
    the run leaves of the device by the estimate of --dry-run."""
    rollout_keep_cache: bool = True
    """Keep cache and CUDA graphs between rollouts; false frees them for the update and builds them anew each time."""
    rollout_attention: DecodeAttention = "auto"
    """Attention of a decode step: {choices}. auto takes the first usable one."""
    use_vllm: bool = False
    """Sample with vLLM, colocated on each rank's GPU, instead of the engine that shares the trainer's weights."""
    vllm_gpu_memory_utilization: float = Field(default=0.3, gt=0, le=1)
    """Share of the GPU's memory that vLLM takes while it is awake."""
    vllm_enable_sleep_mode: bool = True
    """Put vLLM to sleep between rollouts, so that the update has its memory."""


class SFT(Section):
    """Settings of supervised fine-tuning alone."""

    target: str = "{answer}"
    """The completion to learn: text with the slot {answer}, or the path of a .txt file of such text. The
    end-of-sequence token is added: `<|im_end|>` after a chat template, else the tokenizer's own; not if the text has
    one."""
    completion_only_loss: bool = True
    """Train on the target only. false: also on the prompt's text, without the image tokens and the vision
    tokens around them."""
    num_train_epochs: float = Field(default=1.0, gt=0)
    """Epochs, if max_steps is none. The last step is filled up from the next epoch."""
    max_completion_length: int = Field(default=256, ge=1)
    """Longest target in tokens; longer ones are bad samples and never truncated. Also the limit of held-out
    completions."""
    temperature: float = Field(default=1.0, gt=0)
    """Sampling temperature of the held-out completions that are not greedy. The loss has none."""


class Optimizer(Section):
    """The optimizer, the batch and the seed."""

    learning_rate: float = Field(default=1e-6, ge=0)
    """Peak learning rate of AdamW."""
    lr_scheduler_type: Schedule = "linear"
    """Schedule after the warm-up, as in transformers: {choices}. linear falls to zero."""
    warmup_steps: int = Field(default=0, ge=0)
    """Optimizer steps over which the learning rate rises from zero."""
    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW's decoupled weight decay."""
    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    """AdamW's first decay rate."""
    adam_beta2: float = Field(default=0.999, ge=0, lt=1)
    """AdamW's second decay rate."""
    adam_epsilon: float = Field(default=1e-8, gt=0)
    """AdamW's denominator floor."""
    max_grad_norm: float = Field(default=1.0, ge=0)
    """Global gradient norm is clipped to this; 0 switches it off."""
    max_steps: int | None = Field(default=None, ge=1)
    """Optimizer steps; none computes them from num_train_epochs."""
    max_nonfinite_steps: int = Field(default=3, ge=1)
    """Stop after this many skipped steps in a row: a loss or gradient was not finite, or no sample could be used.
    nonfinite.jsonl lists them; after fewer, training continues without their updates."""
    per_device_train_batch_size: int = Field(default=1, ge=1)
    """Prompts per rank per accumulation step. Prompts per step = ranks x this x gradient_accumulation_steps."""
    gradient_accumulation_steps: int = Field(default=1, ge=1)
    """Accumulation steps per optimizer step. They multiply the batch."""
    token_budget: int | None = Field(default=None, ge=1)
    """Maximum number of tokens in a packed micro-batch (a longer prompt with one completion gets its own). Another
    value changes memory and speed; the result is the same up to floating-point rounding. none: the most that
    per_device_train_batch_size prompts with their completions can have."""
    num_processes: int | None = Field(default=None, ge=1)
    """Number of ranks that the recipe was written for. With another number the run warns that the batch differs."""
    seed: int = Field(default=0, ge=0)
    """Seed of the data order, the order of options, the rendered questions, the sampling (with the step, the prompt and
    the number of the completion) and LoRA's adapters. Nothing else is random: models are never initialised here."""
    deterministic: bool = False
    """Bitwise equal runs from the same settings, machine, packages and number of ranks: metrics except times, speeds
    and memory, completions and weights. The CPU always gives them (cpu_threads counts as a setting). On CUDA this
    chooses the deterministic algorithm of every library, which is slower in the backward pass of attention and of
    embeddings; an operation without one is an error that names it. Rewards that reach reward_timeout, or are random
    themselves, are not covered."""


class Output(Section):
    """Checkpoints and logs."""

    output_dir: str | None = None
    """Run folder; must be new or empty, or a run that is resumed. none means runs/RECIPE, then runs/RECIPE-2 and so
    on."""
    save_steps: int = Field(default=100, ge=0)
    """Write a checkpoint every N steps and at the end; 0 means at the end only. With num_iterations above 1 a
    checkpoint waits for the last step before the next rollout."""
    save_total_limit: int | None = Field(default=None, ge=1)
    """Keep only the newest N complete checkpoints; none keeps all."""
    async_save: bool = False
    """Write checkpoints while training continues, from a copy in CPU memory."""
    on_save_error: Literal["stop", "continue"] = "stop"
    """What to do if a checkpoint or a log cannot be written (disk full): stop the run, or continue with a warning.
    The last complete checkpoint is kept either way."""
    resume_from_checkpoint: str | None = None
    """Resume from a checkpoint: a path, or `last`, the newest complete one in output_dir (without one, the run starts
    anew). With a new output_dir the run forks. Without a recipe or config, the checkpoint's settings apply, and flags
    change them."""
    report_to: list[Literal["tensorboard", "wandb", "trackio", "none"]] = Field(default=["tensorboard"])
    """Trackers: any of {choices}."""
