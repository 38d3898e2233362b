"""Distributed training: the process group, FSDP, collectives of waiting processes, and files of sharded tensors."""
