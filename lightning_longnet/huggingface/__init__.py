"""Code for transformers: the attention of its models over ranks, and LongNets as models of it.

`export_model` copies `configuration_longnet.py` and `modeling_longnet.py`, unchanged, into the folders that it writes.
"""
