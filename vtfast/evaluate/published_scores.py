"""Accuracies that the study reports (VisualThinker-R1-Zero, arXiv 2503.05132), in percent."""

from __future__ import annotations

from vtfast.evaluate.benchmarks import BENCHMARKS

TITLES = {name: benchmark.title for name, benchmark in BENCHMARKS.items()}
"""Of the benchmarks, by name."""
TABLE_3_COLUMNS = (
    ("CV-Bench Count", "cvbench", "Count"),
    ("Relation", "cvbench", "Relation"),
    ("Depth", "cvbench", "Depth"),
    ("Distance", "cvbench", "Distance"),
    ("CV-Bench total", "cvbench", None),
    ("BLINK Relative Depth", "blink", "Relative_Depth"),
    ("Spatial Relation", "blink", "Spatial_Relation"),
    ("BLINK average", "blink", None),
    ("VSR", "vsr", None),
)
"""(heading, benchmark, task; None is the benchmark's total)."""
TABLE_3 = {
    "Qwen2-VL-2B": (54.69, 22.46, 10.16, 31.66, 31.38, 13.70, 0.69, 6.74, 0.0),
    "Qwen2-VL-2B, SFT on SAT": (60.02, 68.92, 55.00, 45.83, 57.84, 58.06, 47.55, 52.43, 35.80),
    "VisualThinker-R1-Zero": (59.64, 66.76, 54.16, 56.66, 59.47, 50.80, 55.94, 53.18, 62.32),
}
"""Some copies print the base model's Depth as 0.16; only 10.16 gives its total of 31.38."""
TABLE_5_COLUMNS = (
    ("CV-Bench total", "cvbench", None),
    ("Count", "cvbench", "Count"),
    ("Relation", "cvbench", "Relation"),
    ("Depth", "cvbench", "Depth"),
    ("Distance", "cvbench", "Distance"),
)
TABLE_5 = {
    "nothing frozen": (63.57, 61.68, 71.08, 61.50, 60.00),
    "vision encoder frozen": (68.34, 64.21, 78.00, 65.67, 66.00),
    "language model frozen": (65.35, 62.05, 72.46, 65.17, 62.17),
}
QUESTIONS = {"cvbench": 2638, "blink": 267, "vsr": 2195}
"""Questions of each benchmark as the study uses it: BLINK's two spatial tasks (124 + 143), VSR's random test split."""
RESULT = {"cvbench": 59.47, "blink": 53.18, "vsr": 62.32}
"""VisualThinker-R1-Zero's totals, drawn as marks in the charts."""
