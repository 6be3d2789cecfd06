"""Whole training steps of rlhf_fast beside TRL's: same model, data, batch, adapters and random numbers.

python -m benchmarks.steps --algorithm dpo --out out/dpo.json
python -m benchmarks.steps report out/ppo.json out/grpo.json out/dpo.json --out docs/steps.md
"""
