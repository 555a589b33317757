"""The vLLM engine against a stand-in with vLLM's names, which samples from its own copy of the model."""

import ast
import importlib.util
import inspect
import os
import subprocess
import sys
import types
import zipfile
from pathlib import Path

import pytest
import torch
from rollouts import tokens

from vtfast.config import Config
from vtfast.data.processor import Processor
from vtfast.model.adapters import add_lora
from vtfast.model.loading import load_model
from vtfast.rollout import RolloutEngine, Sampling, vllm
from vtfast.rollout.engine_factory import build_engine
from vtfast.rollout.vllm import checkpoint_weights
from vtfast.scoring import completion_logprobs
from vtfast.utils.errors import UserError

FORGET = ["forget prefixes", "forget pixels", "forget images"]


class SamplingParams:
    def __init__(
        self,
        *,
        n=1,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        min_p=0.0,
        seed=None,
        stop=None,
        stop_token_ids=None,
        ignore_eos=False,
        max_tokens=16,
        min_tokens=0,
        logprobs=None,
        repetition_penalty=1.0,
        include_stop_str_in_output=False,
    ):
        vars(self).update(locals())


class LLM:
    """What `vllm.LLM` does here, with a policy and processor of its own: nothing is shared but through its methods."""

    def __init__(
        self,
        model,
        *,
        dtype,
        tensor_parallel_size,
        gpu_memory_utilization,
        max_model_len,
        enable_sleep_mode,
        enable_prefix_caching,
        limit_mm_per_prompt,
        mm_processor_kwargs,
        distributed_executor_backend,
        logprobs_mode,
        seed,
    ):
        self.arguments = dict(locals())
        self.policy = load_model(model, dtype)
        self.processor = Processor.from_pretrained(model, **mm_processor_kwargs)
        with torch.no_grad():
            for weight in self.policy.module.parameters():
                weight.fill_(torch.nan)  # what sleep leaves: weights have to be pushed
        runner = types.SimpleNamespace(model_runner=types.SimpleNamespace(model=self))
        executor = types.SimpleNamespace(driver_worker=runner)
        self.llm_engine = types.SimpleNamespace(
            model_executor=executor, reset_encoder_cache=lambda: (self.calls.append("forget images"), self.seen.clear())
        )
        self.calls, self.seen = [], {}
        encode = self.policy.vision.features

        def features(prompts):
            """As vLLM's encoder cache: an image that has been seen is not encoded again, whatever the weights are."""
            for prompt in prompts:
                if prompt.key not in self.seen:
                    self.seen[prompt.key] = encode([prompt])
            return torch.cat([self.seen[prompt.key] for prompt in prompts])

        self.policy.vision.features = features

    def load_weights(self, weights):
        own = dict(self.policy.module.named_parameters())
        with torch.no_grad():
            for name, weight in weights:
                own[name].copy_(weight)

    def sleep(self, level):
        self.calls.append(f"sleep {level}")
        self.seen.clear()

    def wake_up(self, tags):
        self.calls.append(f"wake {tags[0]}")

    def reset_prefix_cache(self):
        self.calls.append("forget prefixes")

    def reset_mm_cache(self):
        self.calls.append("forget pixels")

    def generate(self, prompts, sampling_params, use_tqdm):
        self.calls.append("generate")
        out = []
        for request, wanted in zip(prompts, sampling_params, strict=True):
            text = self.processor.decode(request["prompt_token_ids"], keep_special=True)
            images = request.get("multi_modal_data", {}).get("image", [])
            images = images if isinstance(images, list) else [images]
            prompt = self.processor.encode(text, images)
            assert wanted.ignore_eos and wanted.stop_token_ids == list(self.policy.eos_ids)
            sampling = Sampling(
                temperature=wanted.temperature or 1.0,
                max_new_tokens=wanted.max_tokens,
                greedy=wanted.temperature == 0,
                top_k=wanted.top_k,
            )
            (group,) = RolloutEngine(self.policy).generate([prompt], wanted.n, sampling, wanted.seed)
            answers = [
                types.SimpleNamespace(
                    token_ids=tuple(c.tokens),
                    finish_reason=c.finish_reason,
                    logprobs=[{t: types.SimpleNamespace(logprob=x)} for t, x in zip(c.tokens, c.logprobs, strict=True)],
                )
                for c in group
            ]
            ids = prompt.ids.tolist()
            out.append(types.SimpleNamespace(prompt_token_ids=ids, outputs=answers))
        return out


@pytest.fixture
def fake_vllm(monkeypatch):
    module = types.ModuleType("vllm")
    module.LLM, module.SamplingParams = LLM, SamplingParams
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setenv("RANK", "0")  # as under a launcher


def engine(policy, processor, path, **changes):
    config = Config(use_vllm=True, max_prompt_length=200, max_completion_length=12, **changes)
    return build_engine(config, policy, processor, str(path), 2)


def test_completions_are_the_policys(fake_vllm, policy, processor, random_path, prompts):
    ours = engine(policy, processor, random_path)
    rolled = ours.generate(prompts, 3, Sampling(max_new_tokens=12, temperature=0.8), seed=4)
    with torch.no_grad():
        scored = completion_logprobs(policy, prompts, tokens(rolled), temperature=0.8)
    for group, logps in zip(rolled, scored, strict=True):
        assert len({tuple(c.tokens) for c in group}) == 3
        for completion, logp in zip(group, logps, strict=True):
            assert completion.logprobs == pytest.approx(logp.tolist(), abs=1e-5)
            ended = completion.tokens[-1] in policy.eos_ids
            assert completion.finish_reason == ("stop" if ended else "length")
    again = ours.generate(prompts, 3, Sampling(max_new_tokens=12, temperature=0.8), seed=4)
    assert tokens(again) == tokens(rolled)
    other = ours.generate(prompts, 3, Sampling(max_new_tokens=12, temperature=0.8), seed=5)
    assert tokens(other) != tokens(rolled)
    greedy = Sampling(max_new_tokens=8, greedy=True)
    assert tokens(ours.generate(prompts, 1, greedy)) == tokens(RolloutEngine(policy).generate(prompts, 1, greedy))
    assert ours.generate([], 3) == []


def test_it_sleeps_between_rollouts_and_is_told_of_new_weights(fake_vllm, processor, random_path, prompts):
    policy = load_model(random_path)
    ours = engine(policy, processor, random_path)
    before = tokens(ours.generate(prompts, 2, Sampling(max_new_tokens=8)))
    assert ours.llm.calls == ["sleep 2", "wake weights", *FORGET, "wake kv_cache", "generate", "sleep 2"]
    with torch.no_grad():
        policy.language_model.layers[0].mlp.down_proj.weight.mul_(-1)
    assert tokens(ours.generate(prompts, 2, Sampling(max_new_tokens=8))) != before
    awake = engine(policy, processor, random_path, vllm_enable_sleep_mode=False)
    awake.generate(prompts, 1, Sampling(max_new_tokens=2))
    assert awake.llm.calls == [*FORGET, "generate"]
    assert awake.llm.arguments["max_model_len"] == 212
    assert awake.llm.arguments["limit_mm_per_prompt"] == {"image": 2, "video": 0}


def test_a_trained_encoder_sees_every_image_again(fake_vllm, processor, random_path, prompts):
    """Without sleep nothing else clears what vLLM has computed of an image."""
    policy = load_model(random_path)
    ours = engine(policy, processor, random_path, vllm_enable_sleep_mode=False)
    sampling = Sampling(max_new_tokens=8)
    before = ours.generate(prompts, 1, sampling)
    with torch.no_grad():
        policy.vision.module.merger.mlp[2].weight.mul_(-3)
    after = ours.generate(prompts, 1, sampling)
    with torch.no_grad():
        expected = completion_logprobs(policy, prompts, tokens(after))
    for group, scores in zip(after, expected, strict=True):
        assert group[0].logprobs == pytest.approx(scores[0].tolist(), abs=1e-5)
    assert any(a[0].logprobs != b[0].logprobs for a, b in zip(before, after, strict=True))


def test_a_vllm_without_these_caches_is_refused(fake_vllm, policy, processor, random_path, monkeypatch):
    monkeypatch.delattr(LLM, "reset_mm_cache")
    with pytest.raises(UserError, match=r"vllm 0\.33 or newer is needed \(AttributeError: .*reset_mm_cache"):
        engine(policy, processor, random_path)


def test_it_falls_asleep_after_a_failure(fake_vllm, policy, processor, random_path, prompts, monkeypatch):
    ours = engine(policy, processor, random_path)
    monkeypatch.setattr(LLM, "generate", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        ours.generate(prompts, 1)
    assert ours.llm.calls[-1] == "sleep 2"
    monkeypatch.setattr(LLM, "load_weights", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        ours.generate(prompts, 1)
    assert ours.llm.calls[-2:] == ["wake weights", "sleep 2"]


def test_one_process_gets_a_launchers_environment(monkeypatch):
    environment = {"MASTER_PORT": "123"}
    monkeypatch.setattr(vllm.os, "environ", environment)
    vllm._set_rank_of_single_process()
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost"}
    assert environment == alone | {"MASTER_PORT": "123"}
    environment |= {"RANK": "3", "WORLD_SIZE": "4"}
    vllm._set_rank_of_single_process()
    assert environment["WORLD_SIZE"] == "4"


def test_adapters_are_merged_on_the_way(random_path):
    policy = load_model(random_path)
    plain = {name: p.detach().clone() for name, p in policy.module.named_parameters()}
    add_lora(policy, 4, 8, ["q_proj", "down_proj"])
    for name, parameter in policy.module.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    pushed = dict(checkpoint_weights(policy.module))
    assert pushed.keys() == plain.keys()
    merged = load_model(random_path)
    merged.module.load_state_dict(pushed, strict=False)
    changed = {name for name in plain if not torch.equal(plain[name], pushed[name])}
    assert changed == {n for n in plain if n.endswith(("q_proj.weight", "down_proj.weight")) and "language" in n}
    ids = torch.arange(5)[None]
    torch.testing.assert_close(
        merged.module(input_ids=ids).logits, policy.module(input_ids=ids).logits, rtol=1e-5, atol=1e-5
    )


def test_another_image_size_in_vllm_is_found(fake_vllm, policy, processor, random_path, prompts, monkeypatch):
    ours = engine(policy, processor, random_path)
    monkeypatch.setattr(processor, "resize", lambda image: image.resize((28, 28)))
    with pytest.raises(UserError, match=r"vLLM made \d+ tokens of a prompt of"):
        ours.generate(prompts[:1], 1, Sampling(max_new_tokens=2))


def test_without_vllm(policy, processor, random_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(UserError, match="--use_vllm: vllm cannot be imported"):
        engine(policy, processor, random_path)
    code = "import sys, vtfast.trainer, vtfast.rollout.vllm; assert 'vllm' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# The real one


def source(name: str) -> ast.Module:
    """Of a module of vLLM: of the installed one, or of the wheel that VLLM_WHEEL names."""
    if wheel := os.environ.get("VLLM_WHEEL"):
        return ast.parse(zipfile.ZipFile(wheel).read(name))
    spec = importlib.util.find_spec("vllm")
    if spec is None:
        pytest.skip("needs vllm, or VLLM_WHEEL=its wheel")
    return ast.parse((Path(spec.origin).parents[1] / name).read_text("utf-8"))


def members(name: str, owner: str) -> dict[str, ast.AST]:
    (found,) = (x for x in source(name).body if isinstance(x, ast.ClassDef) and x.name == owner)
    fields = {x.target.id: x for x in found.body if isinstance(x, ast.AnnAssign)}
    return fields | {x.name: x for x in found.body if isinstance(x, ast.FunctionDef)}


@pytest.mark.slow
def test_the_stand_in_has_the_signatures_of_the_real_one():
    llm = members("vllm/entrypoints/llm.py", "LLM")
    initial = {x.arg for x in llm["__init__"].args.kwonlyargs} | members(
        "vllm/engine/arg_utils.py", "EngineArgs"
    ).keys()
    for name in inspect.signature(LLM).parameters:
        assert name in initial or name == "model", name
    sampling = members("vllm/sampling_params.py", "SamplingParams")
    assert inspect.signature(SamplingParams).parameters.keys() <= sampling.keys()
    for name in ("generate", "sleep", "wake_up", "reset_prefix_cache", "reset_mm_cache"):
        given = llm.get(name) or members("vllm/entrypoints/offline_utils.py", "OfflineInferenceMixin").get(name)
        arguments = {x.arg for x in given.args.args + given.args.kwonlyargs}
        assert inspect.signature(getattr(LLM, name)).parameters.keys() <= arguments, name
        required = len(given.args.args) - len(given.args.defaults)
        assert required <= len(inspect.signature(getattr(LLM, name)).parameters)
    assert "reset_encoder_cache" in members("vllm/v1/engine/llm_engine.py", "LLMEngine")
