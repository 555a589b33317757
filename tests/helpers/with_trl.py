"""Run by test_elsewhere.py: TRL's GRPOTrainer with our kernels gives TRL's losses, gradients, metrics and weights."""

import copy

import pytest
import torch
from torch import nn

import vtfast  # noqa: F401  mends torchvision where it cannot load, before TRL asks for it

trl = pytest.importorskip("trl")

from vtfast.integrations.trl import use_fused_loss  # noqa: E402

ROWS, G, T = 4, 2, 6


@pytest.fixture(scope="module")
def made(prompts, policy):
    """A model and a padded batch with TRL's names: images, rows of unequal length, a tool's tokens left out."""
    from torch.nn.utils.rnn import pad_sequence

    asked = [prompts[0], prompts[0], prompts[3], prompts[3]]
    ids = pad_sequence([p.ids.flip(0) for p in asked], batch_first=True).flip(1)
    mask = pad_sequence([torch.ones_like(p.ids) for p in asked], batch_first=True).flip(1)
    generator = torch.Generator().manual_seed(0)
    completions = torch.randint(4, 90, (ROWS, T), generator=generator)
    lengths = torch.tensor([6, 1, 4, 5])
    image = policy.module.config.image_token_id
    kinds = torch.cat([ids == image, torch.zeros_like(completions)], 1).long()

    def noise(scale):
        return scale * torch.randn(ROWS, T, generator=generator)

    kept = (torch.arange(T) < lengths[:, None]).long()
    batch = {
        "prompt_ids": ids,
        "prompt_mask": mask,
        "completion_ids": completions,
        "completion_mask": kept,
        "tool_mask": torch.ones_like(kept).index_fill(1, torch.tensor([2]), 0),
        "advantages": torch.tensor([1.0, -0.5, 0.7, -1.2]),
        "num_items_in_batch": kept.sum(),
        "pixel_values": torch.cat([p.pixels for p in asked]),
        "image_grid_thw": torch.cat([p.grid for p in asked]),
        "mm_token_type_ids": kinds,
        "num_images": [1] * ROWS,
    }
    return policy.module, batch, noise


def trainer_of(module, tmp_path, dataset=None, processing=None, **settings):
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast

    from vtfast.model.tiny_model import build_tokenizer

    arguments = trl.GRPOConfig(
        output_dir=str(tmp_path),
        per_device_train_batch_size=ROWS,
        num_generations=G,
        max_completion_length=T,
        report_to=[],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        disable_dropout=True,
        **settings,
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=build_tokenizer(), eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    )
    module = copy.deepcopy(module).train()
    module.set_attn_implementation("sdpa")
    trainer = trl.GRPOTrainer(
        model=module,
        reward_funcs=lambda completions, **_: [float(len(text) % 5) for text in completions],
        args=arguments,
        train_dataset=dataset or Dataset.from_list([{"prompt": "how many"}] * ROWS),
        processing_class=tokenizer,
    )
    trainer.current_gradient_accumulation_steps = settings.get("gradient_accumulation_steps", 1)
    return trainer


def result(trainer, batch):
    trainer.model.zero_grad()
    loss = trainer._compute_loss(trainer.model, dict(batch))
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in trainer.model.named_parameters()}
    metrics = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    return float(loss.detach()), gradients, metrics


def check_alike(one, other):
    # Two fp32 sums in different orders: vespo's exponents make 1.3e-5 of it on some CPUs.
    assert one[0] == pytest.approx(other[0], rel=2e-5, abs=2e-6)
    for name, gradient in other[1].items():
        assert torch.allclose(one[1][name], gradient, rtol=1e-3, atol=2e-6), name
    assert one[2] == pytest.approx(other[2], rel=1e-4, abs=1e-6)


LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")
CASES = [(name, {}) for name in LOSSES] + [
    ("grpo", {"beta": 0.04}),
    ("dapo", {"beta": 0.1, "use_bias_correction_kl": True, "gradient_accumulation_steps": 2}),
    ("grpo", {"importance_sampling_level": "sequence", "temperature": 0.7}),
    ("bnpo", {"delta": 1.5, "epsilon_high": 0.28, "gradient_accumulation_steps": 4}),
    ("vespo", {"vespo_k_pos": 1.5}),
]


@pytest.mark.parametrize(("loss_type", "settings"), CASES)
def test_losses_gradients_and_metrics_are_trls(made, tmp_path, loss_type, settings):
    module, batch, noise = made
    theirs = trainer_of(module, tmp_path / "theirs", loss_type=loss_type, **settings)
    ours = use_fused_loss(trainer_of(module, tmp_path / "ours", loss_type=loss_type, **settings))
    assert ours._compute_loss.__class__.__name__ == "partial", "the loss is not the kernel's"
    with torch.no_grad():
        batch = dict(batch)
        logp, *_ = theirs._get_per_token_logps_and_entropies(
            theirs.model,
            torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1),
            torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1),
            T,
            **{name: batch[name] for name in ("pixel_values", "image_grid_thw", "mm_token_type_ids", "num_images")},
        )
    batch["old_per_token_logps"] = logp + noise(0.3)
    batch["ref_per_token_logps"] = logp + noise(0.3)
    check_alike(result(ours, batch), result(theirs, batch))
    del batch["old_per_token_logps"]  # on-policy
    check_alike(result(ours, batch), result(theirs, batch))


@pytest.mark.parametrize("settings", [{"top_entropy_quantile": 0.5}, {"entropy_coef": 0.01}])
def test_what_the_kernels_lack_runs_trls_formula_on_fused_logprobs(made, tmp_path, settings, caplog):
    module, batch, _ = made
    theirs = trainer_of(module, tmp_path / "theirs", **settings)
    with caplog.at_level("WARNING", "vtfast"):
        ours = use_fused_loss(trainer_of(module, tmp_path / "ours", **settings))
    assert "the kernels lack" in caplog.text
    calls = []
    import vtfast.integrations.trl as here

    with pytest.MonkeyPatch.context() as patch:
        fused = here.linear_logprob
        patch.setattr(here, "linear_logprob", lambda *a, **k: calls.append(1) or fused(*a, **k))
        mine = result(ours, batch)
    assert calls
    check_alike(mine, result(theirs, batch))


def test_a_training_of_trls_ends_in_the_same_weights(made, tmp_path):
    """Two optimizer steps, generation and reference model included; text prompts, which TRL can tokenize here."""
    module, _, _ = made
    settings = dict(max_steps=2, beta=0.04, learning_rate=1e-3, seed=1, save_strategy="no")
    weights = []
    for name, wrap in (("theirs", lambda t: t), ("ours", use_fused_loss)):
        trainer = wrap(trainer_of(module, tmp_path / name, **settings))
        trainer.train()
        weights.append({n: p.detach().clone() for n, p in trainer.model.named_parameters()})
    start = dict(module.named_parameters())
    moved = sum(float((weights[0][n] - start[n].detach()).abs().sum()) for n in start)
    assert moved > 0
    for name, value in weights[0].items():
        assert torch.allclose(weights[1][name], value, atol=2e-5), name


def test_other_versions_and_other_heads_are_refused_by_name(made, tmp_path, monkeypatch):
    import vtfast.integrations.trl as here

    trainer = trainer_of(made[0], tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(here, "version", lambda name: "1.17.2")
        with pytest.raises(ValueError, match=r"1\.17\.2 is installed.* supports 1\.16"):
            use_fused_loss(trainer)
    trainer.model.lm_head = nn.Linear(4, 5)
    with pytest.raises(ValueError, match="its head is a Linear; it must be a bias-free"):
        use_fused_loss(trainer)
