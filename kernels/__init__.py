"""Triton kernels, installed as `mopro_fast.kernels`: one file per op, named as the op, imported lazily."""
