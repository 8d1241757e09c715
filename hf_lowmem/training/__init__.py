"""Entry points from HuggingFace: fields of training arguments, trainers, and a plugin for loops of one's own.

arguments     the fields, settled and checked at construction
own_defaults  Adam's settings that were left open: the optimizer's own
mixin         a Trainer with the fields: optimizer, tiers, step in backward, budget, checkpoints
wrap          any config and any Trainer made ours of its class
sft           trl.SFTTrainer with the fields
dpo_config    the fields of preference training
dpo           trl.DPOTrainer with the fields, and losses that need no reference model
callbacks     step in backward and tiers in a Trainer that is not ours
plugin        the same in an Accelerate loop
section       the fields in an accelerate YAML, on their way to the processes that train
"""
