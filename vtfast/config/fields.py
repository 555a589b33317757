"""The settings, section by section. The text under a field is its help."""

from __future__ import annotations

from dataclasses import dataclass, field

SCHEDULES = ("linear", "cosine", "constant", "constant_with_warmup")
ATTENTION = ("auto", "flash_attn_3", "flash_attn", "varlen", "sdpa")
DECODE_ATTENTION = ("auto", "flash_attn_3", "flash_attn", "triton", "varlen", "torch")
FREEZABLE = ("vision", "merger", "language", "embeddings")


@dataclass
class Task:
    """What is trained, and what it is asked."""

    recipe: str = "tiny-spatial"
    """Name of the recipe that these settings started from."""

    # What is trained
    model: str = "tiny-spatial-base"
    """Folder or hub id of a Qwen2-VL, Qwen2.5-VL, or (for questions without images) Qwen2, Qwen2.5 or Qwen3;
    `tiny-spatial-base` ships with vtfast."""
    freeze: list[str] = field(default_factory=list)
    """Parts that get no gradient: any of vision, merger, language, embeddings."""
    dtype: str = "auto"
    """float32, bfloat16, or auto: bfloat16 on CUDA and float32 on the CPU."""
    device: str = "auto"
    """cpu, cuda, or auto: cuda where there is one."""
    ddp_timeout: int = 1800
    """Seconds that a rank waits for the others in a collective before the run fails."""
    rank_timeout: float = 600.0
    """Seconds without progress after which a rank counts as hung and the run ends, naming it; 0: never, and a rank's
    death is no business of the others. Progress is a step of decoding, a reward's score, a pass of the update; loading,
    saving and vLLM's rollouts may take as long as they like. Lower it to what your slowest reward needs."""
    cpu_threads: int | None = None
    """Threads of each rank on the CPU; none shares the cores out among the ranks."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: a third of their memory, a fifth more time (`bench update`, CPU)."""
    attn_implementation: str = "auto"
    """Attention over packed rows: flash_attn_3, flash_attn, varlen (PyTorch's), sdpa; auto takes the first usable."""
    use_liger_kernel: bool = True
    """Liger's norms, SwiGLU and rotation in place of Hugging Face's. On CUDA alone; the CPU does without."""
    use_peft: bool = False
    """Train LoRA adapters instead of the weights; the model without them is the reference."""
    lora_r: int = 16
    """Rank of the adapters."""
    lora_alpha: int = 32
    """Scale of the adapters: their output is multiplied by lora_alpha / lora_r."""
    lora_target_modules: list[str] = field(
        default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
    """Names of the linear layers that get an adapter."""

    # What it is asked
    data: str = "synthetic"
    """Questions: a parquet, JSONL or JSON file, a folder, or a hub id; `synthetic` renders its own."""
    split: str | None = None
    """Split to train on, where `data` has several; none means train."""
    eval_data: str | None = None
    """Held-out rows in the same forms, asked before and after training; none skips that."""
    eval_split: str | None = "val"
    """Split of `eval_data`, where it has several; a lone file is taken whatever its name."""
    first_n: int | None = None
    """Use only the first N good rows of `data`; none means all."""
    first_rows: int | None = None
    """Read only the first N rows of `data`, good or not; none means all. VisualThinker's 15,000 are counted so."""
    static: bool = False
    """Use only rows with exactly one image: VisualThinker's rule for SAT's static questions."""
    question_types: list[str] | None = None
    """Use only rows whose column `question_type` is one of these; none means all. SAT's static rows are `other`."""
    question_column: str | None = None
    """Column of the question, in `data` and `eval_data`; none recognises published sets, as for the next three."""
    answer_column: str | None = None
    """Column of the right answer: text or a number, bare or inside `<answer> </answer>`."""
    options_column: str | None = None
    """Column of the list of options; a set or a row without it asks open questions."""
    image_column: str | None = None
    """Column of the image or images: paths, encoded bytes, or both; a set or a row without it is text alone."""
    eval_samples: int = 400
    """Number of held-out questions."""
    template: str = "r1-zero"
    """Prompt template: a name in vtfast/data/templates, or the path of a text file."""
    literal_image: bool = False
    """Write the text `<image>` behind the images, as VisualThinker's prompts do by an oversight (for parity)."""
    min_pixels: int = 3136
    """Smallest image area in pixels; smaller images are enlarged."""
    max_pixels: int = 12845056
    """Largest image area in pixels; larger images are shrunk. One merged token covers 28 x 28 pixels."""
    max_prompt_length: int = 1024
    """Longest prompt in tokens, image tokens counted. Longer ones are bad samples, never truncated."""
    on_bad_sample: str = "skip"
    """skip (report, count, go on) or error (stop at the first)."""


@dataclass
class GRPO:
    """What GRPO alone has: sampled answers, their rewards and the loss."""

    # How it answers
    num_generations: int = 8
    """G, completions sampled per prompt; their rewards are compared with each other."""
    max_completion_length: int = 256
    """Most tokens in a completion."""
    temperature: float = 1.0
    """Sampling temperature; the loss uses the same one."""
    top_k: int = 0
    """Sample among the k most probable tokens; 0 means all. This and the next three are a slower path that holds the
    logits, and bend what is sampled but not the loss; the original sampled with 50, by transformers' default then."""
    top_p: float = 1.0
    """Sample among the most probable tokens that together reach this probability."""
    min_p: float = 0.0
    """Sample among tokens with at least this share of the most probable one's probability."""
    repetition_penalty: float = 1.0
    """Above 1, tokens of the prompt and of the answer so far become less likely."""
    sampler_drift_warning: float = 0.1
    """Warn when the sampler's and the trainer's log-probs of a step differ by more than this on average. This and the
    next two are said once, when a step leaves the bound, and again only after one that kept to it."""
    kl_warning: float = 1.0
    """Warn when the policy is further than this from the reference model, in nats a token (beta > 0)."""
    entropy_warning: float = 0.01
    """Warn when the mean entropy of a token falls below this, in nats: the answers to a question are then all alike."""

    # What is good
    reward_funcs: list[str] = field(default_factory=lambda: ["accuracy", "format"])
    """Rewards, by name (accuracy, format, length) or as `module:function`; the total is their weighted sum."""
    reward_weights: list[float] | None = None
    """One weight per reward; none means 1 each."""
    reward_mode: str = "strict"
    """strict, or recipe: the decisions of VisualThinker's code, its accidents included (vtfast/rewards/recipe.py)."""
    reward_timeout: float = 10.0
    """Seconds for one call of a reward in a process of its own; one that takes longer scores 0."""
    reward_workers: int = 4
    """Most such processes of a rank, for user functions and math-verify; 0 runs these in the trainer, without limit."""
    scale_rewards: str = "group"
    """What advantages are divided by: group (standard deviation of the G), batch, or none."""

    # The loss
    loss_type: str = "grpo"
    """grpo, bnpo, dr_grpo, dapo, cispo, sapo, luspo or vespo."""
    importance_sampling_level: str = "token"
    """token, or sequence (GSPO)."""
    beta: float = 0.0
    """Weight of the KL divergence from the starting model; 0 loads no reference model."""
    epsilon: float = 0.2
    """Lower clip range of the importance ratio."""
    epsilon_high: float | None = None
    """Upper clip range; none means epsilon."""
    delta: float | None = None
    """Upper bound of the ratio for negative advantages (two-sided clip); none means no bound."""
    num_iterations: int = 1
    """Optimizer steps per rollout. Above 1 the policy's log-probs at the time of the rollout are scored once."""
    offload_reference: bool = False
    """Keep the reference model in CPU memory between uses."""
    vllm_importance_sampling_correction: bool = False
    """Weigh tokens by exp(policy's - sampler's own log-prob). TRL's name; here both come from the same weights."""
    vllm_importance_sampling_mode: str = "sequence_mask"
    """token_truncate (TIS), token_mask, sequence_truncate or sequence_mask."""
    vllm_importance_sampling_clip_max: float | None = 3.0
    """Upper bound of that weight; none means no bound."""
    vllm_importance_sampling_clip_min: float | None = None
    """Lower bound of that weight; none means no bound."""

    # What it says of its speed
    roofline_steps: int = 10
    """Say every N steps how near to the device's limits each phase runs (vtfast/cost/roofline.py); 0 means never."""
    roofline_rates: str = "data_sheet"
    """The limits: data_sheet (A100, H100 and H200, and nothing is said of other devices) or measured (a matmul and a
    copy on the device at hand, before the first step)."""


@dataclass
class Rollout:
    """What sampling runs on."""

    rollout_max_rows: int = 512
    """Most completions in flight at once on a rank; the others wait. It changes memory and speed, never the result."""
    rollout_cache_tokens: int | None = None
    """Size of the key-value cache; none means what a rollout needs, up to a share of the free memory."""
    rollout_keep_cache: bool = True
    """Keep cache and CUDA graphs between rollouts; false frees them for the update and builds them anew each time."""
    rollout_attention: str = "auto"
    """Attention of a decode step: flash_attn_3, flash_attn, triton, varlen, torch; auto takes the first usable."""
    use_vllm: bool = False
    """Sample with vLLM, colocated on each rank's GPU, instead of the engine that shares the trainer's weights."""
    vllm_gpu_memory_utilization: float = 0.3
    """Share of the GPU's memory that vLLM takes while it is awake."""
    vllm_enable_sleep_mode: bool = True
    """Put vLLM to sleep between rollouts, so that the update has its memory."""


@dataclass
class SFT:
    """What supervised fine-tuning alone has."""

    target: str = "{answer}"
    """What the model is to answer: text with the slot {answer}, or the path of a .txt file of such text. The end mark
    follows by itself: `<|im_end|>` behind a chat template, else the tokenizer's own; not if the text writes one."""
    completion_only_loss: bool = True
    """Train on the target alone. false: on the prompt's text as well, image tokens and their two marks left out."""
    num_train_epochs: float = 1.0
    """Passes over the data, where max_steps is none. The last step is filled up from the pass after them."""
    max_completion_length: int = 256
    """Longest target in tokens; longer ones are bad samples, never truncated. Also of held-out answers."""
    temperature: float = 1.0
    """Sampling temperature of the held-out answers that are not greedy. The loss has none."""


@dataclass
class Optimizer:
    """How it learns."""

    learning_rate: float = 1e-6
    """Peak learning rate of AdamW."""
    lr_scheduler_type: str = "linear"
    """Schedule after the warm-up: linear (to zero), cosine, constant or constant_with_warmup, as in transformers."""
    warmup_steps: int = 0
    """Optimizer steps over which the learning rate rises from zero."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay."""
    adam_beta1: float = 0.9
    """AdamW's first decay rate."""
    adam_beta2: float = 0.999
    """AdamW's second decay rate."""
    adam_epsilon: float = 1e-8
    """AdamW's denominator floor."""
    max_grad_norm: float = 1.0
    """Global gradient norm is clipped to this; 0 switches it off."""
    max_steps: int = 200
    """Optimizer steps."""
    max_nonfinite_steps: int = 3
    """Stop after so many steps in a row that had to be left out: a loss or gradient was not finite, or no question
    could be used. nonfinite.jsonl lists them; fewer are counted, and training goes on as if they had not been."""
    per_device_train_batch_size: int = 1
    """Prompts of one rank in a pass (their G completions come with them)."""
    gradient_accumulation_steps: int = 1
    """Multiplies the batch. Prompts per step = ranks x per_device_train_batch_size x this."""
    token_budget: int | None = None
    """Most tokens in one packed pass (a longer prompt with one completion goes alone). It changes memory and speed,
    never the result. None: as many as per_device_train_batch_size prompts with their completions can have at most."""
    num_processes: int | None = None
    """Ranks that the recipe was written for. Another number runs, with a warning that the batch differs."""
    seed: int = 0
    """Seed of the data order, the order of options, the rendered questions, the sampling (with the step, the prompt and
    the number of the answer) and LoRA's adapters. Nothing else is random: models are never initialised here."""
    deterministic: bool = False
    """Bitwise equal runs from the same settings, machine, packages and number of ranks: metrics but for times, speeds
    and memory, completions and weights. The CPU gives them anyway (cpu_threads counts as a setting); on CUDA this takes
    the ordered way of every library, which is slower in the backward pass of attention and of embeddings, and any
    operation without one is an error that names it. A reward that runs into reward_timeout, or is random itself, is
    beyond it."""


@dataclass
class Output:
    """What is left behind."""

    output_dir: str | None = None
    """Run folder; must be new or empty, or a run that is resumed. None means runs/RECIPE, then runs/RECIPE-2 and so
    on."""
    save_steps: int = 100
    """Write a checkpoint every N steps and at the end; 0 means at the end only. With num_iterations above 1 a
    checkpoint waits for the step before the next answers."""
    save_total_limit: int | None = None
    """Keep only the newest N whole checkpoints; none keeps all."""
    async_save: bool = False
    """Write checkpoints while training goes on, from a copy in CPU memory."""
    on_save_error: str = "stop"
    """What a checkpoint or a log that cannot be written (disk full) does: stop the run, or continue it with a warning.
    The last whole checkpoint stays either way."""
    resume_from_checkpoint: str | None = None
    """Go on from a checkpoint: `last`, the newest whole one in output_dir (if there is none, start), or a path; with
    a new output_dir the run forks. The checkpoint's settings hold, flags on top, unless a recipe or config is given."""
    report_to: list[str] = field(default_factory=lambda: ["tensorboard"])
    """tensorboard, wandb, trackio, or none."""
