"""Packaging of vtfast and of its kernels.

`kernels/` is installed as `vtfast_kernels`: Hugging Face publishes a package called `kernels` and transformers probes
for it, so our folder must never be importable under that name (it has no `__init__.py`).
"""

from setuptools import find_packages, setup

RUNTIME = [
    "torch>=2.11",
    "triton>=3.6",
    "transformers>=5.17",
    "deepspeed>=0.19.8,<0.20",
    "liger-kernel>=0.8.5",
    "datasets>=5",
    "qwen-vl-utils>=0.0.14",
    "math-verify>=0.9",
    "pillow",
    "pydantic>=2.11",
    "pyarrow",
    "pyyaml",
    "safetensors",
    "tqdm",
    "tensorboard",
    "matplotlib",
]

setup(
    name="vtfast",
    version="0.1.0",
    description="GRPO for vision-language models with fused kernels: VisualThinker-R1-Zero, faster",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=[*find_packages(include=["vtfast", "vtfast.*"]), "vtfast_kernels"],
    package_dir={"vtfast_kernels": "kernels"},
    package_data={"vtfast": ["config/recipes/*.yaml", "data/templates/*.txt", "model/assets/*/*", "report/assets/*"]},
    install_requires=RUNTIME,
    extras_require={
        # qwen_vl_utils needs torchvision, which package indexes offer only as a CUDA build
        "gpu": ["flash-attn", "torchvision"],
        "fa4": ["flash-attn-4>=4.0.0b36"],  # FlashAttention-4: nothing to compile
        "lora": ["peft>=0.18"],
        "dev": [
            "pytest",
            "pytest-xdist",
            "ruff",
            "mypy",
            "types-PyYAML",
            "hypothesis",
            "selenium",
            "latex2mathml",
            "mkdocs-material",
            "mkdocstrings[python]",
            "peft>=0.18",
            "trl>=1.16; python_version >= '3.11'",
        ],
    },
    entry_points={"console_scripts": ["vtfast = vtfast.cli:main"]},
)
