"""A plugin for mypy, which checks the call of a module as a call of its `forward`. Torch types it as Callable[..., Any]."""

from __future__ import annotations

from collections.abc import Callable

from mypy.nodes import TypeInfo
from mypy.plugin import MethodSigContext, Plugin
from mypy.subtypes import find_member
from mypy.types import FunctionLike, Instance, get_proper_type

MODULE, SEQUENTIAL = "torch.nn.modules.module.Module", "torch.nn.modules.container.Sequential"


class ModuleCalls(Plugin):
    def get_method_signature_hook(self, fullname: str) -> Callable[[MethodSigContext], FunctionLike] | None:
        return self.forward if fullname.endswith(".__call__") else None

    def forward(self, context: MethodSigContext) -> FunctionLike:
        """Return the type of `forward`. That of a Sequential, which torch leaves open, is taken from nn.Identity: a tensor to a tensor."""
        kind = context.type
        if not isinstance(kind, Instance) or not kind.type.has_base(MODULE):
            return context.default_signature
        if kind.type.has_base(SEQUENTIAL):
            identity = self.lookup_fully_qualified("torch.nn.modules.linear.Identity")
            assert identity is not None and isinstance(identity.node, TypeInfo)
            kind = Instance(identity.node, [])
        found = get_proper_type(find_member("forward", kind, kind))
        return found if isinstance(found, FunctionLike) else context.default_signature


def plugin(version: str) -> type[Plugin]:
    return ModuleCalls
