"""Triton's interpreter, faster: what it works out for every call and every value is worked out once.

Eight cases of mopro_loss took 6.5 s without this and 5.3 s with it, start of PyTorch included, on two CPU cores.
"""

import functools
import math
from importlib.metadata import PackageNotFoundError, version

import numpy as np
import pytest


def refuse_what_it_cannot_run_with() -> None:
    """Hundreds of tests would fail with NumPy's TypeError."""
    try:
        triton, numpy = version("triton"), version("numpy")
    except PackageNotFoundError:
        return
    if release(triton) < (3, 7) and release(numpy) >= (2, 4):
        pytest.exit(
            f"Triton {triton}'s interpreter, which stands in for a GPU here, fails with NumPy {numpy}: "
            "pip install 'numpy<2.4', or triton 3.7",
            returncode=4,
        )


def release(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def speed_up() -> None:
    patch_once_a_launch()
    remember_types()


def round_fma_once() -> None:
    """As a GPU does: NumPy would round the product, too."""
    from triton.runtime import interpreter

    def create_fma(_, x, y, z):
        exact = x.data.astype(np.float64) * y.data + z.data
        return interpreter.TensorHandle(exact.astype(z.data.dtype), z.dtype.scalar)

    interpreter.InterpreterBuilder.create_fma = create_fma


def patch_once_a_launch() -> None:
    """The interpreter patches triton.language, and triton.language.core where it is seen, at every call of a device
    function, tl.sum among them. This patches both once per launch."""
    from triton.runtime import interpreter

    def patch_lang(_):
        scope = interpreter._LangPatchScope()
        for lang in (tl, tl.core):
            interpreter._patch_builtin(lang, builder, scope)
            interpreter._patch_lang_core(lang, scope)
        for package in (tl.tensor, tl.math, tl.core.tensor_descriptor_base):
            interpreter._patch_builtin(package, builder, scope)
        interpreter._patch_lang_tensor(tl.tensor, scope)
        return scope

    tl, builder = interpreter.tl, interpreter.interpreter_builder
    interpreter._patch_lang = patch_lang
    interpreter.InterpretedFunction.__call__ = lambda function, *args, **kwargs: function.rewrite()(*args, **kwargs)


def remember_types() -> None:
    """A value's type is checked, formatted and looked up in a table made for that, thousands of times a launch; so is
    the shape of every value, a tuple of constants."""
    from triton.runtime import interpreter

    block_type = interpreter.tl.core.block_type
    init, np_dtype, made = block_type.__init__, interpreter._get_np_dtype, {}

    def remembered(self, element_ty, shape):
        key = (
            element_ty.name,
            getattr(element_ty, "address_space", 0),
            *[getattr(size, "value", size) for size in shape],
        )
        if key not in made:
            init(self, element_ty, shape)
            made[key] = dict(vars(self))
        self.__dict__.update(made[key])

    @functools.cache
    def of_scalar(name):
        return np_dtype(interpreter.tl.dtype(name))

    @functools.cache
    def of_shape(shape):
        constexpr = interpreter.tl.constexpr
        return constexpr(math.prod(shape)), interpreter.tl.tuple([constexpr(size) for size in shape])

    def tensor_init(self, handle, type):
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.numel, self.shape = of_shape(type.shape if type.is_block() else ())

    interpreter.tl.tensor.__init__ = tensor_init
    block_type.__init__ = remembered
    interpreter._get_np_dtype = lambda type_: (
        of_scalar(type_.name) if type(type_) is interpreter.tl.dtype else np_dtype(type_)
    )
