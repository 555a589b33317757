"""Checkpoints: each file of a model's folder, and LoRA adapters."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from hypothesis import strategies as st
from PIL import Image

from malformed import WORKS, Kind, link_all
from malformed.data import BASE
from malformed.values import damage, json_bytes


def model(changes: tuple[str, bytes | None], folder: Path) -> str:
    """Loaded, asked with an image and answered in four tokens."""
    from vtfast.data import Processor
    from vtfast.data.prompt_templates import IMAGE
    from vtfast.model.loading import load_model
    from vtfast.rollout import RolloutEngine, Sampling

    name, data = changes
    link_all(BASE, folder / "model")
    (folder / "model" / name).unlink(missing_ok=True)
    if data is not None:
        (folder / "model" / name).write_bytes(data)
    own = Processor.from_pretrained(folder / "model", max_pixels=56 * 56)
    policy = load_model(folder / "model")
    prompt = own.encode(f"{IMAGE}Where?", [Image.new("RGB", (56, 56))])
    sampling = Sampling(max_new_tokens=4, greedy=True)
    [[completion]] = RolloutEngine(policy).generate([prompt], 1, sampling, seed=0)
    own.decode(completion.tokens)
    return WORKS


def _file(name: str, contents: st.SearchStrategy[bytes]) -> st.SearchStrategy:
    """(name of the file, its bytes; None where it is missing)."""
    return st.tuples(st.just(name), contents | contents | contents | st.none())


def _tree(name: str) -> Any:
    return json.loads((BASE / name).read_bytes())


CONFIGS = _file("config.json", json_bytes(_tree("config.json")))
OTHERS = st.one_of(
    *[
        _file(name, json_bytes(_tree(name)))
        for name in ("generation_config.json", "preprocessor_config.json", "tokenizer_config.json")
    ]
)
TOKENIZERS = _file("tokenizer.json", json_bytes(_tree("tokenizer.json")))
WEIGHTS = (BASE / "model.safetensors").read_bytes()
HEADER = int.from_bytes(WEIGHTS[:8], "little")


def _with_header(header: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + WEIGHTS[8 + HEADER :]


SAFETENSORS = _file(
    "model.safetensors",
    st.one_of(
        json_bytes(json.loads(WEIGHTS[8 : 8 + HEADER])).map(_with_header),
        damage(WEIGHTS[: 8 + HEADER]).map(lambda start: start + WEIGHTS[8 + HEADER :]),
        st.sampled_from([2**63, 2**40, HEADER + 1, HEADER - 1, 0]).map(
            lambda length: length.to_bytes(8, "little") + WEIGHTS[8:]
        ),
        st.integers(0, len(WEIGHTS)).map(lambda length: WEIGHTS[:length]),
    ),
)
ADAPTER = {
    "peft_type": "LORA",
    "base_model_name_or_path": str(BASE),
    "r": 4,
    "lora_alpha": 8,
    "target_modules": ["q_proj"],
}


def adapter(data: bytes, folder: Path) -> str:
    from vtfast.model.loading import load_model

    (folder / "model").mkdir()
    (folder / "model" / "adapter_model.safetensors").write_bytes(_adapter_weights())
    (folder / "model" / "adapter_config.json").write_bytes(data)
    load_model(folder / "model")
    return WORKS


@cache
def _adapter_weights() -> bytes:
    import torch
    from safetensors.torch import save

    return save(
        {
            f"base_model.model.model.language_model.layers.{layer}.self_attn.q_proj.lora_{name}.weight": torch.zeros(
                shape
            )
            for layer in range(3)
            for name, shape in (("A", (4, 96)), ("B", (96, 4)))
        }
    )


KINDS = [
    Kind("model: config.json", CONFIGS, model, 30),
    Kind("model: its other JSON", OTHERS, model, 30),
    Kind("model: tokenizer.json", TOKENIZERS, model, 15),
    Kind("model: safetensors", SAFETENSORS, model, 25),
    Kind("model: LoRA adapters", json_bytes(ADAPTER), adapter, 15),
]
