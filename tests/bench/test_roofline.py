"""Floors against counts made elsewhere, and a run's own line against the bench's page."""

import json
import re
import time

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench import roofline as bench
from bench._recorded_run import read_recorded
from bench._workload import model_config
from vtfast.config import load_config
from vtfast.cost.devices import Rates, data_sheet, measured
from vtfast.cost.micro_batches import GroupPart, GroupSize
from vtfast.cost.roofline import (
    Floor,
    ModelSize,
    admission_steps,
    decode_floor,
    in_flight,
    link_floor,
    micro_batch_floor,
    optimizer_floor,
    prefill_floor,
    score_floor,
    step_floors,
)
from vtfast.data.prompt_builder import EncodedSample
from vtfast.distributed.ranks import Ranks
from vtfast.model.loading import load_model, read_model_config
from vtfast.model.meta_model import meta_policy
from vtfast.rollout import Completion, RolloutEngine, Sampling
from vtfast.rollout.scheduler import Scheduler
from vtfast.trainer import Trainer
from vtfast.training.groups import Group, MicroBatch
from vtfast.training.metrics import update_flops
from vtfast.training.speed import phase_seconds, shares
from vtfast.utils.errors import UserError

UNIT = Rates(1.0, float("inf"))
"""Floors in FLOPs."""
BYTES = Rates(float("inf"), 1.0)
"""Floors in bytes."""
H100 = data_sheet("NVIDIA H100 80GB HBM3", torch.bfloat16, link=True)


@pytest.fixture(scope="module")
def two_b(tmp_path_factory):
    folder = tmp_path_factory.mktemp("2b")
    model_config("Qwen2-VL-2B").save_pretrained(folder)
    return ModelSize.of(meta_policy(read_model_config(folder), torch.bfloat16))


@pytest.fixture(scope="module")
def tiny(base_path):
    return ModelSize.of(load_model(base_path))


def test_a_skeleton_has_the_models_own_sizes(base_path, tiny):
    without = ModelSize.of(meta_policy(read_model_config(base_path), torch.float32))
    assert vars(without) | {"policy": None} == vars(tiny) | {"policy": None}
    module = tiny.policy.module
    assert tiny.trained == sum(p.numel() for p in module.parameters())
    frozen = ModelSize.of(meta_policy(read_model_config(base_path), torch.float32, ["vision"]))
    assert 0 < frozen.trained < tiny.trained and frozen.policy.vision_is_frozen


def test_a_folder_without_a_model_is_named(tmp_path):
    with pytest.raises(UserError, match=r"--model .*: config\.json: "):
        meta_policy(read_model_config(tmp_path), torch.float32)


def test_decode_bytes_of_qwen2_vl_2b(two_b):
    """1.310 B weights and a head of 0.233 B in bf16 are 3.087 GB, keys and values 28,672 bytes a token."""
    assert two_b.decoder == pytest.approx(1.310e9, rel=1e-3)
    assert two_b.head == 151936 * 1536 and two_b.kv_bytes == 28672
    assert two_b.decode_bytes(0) == pytest.approx(3.087e9, rel=1e-3)
    assert two_b.decode_bytes(8 * 1000) == pytest.approx(3.32e9, rel=2e-3)
    one_step = decode_floor(two_b, H100, [GroupSize(999, [2], [])] * 8)
    assert one_step.seconds == pytest.approx(0.99e-3, rel=0.01) and one_step.bound == "memory"


def test_names_of_devices():
    assert data_sheet("NVIDIA H200", torch.bfloat16).bandwidth == 4.8e12
    assert data_sheet("NVIDIA H100 PCIe", torch.bfloat16).bandwidth == 2.0e12
    assert data_sheet("NVIDIA A100-SXM4-80GB", torch.float32).flops == 19.5e12
    assert data_sheet("NVIDIA A100-SXM4-40GB", torch.bfloat16).bandwidth == 1.555e12
    assert data_sheet("NVIDIA GH200 480GB", torch.bfloat16) is None
    assert data_sheet("NVIDIA H100 NVL", torch.bfloat16, link=True).link == 64e9
    assert H100.link == 450e9 and data_sheet("NVIDIA H100", torch.bfloat16).link is None


def test_measured_rates_are_those_of_the_work_done(monkeypatch):
    """With a clock that says 1 s for everything, the rates are the operations and bytes themselves."""
    ticks = iter(range(1000))
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(ticks)))
    rates = measured(torch.float32, Ranks(0, 1, torch.device("cpu")))
    assert rates == Rates(2.0 * 1024**3, 2.0 * 2**27, None, "measured")


# The rollout


@pytest.mark.parametrize("max_rows", [2, 4, 5, 100])
@pytest.mark.parametrize("seed", [0, 1])
def test_rows_in_flight_are_the_engines(policy, prompts, monkeypatch, max_rows, seed):
    """Every decode step of a real rollout: the rows that it has, and the tokens that they see."""
    alive, seen = [], []
    real = Scheduler.decode_step

    def step(self, rows):
        alive.append(len(self.running))
        seen.append(int(rows.length[: len(self.running)].sum()) + len(self.running))
        return real(self, rows)

    monkeypatch.setattr(Scheduler, "decode_step", step)
    engine = RolloutEngine(policy, max_rows=max_rows, steps_per_sync=1, cache_tokens=4096)
    monkeypatch.setattr(policy, "eos_ids", tuple(range(0, policy.head.shape[0], 8)))  # many lengths
    groups = engine.generate(prompts, 2, Sampling(max_new_tokens=12, min_new_tokens=2), seed=seed)
    sizes = [
        GroupSize(len(prompt.ids), [len(c.tokens) for c in group], [])
        for prompt, group in zip(prompts, groups, strict=True)
    ]
    assert len({n for size in sizes for n in size.lengths}) > 2
    rows, cached, pairs = in_flight(sizes, max_rows)
    assert rows.tolist() == alive and pairs.tolist() == seen
    assert (cached <= pairs).all() and (cached < pairs).any()  # a shared prompt is read once
    assert engine.last_timings["prefill"] > 0 and engine.last_timings["decode"] > 0


def test_a_rollout_row_by_row():
    """Prompts of 10 and 20 tokens; completions of 3 and 1, and of 2 and 2."""
    groups = [GroupSize(10, [3, 1], []), GroupSize(20, [2, 2], [])]
    rows, cached, pairs = (x.tolist() for x in in_flight(groups, 4))
    assert rows == [3, 1]
    assert cached == [10 + 1 + 20 + 1 + 1, 10 + 2]
    assert pairs == [11 + 21 + 21, 12]
    assert admission_steps([[3, 1], [2, 2]], 2) == [0, 2]
    assert in_flight(groups, 2)[0].tolist() == [1, 1, 2]
    assert [x.tolist() for x in in_flight([GroupSize(5, [1, 1], [])], 4)] == [[], [], []]
    assert [x.tolist() for x in in_flight([], 4)] == [[], [], []]


def test_flops_of_a_decode_step_are_what_torch_counts(tiny, prompts):
    """But for attention, whose masked batches torch counts whole."""
    engine = RolloutEngine(tiny.policy)
    run = engine.start(prompts[2:3], 3, Sampling(max_new_tokens=8))
    for part in run.schedule():
        run.prefill(part)
    with FlopCounterMode(display=False) as counter:
        run.decode_step(run.workspace.rows.slice(0, 3))
    run.release()
    counts = counter.get_flop_counts()["Global"]
    matmuls = sum(n for op, n in counts.items() if str(op) in ("aten.mm", "aten.addmm"))
    floor = decode_floor(tiny, UNIT, [GroupSize(0, [2] * 3, [])]).seconds
    token = 4 * 3 * 3 * 96  # attention of three rows to themselves: layers 3, width 96
    assert matmuls == pytest.approx(floor - token, rel=0.01)


def test_prefill(two_b):
    groups = [GroupSize(612, [1] * 8, [2048])] * 30
    flops = prefill_floor(two_b, UNIT, groups).seconds / 30
    trunk, attention, one_draw = 612 * 2.62e9, 4 * 612 * 306 * 28 * 1536, 0.467e9
    assert flops == pytest.approx(3.30e12 + trunk + attention + one_draw, rel=0.05)
    bare = prefill_floor(two_b, UNIT, [GroupSize(1, [1], [])]).seconds
    assert bare == pytest.approx(2.62e9 + one_draw, rel=0.01)
    read = prefill_floor(two_b, BYTES, groups).seconds
    weights = 3.087e9 + two_b.vision * 2
    assert read == pytest.approx(2 * weights + 30 * 612 * 28672, rel=1e-3)  # 18,360 tokens: two rows
    text = prefill_floor(two_b, BYTES, [GroupSize(612, [1], [])]).seconds
    assert text == pytest.approx(3.087e9 + 612 * 28672, rel=1e-3)
    assert prefill_floor(two_b, H100, []) == Floor()


# The update


def test_an_update_bound_by_compute_has_mfu_as_its_share(policy, prompts):
    groups = {
        p: Group(
            EncodedSample(None, prompt), [Completion([1] * n, [], "stop") for n in (3, 5)], advantage=torch.zeros(2)
        )
        for p, prompt in enumerate(prompts)
    }
    batch = MicroBatch([GroupPart(p, (0, 1), 0, 0.0) for p in groups], groups, policy)
    sizes = [GroupSize(len(prompt.ids), [3, 5], prompt.patches) for prompt in prompts]
    floor = micro_batch_floor(ModelSize.of(policy), UNIT, sizes)
    assert floor == Floor(compute=update_flops(policy, [batch]))


def test_bytes_of_an_update(two_b, base_path):
    sizes = [GroupSize(100, [10], [])]
    weights = 3.087e9
    one, two = (score_floor(two_b, BYTES, sizes, ["reference", "old"][:n]) for n in (1, 2))
    assert one.memory == pytest.approx(weights, rel=1e-3) and two.memory == 2 * one.memory
    assert score_floor(two_b, BYTES, sizes, []) == score_floor(two_b, BYTES, [], ["old"]) == Floor()
    expected = 2 * weights + 2 * two_b.trained
    assert micro_batch_floor(two_b, BYTES, sizes).memory == pytest.approx(expected, rel=1e-3)
    assert optimizer_floor(two_b, BYTES, 4).memory == two_b.trained * 30 / 4
    fp32 = ModelSize.of(meta_policy(read_model_config(base_path), torch.float32))
    assert optimizer_floor(fp32, BYTES).memory == fp32.trained * 28


def test_an_image_of_a_trained_tower_is_seen_by_every_scorer(two_b, tmp_path):
    with_image, without = [GroupSize(100, [10], [400])], [GroupSize(100, [10], [])]
    tower = lambda weights: (  # noqa: E731
        score_floor(weights, UNIT, with_image, ["old"]).seconds - score_floor(weights, UNIT, without, ["old"]).seconds
    )
    assert tower(two_b) == pytest.approx(400 * 2 * 0.66e9, rel=0.15)
    model_config("Qwen2-VL-2B").save_pretrained(tmp_path)
    assert tower(ModelSize.of(meta_policy(read_model_config(tmp_path), torch.bfloat16, ["vision", "merger"]))) == 0


def test_link(two_b):
    assert link_floor(Rates(1, 1, link=100.0), 800, 4) == Floor(link=6.0)
    assert link_floor(Rates(1, 1, link=100.0), 800, 1) == link_floor(Rates(1, 1), 800, 4) == Floor()
    slow = Rates(H100.flops, H100.bandwidth, link=1e9)
    sizes = [GroupSize(100, [10], [])]
    assert micro_batch_floor(two_b, slow, sizes, ranks=2).link == pytest.approx(two_b.trained * 2 / 2 / 1e9)
    long = [GroupSize(600, [700] * 8, [])]
    assert micro_batch_floor(two_b, H100, long, ranks=2) == micro_batch_floor(two_b, H100, long), "hidden"


def test_ranks_wait_for_the_slowest(two_b):
    config = load_config(overrides={"beta": 0.04, "token_budget": 1000})
    light, heavy = [GroupSize(100, [50] * 4, [])], [GroupSize(100, [200] * 4, [])]
    floors = step_floors(two_b, H100, config, [light, heavy])
    alone = step_floors(two_b, H100, config, [heavy])
    assert floors["rollout"] == alone["rollout"]
    assert floors["decode"] == decode_floor(two_b, H100, light)
    assert floors["update"].seconds < step_floors(two_b, H100, config, [light + heavy])["update"].seconds
    assert floors["link"].seconds > 0 == alone["link"].seconds
    again = step_floors(two_b, H100, config, [light, heavy], fresh=False)
    assert again["update"] == floors["update"] and not {"rollout", "score"} & set(again)


def test_a_phase_without_work_or_clock_has_no_share():
    floors = {"rollout": Floor(memory=1.0), "score": Floor(), "update": Floor(compute=2.0)}
    found = shares(floors, {"rollout": 4.0, "score": 1.0, "update": 4.0, "step": 10.0})
    assert found == {
        "roofline/rollout": 0.25,
        "roofline/score": None,
        "roofline/update": 0.5,
        "roofline/prefill": None,
        "roofline/decode": None,
        "roofline/floor_seconds": 3.0,
        "roofline/step": 0.3,
    }


# A run and its page


class Clock:
    """One millisecond a look: times that depend on nothing but the program."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(time, "perf_counter", self.read)

    def read(self) -> float:
        self.now += 1e-3
        return self.now


RUN = {
    "eval_data": "none",
    "first_n": 32,
    "max_steps": 4,
    "per_device_train_batch_size": 4,
    "num_generations": 4,
    "max_completion_length": 20,
    "roofline_steps": 2,
    "roofline_rates": "measured",
    "report_to": "none",
}


@pytest.fixture
def train(tmp_path, caplog):
    """Runs with some settings changed -> (run folder, lines that it logged)."""

    def run(**overrides):
        folder = tmp_path / f"run-{len(list(tmp_path.iterdir()))}"
        caplog.clear()
        with caplog.at_level("INFO", logger="vtfast"):
            Trainer(load_config(overrides=RUN | overrides | {"output_dir": str(folder)})).run()
        return folder, [m for m in caplog.messages if "roofline:" in m]

    return run


def lines_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_the_runs_lines_are_the_pages(train, capsys):
    """Weights, work and passes are made anew from the run folder; passes of a small budget, KL, and a second update on
    the same answers included."""
    folder, logged = train(beta=0.04, num_iterations=3, token_budget=200, max_steps=6)
    assert [re.match(r"step (\d+) ", text)[1] for text in logged] == ["2", "4", "6"]
    run = read_recorded(folder)
    by_number = {step.number: step for step in run.steps}
    assert sum(step.fresh for step in run.steps) == 2
    for text in logged:
        step = by_number[int(text.split()[1])]
        assert step.metrics["passes"] > 1
        seconds = phase_seconds(step.metrics)
        floors = bench.floors_of(run, step)
        said = re.search(r"floor ([\d.e+-]+) (m?s) of ([\d.e+-]+) (m?s)", text)
        unit = {"s": 1.0, "ms": 1e-3}
        total = sum(floors[name].seconds for name in ("rollout", "score", "update") if name in floors)
        assert float(said[1]) * unit[said[2]] == pytest.approx(total, rel=0.1)
        assert float(said[3]) * unit[said[4]] == pytest.approx(seconds["step"], rel=0.1)
        for name, percent in re.findall(r"(rollout|decode|score|update) (\d+)%", text):
            share = floors[name].seconds / seconds[name]
            assert float(percent) == pytest.approx(100 * share, rel=0.1, abs=0.5)
        assert f"update {shares(floors, seconds)['roofline/update']:.0%} " in text
        assert ("rollout" in text) == step.fresh
    assert bench.main([str(folder)]) == 0
    page = (folder / "roofline.md").read_text()
    assert page in capsys.readouterr().out
    assert "Steps whose shares the run logged: 3; they differ from this page by at most 0.00%" in page
    assert (folder / "roofline.png").read_bytes().startswith(b"\x89PNG")
    metrics = lines_of(folder)
    for line in metrics:  # a page that differs is an error
        if "roofline/update" in line:
            line["roofline/update"] *= 1.2
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    assert bench.main([str(folder), "--output", str(folder / "elsewhere")]) == 1


def test_a_planted_slowdown_lowers_its_phase_alone(train, monkeypatch):
    def last(**overrides):
        clock = Clock(monkeypatch)
        if "slow" in overrides:
            name, seconds = overrides.pop("slow")
            real = getattr(Trainer, name)

            def slow(self, *arguments):
                clock.now += seconds
                return real(self, *arguments)

            monkeypatch.setattr(Trainer, name, slow)
        folder, _ = train(beta=0.04, max_steps=2)
        monkeypatch.undo()
        return lines_of(folder)[-1]

    names = ("rollout", "prefill", "decode", "score", "update", "step")
    plain = last()
    for phase, planted in (("update", "update"), ("score", "score_logprobs")):
        slow = last(slow=(planted, 50.0))
        ratio = {name: slow[f"roofline/{name}"] / plain[f"roofline/{name}"] for name in names}
        expected = {phase: plain[f"time/{phase}"] / (plain[f"time/{phase}"] + 50.0)}
        assert ratio[phase] == pytest.approx(expected[phase], rel=0.01)
        assert ratio["step"] < 0.1
        for other in set(names) - {phase, "step"}:
            assert ratio[other] == pytest.approx(1.0), other


def test_without_rates_nothing_is_said(train):
    folder, logged = train(roofline_rates="data_sheet", max_steps=2)
    assert not logged
    last = lines_of(folder)[-1]
    assert last["roofline/update"] is last["roofline/step"] is None
    with pytest.raises(UserError, match="recorded no rates of its device; name one with --device"):
        read_recorded(folder)
    elsewhere = read_recorded(folder, device="H100")
    assert elsewhere.rates.flops == 67e12  # fp32
    assert bench.differences(elsewhere) == {}
    off, _ = train(roofline_steps=0, max_steps=1)
    assert not any(name.startswith("roofline/") for name in lines_of(off)[-1])


def test_damaged_run_folders(train, tmp_path, capsys):
    folder, _ = train(max_steps=2)
    path = folder / "completions.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    whole = read_recorded(folder).steps
    first = [row for row in rows if row["step"] == 1]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, *first]) + '{"torn')
    assert [step.number for step in read_recorded(folder).steps] == [1], "step 1 came again"
    assert read_recorded(folder).steps[0].everyone == whole[0].everyone
    path.write_text("".join(json.dumps({"step": row["step"], "length": 3}) + "\n" for row in rows))
    assert bench.main([str(folder)]) == 2
    assert "rows lack row, prompt_length, patches, advantage, rank" in capsys.readouterr().err
    path.write_text("")
    with pytest.raises(UserError, match=r"no step is in both metrics\.jsonl and completions\.jsonl"):
        read_recorded(folder)
    with pytest.raises(UserError, match="--device V100: not listed"):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        read_recorded(folder, device="V100")
    assert bench.main([str(tmp_path / "nowhere")]) == 2


def test_page_of_lora(train):
    pytest.importorskip("peft")
    folder, logged = train(use_peft=True, max_steps=2)
    assert len(logged) == 1
    assert max(bench.differences(read_recorded(folder)).values()) < 1e-6
