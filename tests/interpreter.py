"""Triton's interpreter in half the time: it patches triton.language once for a launch, not for every call in it."""


def speed_up() -> None:
    """Before every call of a device function, tl.sum among them, the interpreter lists all members of four modules to
    patch those that a launch has not patched yet: triton.language.core's, which only that module's functions see.
    Patching both modules with the launch leaves nothing to do."""
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
