"""Whole training steps of rlhf_fast beside TRL's: same model, data, batch, adapters and random numbers.

pip install trl==1.16.0                                             # dpo and grpo
pip install --no-deps --target .cache/trl-1.12.0 trl==1.12.0        # the last with a PPO trainer
python -m benchmarks.steps --algorithm dpo --out out/dpo.json
python -m benchmarks.catalogue                                      # the page, from benchmarks/results/steps_*.json
"""
