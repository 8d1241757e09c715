# All GPUs of a machine share the weights, gradients and states of one training (FSDP2). The section hf_lowmem_config of
# the file counts for every script that it starts; the script may be one that has never heard of hf_lowmem.
hf-lowmem launch --config_file integrations/accelerate/fsdp2.yaml --num_processes 2 scripts/examples/sft.py
