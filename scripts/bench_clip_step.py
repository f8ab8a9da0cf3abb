"""Time of a training step of the demo's vanilla CLIP: CLIP's quick_gelu against gelu, glibc's defaults against env.sh.

    python scripts/bench_clip_step.py [--rounds 5]

Prints ratios of medians; every measurement is a process of its own, and the variants take turns.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time

BATCH, TOKENS, STEPS = 128, 60, 6
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "33554432", "MALLOC_TRIM_THRESHOLD_": "536870912"}  # as in scripts/env.sh
VARIANTS = {
    "quick_gelu": ("quick_gelu", {}),
    "gelu": ("gelu", {}),
    "gelu, memory kept": ("gelu", MALLOC),
}


def seconds_per_step(activation: str) -> float:
    """Median over a few steps in this process."""
    import torch
    from transformers import CLIPConfig, CLIPModel

    common = {"num_attention_heads": 4, "projection_dim": 192, "hidden_act": activation}
    vision = {
        "image_size": 96,
        "patch_size": 32,
        "hidden_size": 256,
        "intermediate_size": 1024,
        "num_hidden_layers": 3,
    }
    text = {"hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 2, "vocab_size": 49408}
    model = CLIPModel(CLIPConfig(vision_config=vision | common, text_config=text | common, projection_dim=192))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    pixels, ids = torch.randn(BATCH, 3, 96, 96), torch.randint(1, 49406, (BATCH, TOKENS))
    ids[:, -1] = 49407
    times = []
    for _ in range(STEPS):
        start = time.perf_counter()
        model(pixel_values=pixels, input_ids=ids, return_loss=True).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--activation", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.activation:
        print(seconds_per_step(args.activation))
        return
    plain = {name: value for name, value in os.environ.items() if name not in MALLOC}
    found: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for _ in range(args.rounds):
        for name, (activation, environment) in VARIANTS.items():
            command = [sys.executable, __file__, "--activation", activation]
            done = subprocess.run(command, env=plain | environment, capture_output=True, text=True, check=True)
            found[name].append(float(done.stdout))
    base = statistics.median(found["quick_gelu"])
    for name, times in found.items():
        print(f"{name}: {base / statistics.median(times):.2f} times the speed of quick_gelu")


if __name__ == "__main__":
    main()
